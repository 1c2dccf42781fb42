"""Generating text from a paged model: every token reads all weights once, and only a few blocks are in RAM."""

import logging
from collections.abc import Generator as Yields
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatrain_io.arguments import is_number, number, whole_number
from megatrain_io.config.values import INT_MAX, SEED_MAX
from megatrain_io.data.batch import MicroBatch
from megatrain_io.data.chat_templates import ChatRenderer, TemplateError
from megatrain_io.data.prepare import asked_in_training
from megatrain_io.data.special_tokens import SpecialTokens
from megatrain_io.data.tokenize import Asking
from megatrain_io.errors import ConfigError, DataError, DoesNotFitError
from megatrain_io.interrupt import check, held
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.model_options import ModelOptions
from megatrain_io.models.own_code import allow
from megatrain_io.models.partition import PartitionedModel
from megatrain_io.paging.device.base import Device, out_of_memory
from megatrain_io.paging.device.choose import best_device
from megatrain_io.paging.device.pool import CONTEXT_NBYTES
from megatrain_io.paging.device.records import DeviceRecords
from megatrain_io.paging.device.vram_budget import divide_vram
from megatrain_io.paging.gradient import StopWeights
from megatrain_io.paging.paged_model import PagedPartition, clear_frames
from megatrain_io.runs.folder import RunFolder
from megatrain_io.runs.kept_tensors import kept_buffers
from megatrain_io.runs.model_files import mended_model
from megatrain_io.runs.open_store import open_store
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.dtypes import DTYPES
from megatrain_io.store.layout import Precision
from megatrain_io.store.paged_store import Engine, PagedStore

# Bytes of a device for compute: tensors of a block on a prompt, keys and values.
_COMPUTE_NBYTES = 512 << 20
_LOG = logging.getLogger("megatrain_io")

__all__ = ["Generator", "next_tokens"]


def next_tokens(
    model: PagedPartition, prompt: Tensor, pick: "Pick", stop: frozenset[int]
) -> Yields[int, None, None]:
    """Yield the tokens that follow ``prompt``, int64 [1, T], until one of ``stop`` (not yielded).

    Keys and values, or states, are kept in a cache, so each token goes through the model once; where the architecture
    takes no such cache, the whole text goes through it for each.
    """
    model.partition.train(False)
    cache = model.partition.new_cache()
    # The embedding and the first blocks of the next pass are read while this token is chosen.
    records = model.begin_forward()
    try:
        tokens, new = prompt, prompt
        while True:
            with torch.no_grad(), model.device.computing():
                scores = _pass(model, records, tokens if cache is None else new, cache, tokens.shape[1])
            model.end_forward()
            token = pick(tokens, scores.cpu())
            if token in stop:
                return
            new = torch.tensor([[token]])
            tokens = torch.cat([tokens, new], dim=1)
            records = model.begin_forward()
            yield token
    except BaseException as error:
        # Tensors in the frames of the failed pass would keep their buffers from the next one.
        clear_frames(error)
        if (full := out_of_memory(model.device, error)) is not None:
            raise full from error
        raise
    finally:
        model.abort()


def _pass(
    model: PagedPartition, records: PagedStore | DeviceRecords, new: Tensor, cache: Cache | None, end: int
) -> Tensor:
    """Scores [1, V] of the token after ``new``, int64 [1, t], the last ones of a text of ``end`` tokens."""
    partition, layout = model.partition, model.state.layout
    positions = torch.arange(end - new.shape[1], end).unsqueeze(0)
    micro_batch = MicroBatch(input_ids=new, shift_labels=torch.full_like(new, -100), position_ids=positions)
    micro_batch = micro_batch.to(model.device.torch_device)
    weights = StopWeights(records, layout.embedding)
    hidden, calls = partition.record(partition.as_trained(weights.tensors), micro_batch, cache=cache)
    weights.give_back()
    for block in range(layout.blocks):
        check()
        weights = StopWeights(records, layout.block(block))
        hidden = partition.run_block(block, partition.as_trained(weights.tensors), hidden, calls[block])
        weights.give_back()
    borrowed = [] if layout.head is None else [StopWeights(records, layout.head)]
    if partition.tied_parameters:
        borrowed.append(StopWeights(records, layout.embedding))
    bound = {
        name: tensor for weights in borrowed for name, tensor in partition.as_trained(weights.tensors).items()
    }
    scores = partition.logits(bound, partition.tokens_of(hidden, slice(-1, None)))[:, -1].float()
    bound.clear()
    for weights in borrowed:
        weights.give_back()
    return scores


