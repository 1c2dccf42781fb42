"""A file of the user's own that makes a model known to transformers: which may run, and what was run.

Such a file runs with all rights of whoever starts the command. So it runs only if that person named it, or allowed it;
only from outside of model and run folder, which come from others; and only with the content that a run was imported
with. Nothing of it runs before all of this is known.
"""

import hashlib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import yaml
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from megatrain_io.errors import ConfigError
from megatrain_io.files import read_file

__all__ = ["KEY", "OwnCode", "allow", "allow_all", "allow_named"]

KEY = "model_options.modules"
"""The key that names the file."""

_BYTES_MAX = 16 << 20
_SHOWN = 12
_ELSEWHERE = (
    f". If it lies elsewhere now, name that place (train: {KEY}=FILE; generate and export: --modules FILE)"
)


class _Allowed:
    """What whoever started this process lets run."""

    files: ClassVar[set[Path]] = set()
    is_all: ClassVar[bool] = False


def allow(path: Path) -> None:
    """Let a file run that was named by whoever started this process."""
    _Allowed.files.add(path.resolve())


def allow_all() -> None:
    """Let any file run that configurations and runs name."""
    _Allowed.is_all = True


def allow_named(overrides: Iterable[str]) -> None:
    """Let the files run that ``key=value`` arguments of a command name."""
    for item in overrides:
        key, _, value = item.partition("=")
        if key.strip() in {KEY, KEY.rpartition(".")[2]} and value:
            try:
                allow(Path(str(yaml.safe_load(value))).expanduser())
            except (yaml.YAMLError, ValueError, OSError):
                continue  # whoever reads the configuration says so


@dataclass(frozen=True)
class OwnCode:
    """A file of Python that registers a model with transformers, or defines one.

    Attributes:
        path: of the file, absolute.
        sha256: of its content, in hexadecimal.
    """

    path: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read what a key names.

        Raises:
            ConfigError: the file cannot be read.
        """
        path = path.absolute()
        return cls(str(path), hashlib.sha256(_content(path)).hexdigest())

    def as_dict(self) -> dict[str, str]:
        """As ``run.json`` has it."""
        return asdict(self)

    def run(self, outside: Sequence[Path]) -> None:
        """Run the file, once in a process.

        Whoever imported it in this process has run it: then nothing is done.

        Args:
            outside: folders in which it must not lie: of the model and of the run.

        Raises:
            ConfigError: it may not run, is not what it was, fails, or makes no model known. Nothing of it has run but
                in the last two cases.
        """
        path = Path(self.path)
        for folder in outside:
            if _lies_in(path, folder):
                raise ConfigError(
                    f"{KEY}: {path} lies in {folder}, and code in the folder of a model or a run is not run: read it, "
                    "and copy it elsewhere if you trust it"
                )
        content = _content(path, _ELSEWHERE)
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise ConfigError(
                f"{KEY}: {path} has changed since the run was imported with it (SHA-256 {self.sha256[:_SHOWN]}..., now "
                f"{found[:_SHOWN]}...), and was not run: put it back as it was, or import the model into a new "
                "output_dir"
            )
        name = f"megatrain_io_modules_{self.sha256[:_SHOWN]}"
        if name in sys.modules:
            return
        is_allowed = _Allowed.is_all or path.resolve() in _Allowed.files
        if is_allowed:
            _execute(name, path, content)
        elif not _is_imported(path):
            named = shlex.quote(str(path))
            raise ConfigError(
                f"{KEY}: {path} is code, and was not run: name it on the command line (train and plan: {KEY}={named}; "
                f"import, generate and export: --modules {named}), or give --allow-code, if you trust it"
            )


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a file is in a folder: by its name, whatever that leads to, or by what it leads to.

    The files of a folder in the hub's cache are links into the blobs beside it.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent] if home.parent.name == "snapshots" else [home]
    named = Path(os.path.abspath(path)).parents  # noqa: PTH100 - links stay
    return any(path.resolve().is_relative_to(each) for each in homes) or home in map(Path.resolve, named)


def _is_imported(path: Path) -> bool:
    files = {str(path), str(path.resolve())}
    return any(getattr(module, "__file__", None) in files for module in [*sys.modules.values()])


def _content(path: Path, advice: str = "") -> bytes:
    try:
        return read_file(path, _BYTES_MAX)
    except OSError as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error.strerror or error}{advice}") from error


def _execute(name: str, path: Path, content: bytes) -> None:
    module = ModuleType(name)
    module.__file__ = str(path)
    before = _registered()
    sys.modules[name] = module
    try:
        exec(compile(content, str(path), "exec"), vars(module))  # noqa: S102 - what the key is for
        if _registered() == before:
            _register(module, path)
    except BaseException as cause:
        del sys.modules[name]
        if isinstance(cause, ConfigError | KeyboardInterrupt):
            raise
        reason = " ".join(str(cause).split())
        raise ConfigError(f"{KEY}: {path} failed with {type(cause).__name__}: {reason}") from cause


def _registered() -> list[Any]:
    """The classes of configurations that were registered for causal language models."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content)  # noqa: SLF001 - transformers says it in no other way


def _register(module: ModuleType, path: Path) -> None:
    """Register the one configuration class and the one model class that a file defines."""
    own = [each for each in vars(module).values() if getattr(each, "__module__", None) == module.__name__]
    configs = [each for each in own if isinstance(each, type) and issubclass(each, PreTrainedConfig)]
    models = [
        each
        for each in own
        if isinstance(each, type)
        and issubclass(each, PreTrainedModel)
        and getattr(each, "config_class", None) in configs
    ]
    if len(configs) != 1 or len(models) != 1:
        raise ConfigError(
            f"{KEY}: {path} registers no model with transformers (AutoConfig.register, AutoModelForCausalLM.register), "
            f"and defines {len(configs)} classes of configurations and {len(models)} of models with such a "
            "config_class, where one of each would be registered"
        )
    if configs[0].model_type in CONFIG_MAPPING:
        raise ConfigError(
            f"{KEY}: {path} defines a model_type {configs[0].model_type!r}, which transformers has: give it another"
        )
    AutoConfig.register(configs[0].model_type, configs[0])
    AutoModelForCausalLM.register(configs[0], models[0])
