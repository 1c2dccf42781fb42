"""A model that passes through RAM block by block, for people who have a training loop of their own."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from megatrain_io.data.batch import MicroBatch, refuse_tokens, trained_tokens
from megatrain_io.errors import ConfigError, DataError, DoesNotFitError, MegatrainIoError
from megatrain_io.paging.device.base import Device
from megatrain_io.paging.paged_model import PagedPartition
from megatrain_io.planning.memory_needs import activation_budget_of
from megatrain_io.planning.ram_budget import StepNeeds
from megatrain_io.runs.export_model import write_model_folder
from megatrain_io.runs.folder import activations_file, gradient_file
from megatrain_io.runs.import_model import create_store, layout_of, refuse_other_formats
from megatrain_io.store.dtypes import DTYPES, check_precision
from megatrain_io.store.layout import ModelLayout, Precision
from megatrain_io.store.paged_store import AdamWStep, Ledger, PagedStore, store_memory
from megatrain_io.training.fingerprint import differences, fingerprint_of
from megatrain_io.training.model_source import Model, ModelSource, Weights
from megatrain_io.training.optimizer_step import MicroBatchLike, OptimizerStep, Progress, micro_batches_of
from megatrain_io.training.own_settings import (
    Settings,
    WeightDecay,
    checked_learning_rate,
    checked_seed,
    device_of,
    paths_of,
    ram_asked,
    refuse_missing,
)
from megatrain_io.training.step_memory import StepSize

__all__ = ["PagedModel", "Plane"]

Plane = Literal["weight", "master", "exp_avg", "exp_avg_sq"]

# Micro-batches that go through the blocks together when a loss is measured before any step was made.
_EVALUATED_TOGETHER = 16


class PagedModel:
    """A causal language model in training whose weights and AdamW state lie in a file and pass through RAM.

    For a training loop of one's own: the engine is that of ``megatrain_io.train``, without configuration, data and run
    folder. ::

        model = mt.PagedModel.create(Decoder(), "model.mtio", blocks="layers", precision="bf16", ram="4GiB")
        for micro_batches in my_batches:
            with model.step(learning_rate=3e-4) as step:  # one optimizer step, all or nothing
                loss = step.forward(micro_batches)        # all micro-batches of the step
                step.backward()
                step.state = b"..."                       # the caller's own bytes, committed with it
        model.close()

    and later, also after a crash::

        model = mt.PagedModel.open(Decoder(), "model.mtio", blocks="layers", ram="4GiB")
        model.step_number, model.state                    # of the last committed step

    **A step.** ``forward`` takes all micro-batches of the step and returns the mean loss of their trained tokens. A
    micro-batch is ``input_ids``, int64 [B, T]; or a mapping of ``input_ids``, ``labels`` (as transformers has them: not
    shifted, -100 is not trained), ``attention_mask`` and ``position_ids``, [B, T] each; or a ``MicroBatch``, whose
    labels are shifted. ``backward`` makes the gradients; then ``step.grad_norm`` is known. Each block is read once for
    the whole step in either direction, however many micro-batches it has. The loss is known before anything is
    updated: leave the step by an error, and it is dropped.

    **Which models.** A transformers causal language model: the path of a folder as the hub has them, or an instance.
    Or a module of any class whose ``forward(input_ids)`` returns scores [B, T, V], or an object with them as
    ``.logits``, and which calls the members of one ``nn.ModuleList`` once each, in order. A block takes the hidden
    state [B, T, H] first and returns the next one, alone or as the first of a tuple; what it takes besides (masks,
    rotary tables) carries no gradient. Behind the last block each position stands by itself. All parameters are
    trained; embedding and head may share theirs. Buffers keep their values and dtype. A module that is handed in is
    only read. To train one that does not fit in RAM, hand in a function that makes it (``lambda: Decoder(config)``; it
    is called without memory for parameters), and ``weights``.

    **What is promised.**

    * *Bits.* Where the CPU computes, losses, weights and both moments are those of the same model in memory, with as
      many torch threads: gradients by autograd in the dtype that computes, summed over micro-batches in fp32 in their
      order, then ``torch.optim.AdamW(fused=True)`` on fp32 masters. In bf16 a weight is its master rounded to nearest,
      ties away from zero. When a model is opened this is proved for it: a small copy passes through in both ways, and
      every loss and gradient must agree. A module that is too large for that, without ``small``, is not proved, and
      ``notes`` says so. Two things differ from a pass in memory: dropout draws its numbers from ``seed``, step,
      micro-batch and block; and a micro-batch whose fp32 scores take more than 128 MiB passes the head in slices.
    * *Steps are transactions.* A step is committed as a whole, with the caller's ``state``, or leaves nothing. Its end
      is written while the next step begins: after ``kill -9`` or a power cut the file stands at the last step that was
      left or at the one before; with ``max_grad_norm`` one earlier, as gradients wait for their norm. ``wait_durable``
      and ``close`` wait until the last step is on the drive.
    * *Resuming* gives the bits of a run that was never stopped, on the same machine with the same versions and
      settings; ``notes`` says what changed.
    * *RAM.* Tables, buffers, activations and compute stay within ``ram``; Python, torch's code and the caller's own
      tensors come on top. It is divided for the largest step so far, or for ``largest_step``; a larger one divides it
      anew. Where shapes depend on data (some mixtures of experts) what compute takes comes on top; ``notes`` says so.

    **What is not.** Other optimizers, adapters, buffers that change, losses of one's own, several
    GPUs, several threads at once, use after a fork.

    Made by ``create`` or ``open``, not directly. Leaving its ``with`` closes it.

    Attributes:
        notes: sentences for the person: what was not proved, what may be slower, what changed since the last start.
        ledger: bytes of RAM by account, now and at their peak.
    """

    def __init__(
        self,
        source: ModelSource,
        store: PagedStore,
        how: Settings,
        closing: ExitStack,
        needs: StepNeeds | None = None,
    ) -> None:
        source.release()
        self._source = source
        self._store = store
        self._how = how
        self._closing = closing
        self._tables = store.ledger.total()[0]
        progress = Progress.parse(store.blob)
        self._step_number, self._state, self._seed = progress.step, progress.state, progress.seed
        self._environment = fingerprint_of(how.device, source.partition) | how.describe()
        self._running: PagedPartition | None = None
        self._pins = closing.enter_context(ExitStack())
        self._size: StepSize | None = None
        self._is_in_step = False
        self.ledger: Ledger = store.ledger
        self.notes: list[str] = [
            *source.notes,
            *store.notes,
            *source.partition.notes,
            *source.partition.loss_notes,
            *source.changes(json.loads(store.manifest)["model"]),
            *differences(progress.environment, self._environment),
        ]
        if how.largest is not None:
            self._make_ready(how.largest, needs)

    @classmethod
    def create(  # noqa: PLR0913 - each with a meaning of its own
        cls,
        model: Model,
        path: Path | str | Sequence[Path | str],
        *,
        blocks: str | None = None,
        weights: Weights | None = None,
        small: nn.Module | None = None,
        precision: Precision | Literal["auto"] = "auto",
        ram: int | str | None = None,
        device: Device | torch.device | Literal["cpu", "cuda"] | None = None,
        vram: int | str | None = None,
        weight_decay: WeightDecay = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        largest_step: Sequence[MicroBatchLike] | None = None,
        seed: int = 0,
    ) -> Self:
        """Make the file of a model at step 0, and open it.

        Args:
            model: a module, a function that makes one, or the path of a model folder (safetensors).
            path: of the file, which must not exist; several, one on each drive, are one store. It has room for two
                copies of weights and AdamW state, as a step is written beside the one before.
            blocks: name of the module list that holds the blocks, such as ``"layers"``; transformers models need none.
            weights: ``weights(name, shape)`` makes the first values of a parameter (bf16, fp16 or fp32), one at a
                time in the order of the model. None = those of the module or folder.
            small: an instance of the module's class with few and small blocks, to prove on; None = the module itself,
                if it has at most 33,554,432 parameters.
            precision: that computes: ``"bf16"``, with fp32 masters, ``"fp32"``, or ``"auto"``, in which ``device``
                computes fastest.
            ram: bytes, or text such as ``"4GiB"``; None = half of what is free.
            device: what computes: ``"cpu"``, ``"cuda"``, as text or as torch has them, or a device; None = the GPU if
                there is one that computes in ``precision``, else the CPU. A device that is handed in is not closed.
            vram: bytes of a GPU's memory; None = what is free.
            weight_decay: of parameters with two dimensions or more; others have none. Or ``decay(name, shape)``.
            betas: AdamW's.
            eps: AdamW's.
            max_grad_norm: gradients with a larger norm over all parameters are scaled down to it; None = never.
            largest_step: micro-batches for which memory is divided at once, such as
                ``[torch.zeros(2, 4096, dtype=torch.int64)] * 8``; their values do not matter. None = for the steps as
                they come. Give it where a GPU computes: its memory is divided once.
            seed: of dropout, from 0 to 2^63 - 1; kept in the file.

        Raises:
            ConfigError: an argument is wrong or missing, or ``path`` exists.
            UnsupportedModelError: the model cannot be trained block by block; the message says why.
            ModelFilesError: the folder is incomplete or damaged.
            DoesNotFitError: ``largest_step`` does not fit ``ram`` or the device.
            NoSpaceError, StorageError: the drive. Nothing is left behind.
        """
        if precision != "auto":
            check_precision("precision", precision)
        seed = checked_seed(seed)
        paths = paths_of(path)
        for each in paths:
            if os.path.lexists(each):
                raise ConfigError(f"{each} exists: open it with PagedModel.open, or choose another path")
            if not os.path.lexists(each.parent):
                raise ConfigError(f"{each.parent} does not exist: make that folder, or choose another path")
        written: list[Path] = []
        with ExitStack() as undo:
            closing = ExitStack()
            undo.callback(_remove, written)
            undo.callback(closing.close)
            computes, precision = device_of(device, precision, vram, closing)
            how = Settings(
                paths=paths,
                device=computes,
                ram=ram_asked(ram),
                weight_decay=weight_decay,
                betas=betas,
                eps=eps,
                max_grad_norm=max_grad_norm,
                largest=None if largest_step is None else StepSize.of(micro_batches_of(largest_step)),
            )
            source = ModelSource(model, precision, blocks, small)
            layout = layout_of(source.partition)
            how.refuse_wrong_decay(layout.tensors())
            source.take_kept()
            about = source.describe()
            needs: StepNeeds | None = None
            if how.largest is not None:  # before anything is written
                needs = how.largest.needs(source.partition, layout, store_memory(layout.manifest(about)))
                how.largest.divide(
                    source.partition, layout, needs, ram=how.ram, device=how.device, defers=how.defers
                )
            with source.reading(weights) as read:
                create_store(paths, layout, read, model=about, blob=Progress(0, seed, None, b"").encode())
            written += paths
            store = closing.enter_context(PagedStore(*paths))
            made = cls(source, store, how, closing, needs)
            undo.pop_all()
        return made

    @classmethod
    def open(  # noqa: PLR0913 - as create
        cls,
        model: Model,
        path: Path | str | Sequence[Path | str],
        *,
        blocks: str | None = None,
        small: nn.Module | None = None,
        ram: int | str | None = None,
        device: Device | torch.device | Literal["cpu", "cuda"] | None = None,
        vram: int | str | None = None,
        weight_decay: WeightDecay = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        max_grad_norm: float | None = None,
        largest_step: Sequence[MicroBatchLike] | None = None,
    ) -> Self:
        """Open the file of a model at its last committed step.

        Args:
            model: as at ``create``; of a module only the code is used, not its weights.
            path: of the file or files.
            blocks: as at ``create``, and so the others. Precision and seed are those of the file; what differs from
                the settings of the last step is named in ``notes``.
            small: an instance of the module's class with few and small blocks, to prove on.
            ram: bytes, or text such as ``"4GiB"``; None = half of what is free.
            device: what computes: ``"cpu"``, ``"cuda"``, or a device; None = the GPU if there is one, else the CPU.
            vram: bytes of a GPU's memory; None = what is free.
            weight_decay: of parameters with two dimensions or more, or ``decay(name, shape)``.
            betas: AdamW's.
            eps: AdamW's.
            max_grad_norm: gradients with a larger norm over all parameters are scaled down to it; None = never.
            largest_step: micro-batches for which memory is divided at once; None = for the steps as they come.

        Raises:
            ConfigError: an argument is wrong or missing, there is no such file, or it is of a model with other
                parameters.
            FormatError: the file was not made by ``create``.
            StoreInUseError, CorruptionError, StorageError: it cannot be opened, and is as it was.
            UnsupportedModelError, ModelFilesError, DoesNotFitError: as ``create``.
        """
        paths = paths_of(path)
        refuse_missing(paths)
        with ExitStack() as undo:
            closing = ExitStack()
            undo.callback(closing.close)
            store = closing.enter_context(PagedStore(*paths))
            Progress.parse(store.blob)
            precision: Precision = json.loads(store.manifest)["model"]["paged_model"]["precision"]
            computes, precision = device_of(device, precision, vram, closing)
            how = Settings(
                paths=paths,
                device=computes,
                ram=ram_asked(ram),
                weight_decay=weight_decay,
                betas=betas,
                eps=eps,
                max_grad_norm=max_grad_norm,
                largest=None if largest_step is None else StepSize.of(micro_batches_of(largest_step)),
            )
            source = ModelSource(model, precision, blocks, small)
            _refuse_other_model(source, store.layout, paths[0])
            refuse_other_formats(source.partition, store.layout, paths[0])
            source.take_bound_buffers(json.loads(store.manifest)["model"])
            how.refuse_wrong_decay(store.layout.tensors())
            opened = cls(source, store, how, closing)
            undo.pop_all()
        return opened

    @property
    def step_number(self) -> int:
        """Number of steps made so far; after an error, of those that are in the file."""
        return self._step_number

    @property
    def state(self) -> bytes:
        """The caller's own bytes that were given to that step; empty at step 0."""
        return self._state

    @contextmanager
    def step(self, learning_rate: float) -> Iterator[OptimizerStep]:
        """Make one optimizer step in the context, as a transaction.

        Leaving it ends the step: it is committed, with ``step.state``, while the next one begins. Leaving it by an
        error drops the step, and the error goes on; the loop may go on, too, from where ``step_number`` and ``state``
        say that the model stands: where it stood before, but for failures of the drive.

        Args:
            learning_rate: of this step. It is needed now: updates begin while the gradients of earlier blocks are made.

        Raises:
            ConfigError: the learning rate is no number, negative or not finite.
            MegatrainIoError: another step is under way, or this one was left without ``forward`` and ``backward``.
        """
        self._refuse_in_step("step")
        learning_rate = checked_learning_rate(learning_rate)
        number = self._step_number + 1
        adamw = AdamWStep(number, learning_rate, *self._how.betas, self._how.eps)
        running: PagedPartition | None = None
        under_way = ExitStack()

        def begin(batches: Sequence[MicroBatch]) -> PagedPartition:
            nonlocal running
            self._check_tokens(batches)
            ready = self._make_ready(StepSize.of(batches))
            under_way.enter_context(ready.training_step(batches, adamw, number=number, commits=True))
            running = ready
            return ready

        step = OptimizerStep(number, self._state, begin)
        self._is_in_step = True
        try:
            with under_way:
                yield step
                ended = _whole(step, running)
                progress = Progress(number, self._seed, self._environment, step.state)
                ended.end_step(progress.encode())
        except BaseException:
            self._go_back()
            raise
        finally:
            self._is_in_step = False
        self._step_number, self._state = number, step.state

    def evaluate(self, micro_batches: Sequence[MicroBatchLike] | MicroBatchLike) -> float:
        """Measure the mean loss per trained token, without dropout; nothing is updated.

        Args:
            micro_batches: as ``OptimizerStep.forward`` takes them; any number. As many tokens as the largest step has
                go through the blocks together.

        Raises:
            DataError, DoesNotFitError: as ``OptimizerStep.forward``.
            MegatrainIoError: a step is under way.
        """
        self._refuse_in_step("evaluate")
        batches = [batch for batch in micro_batches_of(micro_batches) if trained_tokens([batch])]
        self._check_tokens(batches)
        largest = StepSize.of_largest(batches)
        together = self._size or largest.times(min(len(batches), _EVALUATED_TOGETHER))
        running = self._make_ready(together.with_room_for(largest))
        parts = [running.evaluate(group) for group in self._groups(batches)]
        if len(parts) == 1:
            return parts[0].loss
        tokens = sum(part.trained_tokens for part in parts)
        return sum(part.loss * part.trained_tokens for part in parts) / tokens

    def read(self, name: str, plane: Plane = "weight") -> Tensor:
        """Read one tensor of the last step that was made, in RAM of its own.

        Args:
            name: of the parameter, as in ``named_parameters()`` of the model.
            plane: ``"weight"`` in the dtype that it computes in; ``"master"``, ``"exp_avg"`` or ``"exp_avg_sq"`` in
                fp32. What is not trained has no moments.

        Raises:
            ConfigError: there is no such parameter or plane.
            MegatrainIoError: a step is under way.
            CorruptionError, StorageError: it cannot be read.
        """
        self._refuse_in_step("read")
        place = next((place for place in self._store.layout.tensors() if place.name == name), None)
        if place is None:
            raise ConfigError(f"the model has no parameter {name!r}: see named_parameters() of the module")
        if plane not in get_args(Plane):
            raise ConfigError(f"plane is {plane!r}: it must be one of {', '.join(get_args(Plane))}")
        if plane.startswith("exp_avg") and not self._store.layout.records[place.record].is_trained:
            raise ConfigError(f"{name} is not trained: it has no {plane}")
        self.wait_durable()
        return self._store.read_tensor(place, plane)

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and weights of each parameter of the last step that was made, read one at a time.

        Args:
            dtype: float32 are the masters; None is the compute dtype.

        Yields:
            ``(name, tensor)`` in the order of the model; parameters that are shared come once.

        Raises:
            ConfigError: another dtype is asked for.
            MegatrainIoError: a step is under way.
            CorruptionError, StorageError: it cannot be read.
        """
        compute = DTYPES[self._source.precision]
        if dtype not in (None, torch.float32, compute):
            dtypes = ", ".join(dict.fromkeys([str(compute), "torch.float32"]))
            raise ConfigError(f"dtype is {dtype}: it must be {dtypes} or None")
        plane: Plane = "weight" if dtype in (None, compute) else "master"
        for place in self._store.layout.tensors():
            yield place.name, self.read(place.name, plane)

    def save(self, out: Path | str, *, dtype: Precision | None = None) -> None:
        """Write the last step that was made as a model folder that stock transformers loads.

        Args:
            out: a folder that does not exist or is empty.
            dtype: ``"bf16"``, or ``"fp32"``: the masters; None = the precision that computes.

        Raises:
            ConfigError: the model was not made from a model folder (``weights`` gives its tensors), or something is in
                the way at ``out``.
            MegatrainIoError: a step is under way.
            NoSpaceError, StorageError, CorruptionError: as ``read``, and of the drive that is written to.
        """
        self._refuse_in_step("save")
        if self._source.folder is None:
            raise ConfigError(
                "save writes the files of a model folder, and this model was made from a module: write what weights() "
                "yields in a form of your own, such as safetensors"
            )
        self.wait_durable()
        with self._source.kept(json.loads(self._store.manifest)["model"]) as kept:
            write_model_folder(self._store, self._source.folder, Path(out), dtype=dtype, kept=kept)

    def wait_durable(self) -> None:
        """Wait until the last step that was made is on the drive, so that it survives a power cut.

        Raises:
            StorageError, StoreFailedError: it could not be made durable.
        """
        self._refuse_in_step("wait_durable")
        if self._running is not None:
            self._running.wait_durable()

    def close(self) -> None:
        """Wait until the last step is durable, and give everything back. A closed model cannot be used.

        Raises:
            StorageError, StoreFailedError: it could not be made durable.
        """
        self._refuse_in_step("close")
        try:
            self.wait_durable()
        finally:
            self._closing.close()
            self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(MegatrainIoError):  # the first error is the news
            self.close()

    # ------------------------------------------------------------------------------------------ inside

    def _make_ready(self, size: StepSize, needs: StepNeeds | None = None) -> PagedPartition:
        """The model, ready for steps of ``size``; RAM is divided anew where it was divided for less.

        Args:
            size: of a step.
            needs: what it needs, if that is known and this is the first time.
        """
        if self._running is not None and self._size is not None and self._size.covers(size):
            return self._running
        wanted = size if self._size is None else self._size.with_room_for(size)
        how, store, partition = self._how, self._store, self._source.partition
        if self._running is not None and how.device.has_own_memory:
            raise DoesNotFitError(
                f"the memory of {how.device.name} was divided for {self._size}, and this needs room for {wanted}: "
                "open the model with largest_step=, the micro-batches of the largest one"
            )
        needs = needs or wanted.needs(partition, store.layout, self._tables)
        ram, vram = wanted.divide(
            partition, store.layout, needs, ram=how.ram, device=how.device, defers=how.defers
        )
        if self._running is not None:
            self._running.wait_durable()
        self._pins.close()
        self._running = None
        running = PagedPartition(
            partition,
            store,
            seed=self._seed,
            activations=activation_budget_of(ram, [*map(activations_file, how.paths)]),
            max_grad_norm=how.max_grad_norm,
            device=how.device,
            vram=vram,
        )
        self._pins.callback(running.close)
        store.start(
            ram.pool,
            residents=ram.residents,
            gradient_files=[*map(gradient_file, how.paths)] if ram.spills_gradients else (),
            settings=how.settings,
            unit=running.unit,
        )
        notes = []
        if not self._pins.enter_context(how.device.pin(store.pool_memory())):
            notes.append(f"copies to and from {how.device.name} go through a small staging buffer")
        if not ram.needs.is_known:
            notes.append("what compute takes is not known before a step is made: it comes on top of ram")
        self.notes += [note for note in notes if note not in self.notes]
        self._running, self._size = running, wanted
        return running

    def _groups(self, batches: Sequence[MicroBatch]) -> Iterator[list[MicroBatch]]:
        """Micro-batches that go through the blocks together, so that RAM is enough for them."""
        room = 0 if self._size is None else self._size.tokens
        group: list[MicroBatch] = []
        for batch in batches:
            if group and sum(each.input_ids.numel() for each in [*group, batch]) > room:
                yield group
                group = []
            group.append(batch)
        yield group

    def _check_tokens(self, batches: Sequence[MicroBatch]) -> None:
        """Refuse what an embedding or a loss would fail on; on a GPU that would end the process.

        Raises:
            DataError: a token or label is not in the vocabulary, or none has a label.
            ConfigError: a row is longer than the model has positions.
        """
        if trained_tokens(batches) == 0:
            raise DataError("no token has a label: there is nothing to train or measure")
        partition, bounds_inputs = self._source.partition, not self._source.is_own_module
        for batch in batches:
            refuse_tokens(batch, partition.vocab_size, bounds_inputs=bounds_inputs)
            if bounds_inputs:
                partition.check_length(batch.input_ids.shape[1])

    def _go_back(self) -> None:
        """After an error: where the store stands."""
        if self._running is not None:
            with suppress(MegatrainIoError):  # the first error is the news
                self._running.wait_durable()
        progress = Progress.parse(self._store.blob)
        self._step_number, self._state = progress.step, progress.state

    def _refuse_in_step(self, call: str) -> None:
        if self._is_in_step:
            raise MegatrainIoError(f"{call} was called while a step is under way: leave the step first")


def _whole(step: OptimizerStep, running: PagedPartition | None) -> PagedPartition:
    """What runs a step that is left.

    Raises:
        MegatrainIoError: a part of it is missing.
    """
    if running is None or step.grad_norm is None:
        raise MegatrainIoError(
            f"step {step.number} was left without {'forward' if running is None else 'backward'}: it was dropped. To "
            "drop one on purpose, leave it by an error of your own"
        )
    return running


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _refuse_other_model(source: ModelSource, layout: ModelLayout, path: Path) -> None:
    """Refuse a model whose parameters are not those of a store.

    Raises:
        ConfigError: the message names the first one that differs.
    """
    stored = {place.name: place.shape for place in layout.tensors()}
    expected = {name: shape for _, tensors in source.parts for name, shape in tensors}
    for name in [*expected, *stored]:
        if stored.get(name) != expected.get(name):
            here, there = (
                "missing" if shape is None else str(list(shape))
                for shape in (expected.get(name), stored.get(name))
            )
            raise ConfigError(
                f"{path} was made of another model: parameter {name} is {here} in the model, {there} in the file. Open "
                "it with the module that it was made of"
            )
