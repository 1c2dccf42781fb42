"""Training from Python: a run from its configuration to exported weights."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from megatrain_io.config.parse import load
from megatrain_io.config.schema import RunConfig
from megatrain_io.errors import ConfigError, InterruptedRunError
from megatrain_io.generate import Generator
from megatrain_io.interrupt import held, is_requested, stop_signals
from megatrain_io.paging.device.base import Device
from megatrain_io.planning.plan import Plan
from megatrain_io.planning.resolve import resolve_device
from megatrain_io.runs.export_model import export_model
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.metrics import TrainResult
from megatrain_io.training.callbacks import Callback
from megatrain_io.training.loop import TrainingRun, held_out_loss
from megatrain_io.training.setup import planned, ready
from megatrain_io.training.step_data import OwnData, sequence_of

__all__ = ["Trainer", "train"]


class Trainer:
    """A run: trained, evaluated, asked and exported from Python, with the bits of the command line.

    Every step is durable before the next one writes anything, so an end at any moment loses one step at most
    (``memory.commit_every`` steps; one more with ``train.max_grad_norm``); with ``memory.durability`` scratch it loses
    the run. Random numbers and the order of the data follow from seed and step alone: a resumed run has the bits of one
    that was never stopped. The store is open only while a method runs (after ``generate`` until the next one, or
    ``close``), so between two calls the command line may look at the run, too. One call at a time in a process. What
    an error message calls ``--resume`` is ``train(resume=True)`` here.

    ::

        with mt.Trainer("my.yaml", callbacks=[mt.reporter()]) as trainer:
            print(trainer.plan())
            trainer.train()
            print(trainer.generate("The quick brown"))
            trainer.export("./trained")

    Args:
        config: a YAML file, its keys as a mapping (``{"model": "./model", "train": {"max_steps": 20}}``), or what
            ``load_config`` returned. All keys: ``megatrain-io train --keys``.
        device: what computes, which the caller closes; None = what ``train.device`` says.
        callbacks: told of the training, after metrics file and plan check, before the wear limit; see ``Callback``.
        data: rows, each a mapping as in a line of a JSON lines file (``{"text": ...}``, ``{"messages": [...]}``), or
            ``MicroBatch`` objects, trained in their order, ``train.gradient_accumulation_steps`` a step. With it
            ``data.train`` need not be given. What has a length and gives its entries by number is asked for each when
            it is needed, anything else is read into a list. A run is resumed with the same data; rows are kept in the
            run folder, so that the command line can go on with it, too. None = the files of ``data.train``.

    Attributes:
        config: the configuration, as it was given.
        folder: paths of the run.

    Raises:
        ConfigError: the configuration cannot be used; the message names every problem.
        UnsupportedError: a GPU was asked for, and torch finds none.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | Path | str,
        *,
        device: Device | None = None,
        callbacks: Sequence[Callback] = (),
        data: OwnData | None = None,
    ) -> None:
        self._notes: list[str] = []
        if not isinstance(config, RunConfig):
            source = Path(config) if isinstance(config, str) else config
            without_files = {("data", "train"): ["."]} if data is not None else None
            config, self._notes = load(source, defaults=without_files)
        _refuse_no_device(device)
        _refuse_no_callbacks(callbacks)
        self.folder = RunFolder(Path(config.output_dir))
        self.config: RunConfig = config
        self._handed_in = device
        self._callbacks = tuple(callbacks)
        # Asked for more than once: to plan, to train, to evaluate.
        self._data = None if data is None else sequence_of(data)
        self._generator: Generator | None = None
        self._asking = ExitStack()
        with self._device():
            pass  # what cannot compute here is refused now

    def plan(self) -> Plan:
        """Plan the run on this machine: its files are checked and its data tokenised, and nothing is imported.

        Returns:
            The plan. What does not fit is no error, but one of its ``problems``.

        Raises:
            MegatrainIoError: model, data or configuration cannot be used.
        """
        self._close_generator()
        with self._device() as device:
            return planned(self.config, self.folder, device, self._data)

    def train(self, *, resume: bool = False) -> TrainResult:
        """Train all steps that are left, importing the model first if the run has no store yet.

        In the main thread Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end the training politely while it lasts: the step
        under way ends, and all steps are committed. Handlers of your own and signals that are ignored stay as they
        are; call ``run.stop()`` from a callback then. A second signal does what it did before.

        Args:
            resume: go on with a run that has begun; without it such a run is refused.

        Returns:
            Losses, time, traffic and memory of this start.

        Raises:
            InterruptedRunError: Ctrl-C, SIGTERM, SIGHUP or SIGUSR1; the run can be resumed.
            WearLimitError: one more step could write more than ``memory.max_tbw``; the run can be resumed.
            MegatrainIoError: one of its kinds, as its message says.
        """
        started = time.monotonic()
        self._close_generator()
        # Held: an end in the middle of a step would cost it, and a scratch store as a whole.
        with stop_signals(), held():
            try:
                with (
                    self._device() as device,
                    ready(self.config, self.folder, device, self._data, resume=resume) as setup,
                ):
                    setup.notes[:0] = self._notes
                    return TrainingRun(setup, self._callbacks, started).train()
            except KeyboardInterrupt as stop:
                if not is_requested():
                    raise
                again = "the run is as it was: give the same command again"
                if not self.folder.is_imported:
                    again = "nothing was imported: start again, without --resume"
                raise InterruptedRunError(f"interrupted by {stop} before the first step; {again}") from None

    def evaluate(self) -> float:
        """Mean loss per trained token of what ``data.eval`` holds out, with the newest committed weights.

        A model that was not imported yet is imported.

        Raises:
            ConfigError: nothing is held out.
            MegatrainIoError: one of its kinds, as its message says.
        """
        self._close_generator()
        with (
            self._device() as device,
            ready(self.config, self.folder, device, self._data, resume=None) as setup,
        ):
            loss = held_out_loss(setup.model, setup.data, setup.job.accumulation)
        if loss is None:
            raise ConfigError("there is nothing to evaluate: give data.eval")
        return loss

    def generate(
        self,
        prompt: str | Sequence[dict[str, str]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str:
        """Continue a text, or answer messages, with the newest committed weights.

        Args:
            prompt: a text to continue, or turns of a conversation, each with ``role`` and ``content``.
            max_new_tokens: most tokens to generate.
            temperature: 0 takes the likeliest token.
            top_p: sample from the likeliest tokens that together have this probability; 1 = all.
            top_k: sample from so many of the likeliest tokens; 0 = all.
            seed: of the sampling.

        Raises:
            ConfigError: the model was not imported yet, or an argument is out of its range.
        """
        if self._generator is None:
            device = self._asking.enter_context(self._device())
            opened = Generator.open(self.folder.path, self.config.memory.io_backend, device)
            self._generator = self._asking.enter_context(opened)
        how = (max_new_tokens, temperature, top_p, top_k, seed)
        if isinstance(prompt, str):
            return self._generator.complete(prompt, *how)
        return self._generator.chat(prompt, *how)

    def export(self, out: Path | str, *, dtype: Literal["bf16", "fp32"] | None = None) -> Path:
        """Write the newest committed weights as a model folder, which transformers loads.

        Args:
            out: folder to create.
            dtype: fp32 are the master weights; None = what the run computes in.

        Returns:
            The folder.

        Raises:
            ConfigError: the model was not imported yet, or the folder is there already.
            NoSpaceError, StorageError: the drive of the folder.
        """
        self._close_generator()
        export_model(self.folder, Path(out), dtype=dtype)
        return Path(out)

    def close(self) -> None:
        """Close what ``generate`` keeps open. A device that was handed in stays open."""
        self._close_generator()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _device(self) -> Iterator[Device]:
        """The device that was handed in, or one for the context alone."""
        if self._handed_in is not None:
            yield self._handed_in
            return
        with closing(resolve_device(self.config.train.device, self.config.memory.vram)) as device:
            yield device

    def _close_generator(self) -> None:
        self._generator = None
        self._asking.close()


def _refuse_no_device(device: object) -> None:
    if device is not None and not (hasattr(device, "torch_device") and hasattr(device, "has_own_memory")):
        raise ConfigError(
            f"device is {device!r}: give a megatrain_io.Device, or leave it out and set train.device (cpu or cuda)"
        )


def _refuse_no_callbacks(callbacks: object) -> None:
    if not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks is {callbacks!r}: give a list of callbacks, which may be empty")
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks holds {callback!r}: give objects of classes that are derived from megatrain_io.Callback"
            )


def train(
    config: RunConfig | Mapping[str, Any] | Path | str,
    *,
    resume: bool = False,
    device: Device | None = None,
    callbacks: Sequence[Callback] = (),
    data: OwnData | None = None,
) -> TrainResult:
    """Train a run to its last step; the arguments are those of ``Trainer`` and ``Trainer.train``.

    Raises:
        MegatrainIoError: one of its kinds, as its message says.
    """
    with Trainer(config, device=device, callbacks=callbacks, data=data) as trainer:
        return trainer.train(resume=resume)
