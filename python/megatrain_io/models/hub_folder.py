"""A model folder as the Hugging Face hub lays it out: what is in it, and what is wrong with it.

Everything is checked before a byte of weights is read. Names come from an allow-list or are checked, links may
not lead out of the folder, no code is run, nothing is unpickled and nothing is fetched.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatrain_io.errors import ModelFilesError, UnsupportedModelError
from megatrain_io.files import UnfitFileError, new_file, open_file, read_file
from megatrain_io.models.companions import COMPANIONS
from megatrain_io.models.config_limits import refuse_numbers
from megatrain_io.models.dequantized import can_dequantize
from megatrain_io.models.safetensors import Checkpoint
from megatrain_io.models.text_model import text_config_of
from megatrain_io.models.weight_file import GIT_LFS, refuse_git_lfs
from megatrain_io.models.weights import StoredWeights

__all__ = ["ModelFolder"]

_CONFIG = "config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_SMALL_JSON = {
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(
        "chat_template.json",
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    ),
}
"""Of these the libraries that read them expect a JSON object, and have no sentence for anything else."""

_NO_SETTINGS = {
    "architectures",
    "auto_map",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "rope_theta",
}
_NO_SETTINGS |= {"rope_scaling", "quantization_config", "compression_config"}
_ORIGINAL = (
    "If its makers published no such weights, the hub lists conversions at the model's page under Finetunes and "
    "Quantizations, their names mostly with BF16"
)
_DEQUANTIZE = "import --dequantize (model_options.dequantize=true) trains the numbers that they stand for"
_PLAIN_CODE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.py")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_JSON_BYTES_MAX = 64 << 20


class ModelFolder:
    """A folder with config.json, weights in safetensors and a tokeniser.

    Attributes:
        path: path of the folder.
        raw_config: content of config.json; numbers that JSON does not have are marked as transformers does.
        dequantizes: whether weights in fp8 are read as the numbers that they stand for.
    """

    def __init__(self, path: Path, *, dequantizes: bool = False) -> None:
        """Open a folder and read its config.json.

        Raises:
            ModelFilesError: it is missing, is a file, or has no sound config.json.
        """
        self.path, self.dequantizes = path, dequantizes
        if not path.exists():
            raise ModelFilesError(
                f"{path} does not exist. Give a folder with config.json and model.safetensors; a model of the hub "
                f"is fetched beforehand: hf download {_hub_name(path)} --local-dir DIR"
            )
        if not path.is_dir():
            raise ModelFilesError(f"{path} is a file: give the folder that holds config.json and the weights")
        if not os.path.lexists(path / _CONFIG):
            if found := sorted(path.glob("*.gguf")):
                self._refuse_gguf(found[0])
            if (path / "adapter_config.json").exists():
                raise ModelFilesError(
                    f"{path} holds an adapter, not a model: merge it into its base model (peft: merge_and_unload, "
                    "save_pretrained) and import that"
                )
            raise ModelFilesError(f"{path} has no config.json: it is not a model folder, or not all of one")
        self.raw_config = self._read_json(_CONFIG)

    @classmethod
    def of(cls, path: Path, *, dequantizes: bool = False) -> "ModelFolder":
        """The folder that is meant by its path, or by that of its config.json."""
        return cls(path.parent if path.name == _CONFIG else path, dequantizes=dequantizes)

    def open_weights(self) -> StoredWeights:
        """The tensors of the weight files, which the caller closes.

        Raises:
            ModelFilesError: files are missing, damaged, or not sound.
        """
        return Checkpoint(self.weight_files())

    def weight_files(self) -> list[Path]:
        """Paths of the safetensors files, links resolved; all of them are there.

        Raises:
            ModelFilesError: there are none, some are missing, or the index is not sound.
        """
        if os.path.lexists(self.path / _WEIGHTS):
            return [self._inside(_WEIGHTS)]
        if os.path.lexists(self.path / _INDEX):
            return self._shards()
        if found := sorted(self.path.glob("model-*-of-*.safetensors")):
            raise ModelFilesError(f"{self.path} has {found[0].name} but no {_INDEX}: fetch it too")
        pickles = sorted(path for pattern in _PICKLES for path in self.path.glob(pattern))
        if pickles:
            raise ModelFilesError(
                f"{self.path} has its weights as pickle only ({pickles[0].name}), which is not read, because a pickle "
                "can run any program. Convert it once, if you trust it, with transformers: "
                f"AutoModelForCausalLM.from_pretrained({str(self.path)!r}).save_pretrained(OUT), and the tokenizer "
                "likewise; then import OUT"
            )
        if found := sorted(self.path.glob("*.gguf")):
            self._refuse_gguf(found[0])
        raise ModelFilesError(f"{self.path} has config.json but no weights: {_WEIGHTS} is missing")

    def indexed(self) -> set[str]:
        """Names of the tensors that the index of the weight files has; none where there is one file and no index."""
        if os.path.lexists(self.path / _WEIGHTS) or not os.path.lexists(self.path / _INDEX):
            return set()
        places = self._read_json(_INDEX).get("weight_map")
        return {*places} if isinstance(places, dict) else set()

    @cached_property
    def stands_for(self) -> type[PreTrainedConfig] | None:
        """The configuration class of transformers that the folder is read by, where its model type is none of these.

        That is the one of the causal language model that ``architectures`` names: a model that is another one's in all
        but its model type needs no code of its own. None where the model type says it.
        """
        names = self.raw_config.get("architectures")
        name = names[0] if isinstance(names, list) and names else None
        own = self.raw_config.get("model_type")
        if (isinstance(own, str) and own in CONFIG_MAPPING) or not isinstance(name, str):
            return None
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return None
        found: type[PreTrainedConfig] | None = getattr(
            getattr(transformers, name, None), "config_class", None
        )
        return found

    @property
    def notes(self) -> list[str]:
        """Sentences for the person on how config.json was understood."""
        if self.stands_for is None:
            return []
        known = self.stands_for().to_dict().keys() | _NO_SETTINGS
        others = ", ".join(sorted(name for name in self.raw_config if name not in known))
        own, named = self.raw_config.get("model_type"), self.raw_config["architectures"][0]
        says = f"; it has no setting for {others}" if others else ""
        note = (
            f"{self.path / _CONFIG}: transformers has no model_type {own!r}, and code that comes with a model is not "
            f"run: it is read as the {named} that it names, the class of transformers{says}"
        )
        return [note]

    @property
    def quantisation_notes(self) -> list[str]:
        """What must be done before the weights are trained, if config.json says that they are quantised."""
        return [
            f"the weights of this config.json are quantised ({_quantisation_text(marks)}): this is the plan of the "
            f"original model. {_DEQUANTIZE if can_dequantize(marks) else _ORIGINAL}"
            for marks in _quantisations(self.raw_config)
        ][:1]

    def config(self, *, needs_weights: bool = True) -> PreTrainedConfig:
        """The configuration of what is trained: where the model is one of several kinds of input, of its text model.

        Args:
            needs_weights: as ``published_config``.

        Raises:
            ModelFilesError, UnsupportedModelError: as ``published_config``.
        """
        published = self.published_config(needs_weights=needs_weights)
        if (text := text_config_of(published)) is not None:
            return text
        inside = getattr(published, "text_config", None)
        if isinstance(inside, PreTrainedConfig) and type(published) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedModelError(
                f"{self.path / _CONFIG}: {published.model_type} takes more than text, and no causal language model of "
                f"transformers is known here to compute what its text model alone ({inside.model_type}) does: choose "
                "another model"
            )
        return published

    def published_config(self, *, needs_weights: bool = True) -> PreTrainedConfig:
        """The configuration, by transformers' own class for its model type.

        Args:
            needs_weights: refuse a folder whose weights are quantised; else it is read as that of the original model.

        Raises:
            ModelFilesError: a number in it is one that no model has.
            UnsupportedModelError: the weights are quantised, or transformers does not know the model.
        """
        if needs_weights:
            self._refuse_quantised()
        refuse_numbers(self.raw_config, str(self.path / _CONFIG))
        model_type = self.raw_config.get("model_type")
        try:
            config = self._read_config(model_type)
        except Exception as cause:
            if code := _named_code(self.raw_config):
                why = (
                    "choose a model that transformers itself has, or one whose architectures names a causal language "
                    "model of transformers that computes the same"
                    if self.stands_for is None
                    else f"and the {self.stands_for.__name__} of transformers does not take this one: "
                    f"{' '.join(str(cause).split())}"
                )
                raise UnsupportedModelError(
                    f"{self.path / _CONFIG} names code of its own ({code}) for model_type {model_type!r}, and code "
                    f"that comes with a model is not run: {why}"
                ) from cause
            reason = " ".join(str(cause).partition("\n\n")[0].split())
            raise UnsupportedModelError(
                f"{self.path / _CONFIG}: model_type {model_type!r} cannot be used: {reason}"
            ) from cause
        # These may name code that transformers would fetch from the hub and run.
        config._attn_implementation = None  # noqa: SLF001
        config._experts_implementation = None  # noqa: SLF001
        return config

    def _read_config(self, model_type: object) -> PreTrainedConfig:
        """The configuration as transformers reads it; where its weights are quantised, that of the original model."""
        quantised = any(_quantisations(self.raw_config))
        if self.stands_for is None and not quantised:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
            return config
        content, _ = PreTrainedConfig.get_config_dict(self.path, local_files_only=True)
        content = _without(content, ("quantization_config", "compression_config", "auto_map"))
        if self.stands_for is None and str(model_type) not in CONFIG_MAPPING:
            raise ValueError(
                f"transformers {transformers.__version__} has no such model; a newer one may have it"
            )
        config_class = self.stands_for or CONFIG_MAPPING[str(model_type)]
        return config_class.from_dict({**content, "model_type": config_class.model_type})

    def refuse_tokenizer_of_code(self) -> None:
        """Refuse a tokenizer that names code of its own and does without none.

        Raises:
            UnsupportedModelError: no text could be trained or asked with this folder.
            ModelFilesError: its files are damaged.
        """
        if self._tokenizer_code():
            self.tokenizer()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, by transformers' own classes.

        Raises:
            ModelFilesError: there is none, or its files are damaged.
            UnsupportedModelError: it would run code that comes with the model.
        """
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except OSError as cause:
            raise ModelFilesError(f"{self.path}: {cause}") from cause
        except Exception as cause:
            if code := self._tokenizer_code():
                raise UnsupportedModelError(
                    f"{self.path / _TOKENIZER_CONFIG} names code of its own ({code}), and code that comes with a model "
                    "is not run. If tokenizer.json holds the whole tokenizer, remove auto_map and tokenizer_class from "
                    "it; else choose a model whose tokenizer transformers itself has"
                ) from cause
            reason = " ".join(str(cause).partition("\n\n")[0].split())
            raise UnsupportedModelError(f"{self.path}: its tokenizer cannot be used: {reason}") from cause
        return tokenizer

    def _tokenizer_code(self) -> str:
        """What the tokenizer's configuration names of code of its own; empty where it names none."""
        try:
            return _named_code(self._read_json(_TOKENIZER_CONFIG))
        except ModelFilesError:
            return ""

    def companions(self) -> list[str]:
        """Names of the tokeniser's and other files that go with the model.

        Raises:
            ModelFilesError: one is a Git-LFS pointer, leads out of the folder, or holds no JSON object where it should.
        """
        names = [name for name in COMPANIONS if os.path.lexists(self.path / name)]
        if self.stands_for is not None:
            names += self._code()
        for name in names:
            path = self._inside(name)
            with open_file(path) as file:
                refuse_git_lfs(self.path / name, file.read(len(GIT_LFS)), path.stat().st_size)
            if name in _SMALL_JSON:
                self._read_json(name)
        return names

    def _code(self) -> list[str]:
        """Names of the folder's files of code: none is run, and whoever trusts them needs them beside config.json."""
        return sorted(path.name for path in self.path.glob("*.py") if _PLAIN_CODE.fullmatch(path.name))

    def copy(self, names: Sequence[str], folder: Path) -> None:
        """Copy files of this folder into another one, durably."""
        for name in names:
            with open_file(self._inside(name)) as source, new_file(folder / name) as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())

    def _shards(self) -> list[Path]:
        places = self._read_json(_INDEX).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ModelFilesError(f"{self.path / _INDEX} has no weight_map: fetch it again")
        for name in places.values():
            plain = isinstance(name, str) and name == os.path.basename(name) and "\\" not in name  # noqa: PTH119
            if not plain or not name.endswith(".safetensors") or "\0" in name:
                raise ModelFilesError(
                    f"{self.path / _INDEX} names {name!r}: only names of safetensors files in the same folder are "
                    "followed"
                )
        names = sorted(set(places.values()))
        missing = [(number, name) for number, name in enumerate(names, 1) if not (self.path / name).exists()]
        if len(missing) == 1:
            number, name = missing[0]
            raise ModelFilesError(
                f"{self.path}: shard {number} of {len(names)} is missing ({name}): fetch it"
            )
        if missing:
            shown = ", ".join(name for _, name in missing[:3]) + (", ..." if len(missing) > 3 else "")  # noqa: PLR2004
            raise ModelFilesError(f"{self.path}: {len(missing)} of {len(names)} shards are missing ({shown})")
        return [self._inside(name) for name in names]

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self._inside(name)
        try:
            text = read_file(path, _JSON_BYTES_MAX).decode()
            content = json.loads(text, parse_constant=lambda constant: {"__float__": constant})
        except UnfitFileError as error:
            raise ModelFilesError(f"{self.path / name} cannot be read: {error.strerror}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFilesError(f"{self.path / name} cannot be read: {error}. Fetch it again") from error
        if not isinstance(content, dict):
            raise ModelFilesError(f"{self.path / name} is not a JSON object: fetch it again")
        return content

    def _inside(self, name: str) -> Path:
        """The file itself, which must be in the folder, or in the blobs of the hub's cache beside it."""
        path = self.path / name
        home = self.path.resolve()
        allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        real = None
        with suppress(OSError):
            real = path.resolve(strict=True)
        if real is None or not real.is_file():
            raise ModelFilesError(f"{path} is not a file, or a broken link: fetch it again")
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise ModelFilesError(
                f"{path} is a link out of the folder, to {real}: copy the file into the folder"
            )
        return real

    @property
    def fp8_block(self) -> tuple[int, int] | None:
        """Rows and columns of the blocks that have a scale each, where weights in fp8 are to be read; else None."""
        marks = next(_quantisations(self.raw_config), None)
        if not self.dequantizes or marks is None or not can_dequantize(marks):
            return None
        rows, columns = marks["weight_block_size"]
        return rows, columns

    def _refuse_quantised(self) -> None:
        for marks in _quantisations(self.raw_config):
            if not can_dequantize(marks):
                raise UnsupportedModelError(
                    f"{self.path}: the weights are quantised ({_quantisation_text(marks)}); training all of them needs "
                    f"the original model in bf16, fp16 or fp32: import that one. {_ORIGINAL}"
                )
            if not self.dequantizes:
                raise UnsupportedModelError(
                    f"{self.path}: the weights are quantised ({_quantisation_text(marks)}): import --dequantize "
                    "(model_options.dequantize=true) trains the numbers that they stand for, or import the original "
                    "model in bf16, fp16 or fp32"
                )

    def _refuse_gguf(self, path: Path) -> NoReturn:
        raise ModelFilesError(
            f"{self.path} holds the model as GGUF ({path.name}): give the file itself in place of the folder, {path}"
        )


def _named_code(config: dict[str, Any]) -> str:
    """What an ``auto_map`` names, or empty: classes in files of the folder or of another repository."""
    named = config.get("auto_map")
    if not named:
        return ""
    values = named.values() if isinstance(named, dict) else [named]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if name]
    return f"auto_map: {', '.join(dict.fromkeys(map(str, names)))}"[:200]


def _quantisation_text(marks: dict[str, Any]) -> str:
    method = str(marks.get("quant_method", "")) or "bitsandbytes"
    bits = marks.get("bits") or (4 if marks.get("load_in_4bit") else 8 if marks.get("load_in_8bit") else None)
    return method.upper() + (f" {bits}-bit" if isinstance(bits, int) else "")


def _without(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The configuration and its parts without some entries."""
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in names
    }


def _quantisations(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            if isinstance(part.get(key), dict):
                yield part[key]


def _hub_name(path: Path) -> str:
    """The name of a model of the hub that a path may be meant as: OWNER/NAME, unless OWNER is a folder here."""
    match path.parts:
        case (owner, _) if owner[0] not in "./~" and not path.parent.exists():
            return str(path)
    return "OWNER/NAME"