class Pick:
    """Picks the next token: the likeliest, or a sample.

    Args:
        temperature: 0 takes the likeliest.
        top_p: sample from the likeliest tokens that together have this probability; 1 = all.
        top_k: sample from so many of the likeliest tokens; 0 = all.
        seed: of the sampling.

    Raises:
        ConfigError: one of them is out of its range.
    """

    def __init__(
        self, *, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0
    ) -> None:
        temperature = number("temperature", temperature)
        if not (is_number(top_p) and 0 < top_p <= 1):
            raise ConfigError(f"top_p is {top_p!r}: it must be a number above 0, at most 1")
        top_k = whole_number("top_k", top_k, 0, INT_MAX)
        self._greedy = temperature == 0
        self._random = torch.Generator().manual_seed(whole_number("seed", seed, 0, SEED_MAX))
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(temperature))
            if top_k:
                self._warpers.append(TopKLogitsWarper(top_k))
            if top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(top_p)))

    def __call__(self, tokens: Tensor, scores: Tensor) -> int:
        """The token after ``tokens`` [1, T] by ``scores`` [1, V]."""
        if self._greedy:
            return int(scores.argmax())
        probabilities = self._warpers(
            cast("torch.LongTensor", tokens), cast("torch.FloatTensor", scores)
        ).softmax(dim=-1)
        return int(torch.multinomial(probabilities[0], 1, generator=self._random))


