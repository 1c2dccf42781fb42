"""A GGUF file as the model folder that it stands for: configuration and tokenizer are made of its header."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase

from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.files import new_file
from megatrain_io.models.config_limits import refuse_numbers
from megatrain_io.models.gguf_families import SIDE_TENSORS, config_in, sources_of
from megatrain_io.models.gguf_file import GgufFile
from megatrain_io.models.gguf_tokenizer import tokenizer_in
from megatrain_io.models.gguf_weights import GgufWeights
from megatrain_io.models.hub_folder import ModelFolder
from megatrain_io.models.hub_names import HubNames

__all__ = ["GgufFolder", "model_folder"]

_PLAIN = ("F32", "F16", "BF16")


def model_folder(path: Path, *, dequantizes: bool = False) -> ModelFolder:
    """What a path of a model means: a GGUF file, a model folder, or the config.json of one.

    Args:
        path: of the model.
        dequantizes: as ``ModelFolder`` takes it.

    Raises:
        ModelFilesError: there is none, or it is not sound.
        UnsupportedModelError: a GGUF file holds a model that is not read.
        ConfigError: a GGUF file, and the library gguf is not installed.
    """
    if path.suffix.lower() == ".gguf" and not path.is_dir() and os.path.lexists(path):
        return GgufFolder(path)
    return ModelFolder.of(path, dequantizes=dequantizes)


class GgufFolder(ModelFolder):
    """A GGUF file in place of a model folder: whatever is asked of a folder is answered from its header.

    The files of the folder, config.json and those of the tokenizer, are made when they are copied.

    Attributes:
        path: path of the file.
        raw_config: content of the config.json that it stands for.
    """

    def __init__(self, path: Path) -> None:
        """Open a file and read its header.

        Raises:
            ModelFilesError: it is damaged, or not a whole model.
            UnsupportedModelError: its family is not read.
            ConfigError: the library gguf is not installed.
        """
        self.path, self.dequantizes = path, False
        with GgufFile(path) as file:
            _refuse_part(file)
            self._types = Counter(tensor.type for tensor in file.tensors.values())
            self._architecture = str(file.metadata.get("general.architecture"))
            self.raw_config: dict[str, Any] = config_in(file)
            refuse_numbers(self.raw_config, str(path))
            self._tokenizer = tokenizer_in(file, self._architecture, self.raw_config["vocab_size"])
            self._tensors = dict(file.tensors)
        ids = self._tokenizer.special | ({"eos_token_id": ends[0]} if (ends := self._tokenizer.ends) else {})
        self.raw_config |= {name: ids.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    @property
    def notes(self) -> list[str]:
        """See ``ModelFolder.notes``."""
        quantised = [kind for kind in self._types if kind not in _PLAIN]
        found = list(self._tokenizer.notes)
        if quantised:
            kinds = ", ".join(f"{self._types[kind]} {kind}" for kind in sorted(quantised))
            found.append(
                f"{self.path}: {sum(self._types[kind] for kind in quantised)} of {self._types.total()} tensors are "
                f"quantised ({kinds}): what they stand for is a starting point for training, and not the quality of "
                "the original weights"
            )
        return found

    @property
    def quantisation_notes(self) -> list[str]:
        """See ``ModelFolder.quantisation_notes``: a quantised file is read as it is."""
        return []

    @property
    def stands_for(self) -> None:
        """See ``ModelFolder.stands_for``: transformers has every family that is read."""
        return

    def _read_config(self, model_type: object) -> PreTrainedConfig:
        return CONFIG_MAPPING[str(model_type)].from_dict(dict(self.raw_config))

    def open_weights(self) -> GgufWeights:
        """See ``ModelFolder.open_weights``."""
        config = self.config()
        shapes = HubNames(config, torch.float32).file_shapes()
        sources = sources_of(self._architecture, config, shapes)
        with ExitStack() as failing:
            file = failing.enter_context(GgufFile(self.path))
            if file.tensors != self._tensors:
                raise ModelFilesError(f"{self.path} was changed while it was read")
            for name in SIDE_TENSORS:
                file.tensors.pop(name, None)
            weights = GgufWeights(file, sources, shapes)
            failing.pop_all()
        return weights

    def weight_files(self) -> list[Path]:
        """See ``ModelFolder.weight_files``."""
        return [self.path]

    def companions(self) -> list[str]:
        """See ``ModelFolder.companions``."""
        return [*self._tokenizer.files, "generation_config.json"]

    def copy(self, names: Sequence[str], folder: Path) -> None:
        """See ``ModelFolder.copy``."""
        for name in names:
            with new_file(folder / name) as file:
                file.write(self._contents(name))
                file.flush()
                os.fsync(file.fileno())

    def refuse_tokenizer_of_code(self) -> None:
        """See ``ModelFolder.refuse_tokenizer_of_code``: a GGUF file has no code."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See ``ModelFolder.tokenizer``."""
        # As it is read after the import: of files.
        with TemporaryDirectory(prefix="megatrain-io-") as folder:
            self.copy(["config.json", *self.companions()], Path(folder))
            return ModelFolder(Path(folder)).tokenizer()

    def _contents(self, name: str) -> bytes:
        if name == "config.json":
            return _json(self.raw_config)
        if name == "generation_config.json":
            ends = self._tokenizer.ends
            special = {key: value for key, value in self._tokenizer.special.items() if key != "unk_token_id"}
            return _json({**special, "eos_token_id": ends[0] if len(ends) == 1 else ends or None})
        return self._tokenizer.files[name]


def _refuse_part(file: GgufFile) -> None:
    """Refuse a file that is not a whole language model."""
    count = file.metadata.get("split.count", 1)
    if type(count) is int and count > 1:
        raise UnsupportedModelError(
            f"{file.path} is one of {count} files of a model: put them together with llama.cpp (llama-gguf-split "
            "--merge FIRST OUT.gguf), and import that"
        )
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(
            f"{file.path} holds no model but something that belongs to one ({str(kind)[:40]}): give the file of the "
            "model itself"
        )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