class Generator:
    """A trained (or imported) run that completes text and answers messages."""

    def __init__(
        self,
        model: PagedPartition,
        tokenizer: PreTrainedTokenizerBase,
        stop: frozenset[int],
        *,
        owns_device: bool = True,
        asked: Mapping[Asking, int] | None = None,
    ) -> None:
        self._model = model
        self._owns_device = owns_device
        self._tokenizer = tokenizer
        self._stop = stop
        self._asked = asked or {}
        self._pins = ExitStack()
        if model.device.has_own_memory:
            self._pins.enter_context(model.device.pin(model.state.pool_memory()))

    @classmethod
    def open(
        cls,
        run_dir: Path,
        engine: Engine = "auto",
        device: Device | None = None,
        *,
        modules: Path | None = None,
    ) -> Self:
        """Open a run folder with the newest committed weights.

        Args:
            run_dir: folder of a run that was trained or imported.
            engine: I/O engine: ``auto``, ``uring`` or ``threads``.
            device: what computes, which the caller closes; None = a GPU if there is one with room for a block, else the
                CPU.
            modules: where the file of ``model_options.modules`` is now, which may run then; None = where it was at the
                import.

        Raises:
            ConfigError: this is no run folder, or its model needs code that may not run.
            StoreInUseError, FormatError, CorruptionError, UnsupportedError, StorageError: its store cannot be opened.
        """
        run = RunFolder(Path(run_dir))
        info = run.read()
        state = open_store(run, engine=engine)
        try:
            options = ModelOptions.kept(info.model_options)
            if modules is not None:
                allow(modules)
            options.run_modules(run.path, Path(info.source), at=modules)
            for note in mended_model(run):
                _LOG.warning("note: %s", note)
            folder = ModelFolder(run.model, dequantizes=bool(options.dequantize))
            config, tokenizer = folder.config(), folder.tokenizer()
            partition = options.partition(config, DTYPES[info.precision])
            partition.set_buffers(kept_buffers(run))
            model = _on_device(partition, state, device, info.precision)
            state.start(model.pool_sizes(training=False), unit=model.unit)
            stop = _stop_tokens(run.model, folder.published_config(), tokenizer).union(
                TrainerState.stop_tokens_of(state.blob)
            )
            asked = asked_in_training(run.data)
            return cls(model, tokenizer, stop, owns_device=device is None, asked=asked)
        except BaseException:
            state.close()
            raise

    def asking_note(self, prompt: str, *, chat: bool) -> str | None:
        """A sentence where a prompt is asked otherwise than the run was trained; None where it is not, or not known.

        Args:
            prompt: what is asked.
            chat: whether it is asked in the chat template.
        """
        chats, prompts, headings = (self._asked.get(how, 0) for how in ("chat", "prompt", "headings"))
        if chat and not chats and prompts:
            return (
                "this run was trained on prompts as they stand, without the chat template: leave --chat out"
            )
        if not chat and chats and not prompts and not headings and not self._asked.get("text"):
            return "this run was trained on answers in the chat template: ask with --chat"
        if not chat and headings and not prompts and "### Response:" not in prompt:
            return (
                "this run was trained on instructions under headings: ask with '### Instruction:', a new line, the "
                "instruction, an empty line, '### Response:' and a new line"
            )
        return None

    def complete(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str:
        """Continue a text.

        Args:
            prompt: the text, at least one token.
            max_new_tokens: most tokens to generate.
            temperature: 0 takes the likeliest token.
            top_p: sample from the likeliest tokens that together have this probability; 1 = all.
            top_k: sample from so many of the likeliest tokens; 0 = all.
            seed: of the sampling.

        Returns:
            What follows the prompt, without the prompt itself.

        Raises:
            ConfigError: an argument is of another kind or out of its range, or the tokenizer does not belong to the
                model.
            DataError: the prompt is empty.
        """
        pick = Pick(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt is {prompt!r}: it must be text (chat answers messages)")
        ids = SpecialTokens(self._tokenizer).prompt(prompt)
        return self._run(torch.tensor([ids], dtype=torch.int64), max_new_tokens, pick)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> str:
        """Answer a conversation, rendered by the model's chat template.

        Args:
            messages: turns, one at least, each with ``role`` and ``content``, both text.
            max_new_tokens: most tokens to generate.
            temperature: 0 takes the likeliest token.
            top_p: sample from the likeliest tokens that together have this probability; 1 = all.
            top_k: sample from so many of the likeliest tokens; 0 = all.
            seed: of the sampling.

        Returns:
            The assistant's answer.

        Raises:
            ConfigError: an argument is of another kind or out of its range, or the model has no chat template.
            DataError: the chat template refuses the messages.
        """
        pick = Pick(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                "this model has no chat template: ask for a completion, or train on messages first"
            )
        _refuse_wrong_messages(messages)
        turns = [dict(message) for message in messages]
        try:
            with ChatRenderer(self._tokenizer, fixed_day=False) as renderer:
                (text,) = renderer.render(turns, None, [(len(turns), True)])
        except TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {error.reason}") from error
        ids = SpecialTokens(self._tokenizer).ids([text])
        return self._run(torch.tensor(ids, dtype=torch.int64), max_new_tokens, pick)

    def close(self) -> None:
        """Close the store, and the device if it was not handed in; the generator cannot be used afterwards."""
        self._pins.close()
        self._model.state.close()
        if self._owns_device:
            self._model.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, ids: Tensor, max_new_tokens: int, pick: Pick) -> str:
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1, INT_MAX)
        if ids.numel() == 0:
            raise DataError("the prompt is empty: give it at least one token")
        largest, vocabulary = int(ids.max()), self._model.partition.config.get_text_config().vocab_size
        if largest >= vocabulary:
            raise ConfigError(
                f"the tokenizer makes token {largest}, and the model's vocabulary has {vocabulary}: tokenizer and "
                "model do not belong together"
            )
        self._refuse_longer(ids.shape[1], max_new_tokens)
        with held(), closing(next_tokens(self._model, ids, pick, self._stop)) as following:
            tokens = list(islice(following, max_new_tokens))
        return cast("str", self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _refuse_longer(self, length: int, new: int) -> None:
        """Refuse a text that ends beyond the positions of the model.

        Raises:
            ConfigError: the message has the numbers.
        """
        positions = self._model.partition.spec.positions
        count = None if positions is None else positions.of(self._model.partition.config)
        # The last token is not passed through the model.
        if positions is None or count is None or not positions.is_bound or length + new - 1 <= count:
            return
        what = f"the prompt has {length} tokens, and the model {count} positions ({positions.name} in config.json)"
        if length > count:
            raise ConfigError(f"{what}: shorten the prompt to {count} tokens or less")
        raise ConfigError(f"{what}: max_new_tokens is {new}, and may be {count - length + 1}")


def _refuse_wrong_messages(messages: Any) -> None:
    """Refuse what is no conversation.

    Raises:
        ConfigError: the message says which turn is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ConfigError(
            f"messages is {messages!r}: it must be a list of turns, one at least (complete continues text)"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ConfigError(
                f"messages[{index}] is {message!r}: it must be a mapping with role and content, both text"
            )


def _on_device(
    partition: PartitionedModel, state: PagedStore, handed_in: Device | None, precision: Precision
) -> PagedPartition:
    """A model that only passes forward; on the CPU, if the device has no room for a block."""
    device = handed_in or best_device(precision)
    if device.has_own_memory:
        with suppress(DoesNotFitError):
            vram = divide_vram(
                state.layout,
                tied_embeddings=bool(partition.tied_parameters),
                vram=device.vram,
                context=CONTEXT_NBYTES,
                compute=_COMPUTE_NBYTES,
                activations_per_block=0,
                training=False,
            )
            return PagedPartition(partition, state, device=device, vram=vram)
        if device is not handed_in:
            device.close()
        partition.to(torch.device("cpu"))
    return PagedPartition(partition, state)


def _stop_tokens(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The model's own end-of-text tokens; a tokenizer's may be wrong (converted models)."""
    named = getattr(config, "eos_token_id", None)
    if named is None:
        named = getattr(config.get_text_config(), "eos_token_id", None)
    if (folder / "generation_config.json").exists():
        own = GenerationConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        ).eos_token_id
        named = named if own is None else own
    if named is None:
        named = tokenizer.eos_token_id
    if named is None:
        return frozenset()
    return frozenset(named if isinstance(named, list) else [named])
