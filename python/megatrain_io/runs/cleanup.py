"""What killed processes leave behind in a run, and its removal: nothing is removed that was not listed. No torch.

Everything has a name that megatrain-io gave it, in a place where megatrain-io puts it; nothing else is touched.
While it is looked for, and again while it is removed, the store is held: so none of it belongs to a process
that runs.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatrain_io.errors import ConfigError, FormatError, MegatrainIoError, StorageError
from megatrain_io.runs.folder import RunFolder, activations_file, gradient_file
from megatrain_io.runs.provenance import described, found_in
from megatrain_io.runs.state import TrainerState
from megatrain_io.store.inspect import HeldFile, held, store_info

__all__ = ["Leftover", "Leftovers"]

_CACHE = ("index.json", "train.tokens", "eval.tokens")
_PARTIAL = ".partial"
_OWNER = ".owner"


@dataclass(frozen=True)
class Leftover:
    """A file or folder to remove.

    Attributes:
        path: where it is.
        nbytes: bytes that it takes on the drive.
        what: what it is, in words.
    """

    path: Path
    nbytes: int
    what: str


class Leftovers:
    """All that is to be removed of one run: found first, removed when the person has agreed."""

    def __init__(
        self,
        run: RunFolder,
        *,
        store_dirs: Sequence[Path] | None = None,
        cache: bool = False,
        store: bool = False,
    ) -> None:
        """Look for what processes that were killed left behind.

        Args:
            run: its folder; an import may have been killed there before it was a run.
            store_dirs: folders of the store, where such an import was told some.
            cache: the tokenised data, too: it is made anew when it is needed.
            store: the store, too, and what belongs to it: nothing of the training can be resumed then.

        Raises:
            ConfigError: there is nothing of a run.
            StoreInUseError: the store is in use.
            FormatError: with ``store``, what lies in its place is not the store of this run.
        """
        self.run = run
        self._cache = cache
        self._store = store
        if run.is_imported and store_dirs is not None:
            raise ConfigError(
                f"run.json says where the store of {run.path} is: leave --store-dir out. It is for imports that "
                "were killed"
            )
        self._store_paths = run.store_paths() if run.is_imported else run.stores_in(store_dirs)
        self.step: int | None = None
        """Last committed step of a store that is to be removed."""
        with self._holding():
            self.found = list(self._look())
        if not self.found:
            run.read()  # refuses what is no run

    @property
    def nbytes(self) -> int:
        """Bytes that all leftovers together take on the drives."""
        return sum(leftover.nbytes for leftover in self.found)

    @property
    def store_bytes(self) -> int:
        """Bytes that the store takes on its drives; 0 where it is not to be removed."""
        return sum(leftover.nbytes for leftover in self.found if leftover.path in self._store_paths)

    def remove(self) -> Sequence[Leftover]:
        """Remove what was found, and return it.

        Raises:
            ConfigError: something came or went since: nothing was removed.
            StoreInUseError: the store is in use by now: nothing was removed.
            StorageError: the system refused; what is left can be removed by another call.
        """
        with self._holding() as holds:
            if [leftover.path for leftover in self._look()] != [leftover.path for leftover in self.found]:
                raise ConfigError(f"{self.run.path} changed in the meantime: nothing was removed. Look again")
            for leftover in self.found:
                try:
                    if leftover.path in holds:
                        holds[leftover.path].remove()
                    elif leftover.path.is_dir():
                        shutil.rmtree(leftover.path)
                    else:
                        leftover.path.unlink()
                except MegatrainIoError:
                    raise
                except OSError as error:
                    raise StorageError(
                        f"{leftover.path} could not be removed ({error.strerror}): what stands after it in the list "
                        "is still there"
                    ) from error
        return self.found

    @contextmanager
    def _holding(self) -> Iterator[dict[Path, HeldFile]]:
        """Hold the files that a training or an import would hold."""
        with ExitStack() as stack:
            if self.run.path.is_dir():
                stack.enter_context(self.run.importing())
            paths = [*self._store_paths, *self._partial(), *self._inputs()]
            yield {path: stack.enter_context(held(path)) for path in paths if _is_file(path)}

    def _partial(self) -> list[Path]:
        return [_beside(path, _PARTIAL) for path in self._store_paths]

    def _inputs(self) -> list[Path]:
        """Activation checkpoints lose their name at once, unless the process is killed within that moment."""
        paths = [file(path) for path in self._store_paths for file in (activations_file, gradient_file)]
        return [*paths, *(_beside(path, _PARTIAL) for path in paths)]

    def _look(self) -> Iterator[Leftover]:
        """The store comes first: without it the rest is soon found again, but not the other way round."""
        run = self.run
        if self._is_store_to_go():
            yield from (_leftover(path, "the store") for path in self._store_paths)
        if self._store and run.is_imported:
            missing = [str(path) for path in self._store_paths if not _is_file(path)]
            if missing:
                raise ConfigError(
                    f"the store {', '.join(missing)} is not there: if its drive is not mounted, mount it. Without it "
                    "run.json and the model folder are not removed"
                )
            yield _leftover(run.info_file, "says where the store is")
            if run.model.is_dir():
                yield _leftover(run.model, "configuration and tokeniser, as imported")
        partial = self._partial()
        # The main file gets its name last: what has one before is no store yet.
        named = self._store_paths[1:] if _is_file(partial[0]) else []
        for path in (*named, *partial):
            if _is_file(path):
                yield _leftover(path, "store of an import that was killed")
        inputs = [path for path in self._inputs() if _is_file(path)]
        yield from (_leftover(path, "activation checkpoints of a step that was killed") for path in inputs)
        yield from self._hints()
        yield from self._unfinished()
        cache = [run.data / name for name in _CACHE]
        if self._cache or not _is_file(cache[0]):  # without an index, the rest is nothing
            what = "tokenised data" if _is_file(cache[0]) else "tokenised data that was not finished"
            yield from (_leftover(path, what) for path in cache if _is_file(path))

    def _hints(self) -> Iterator[Leftover]:
        for path in (*self._store_paths, *self._partial(), *self._inputs()):
            hint = _beside(path, _OWNER)
            if _is_file(hint) and not _is_file(path):  # else it goes when the file is let go
                yield _leftover(hint, "names who held a store that is gone")

    def _unfinished(self) -> Iterator[Leftover]:
        run = self.run
        model = _beside(run.model, _PARTIAL)
        # Of an import that was finished, it gets its name with the next start.
        is_needed = run.is_imported and not os.path.lexists(run.model)
        if model.is_dir() and not model.is_symlink() and not is_needed:
            yield _leftover(model, "model files of an import that was killed")
        if not (self._store and run.is_imported) and run.remade.is_dir() and not run.remade.is_symlink():
            yield _leftover(run.remade, "model files that were being made again")
        copied = run.read().files if run.is_imported and not self._store else ()
        for path in (
            *(_beside(path, ".tmp") for path in (run.info_file, run.config, run.metrics)),
            *(_beside(run.model / name, ".tmp") for name in copied),
            *(run.data / name for name in ("index.json.tmp", "index.tmp")),
        ):
            if _is_file(path):
                yield _leftover(path, "a file that was not written to its end")

    def _is_store_to_go(self) -> bool:
        """Whether the store is to be removed; also refuses to remove what is another's."""
        path, run = self._store_paths[0], self.run
        if not all(map(_is_file, self._store_paths)) or (run.is_imported and not self._store):
            return False
        try:
            state = store_info(*self._store_paths)
        except MegatrainIoError as error:
            if not self._store:
                return False
            raise FormatError(
                f"{path} cannot be told to be the store of {run.path}, so it is not removed: {error}"
            ) from error
        if run.is_imported and state.uuid != run.read().store_uuid:
            raise FormatError(
                f"{path} is store {state.uuid}, and {run.info_file} names {run.read().store_uuid}: it belongs to "
                "another run and is not removed"
            )
        self.step = TrainerState.parse(state.blob).step if state.blob else None
        if not self._store:
            # An import that was killed at its very end. Elsewhere a store of this name may be another run's.
            return path == run.own_store and state.generation == 1
        if not run.is_imported and (state.generation > 1 or self._is_of_another()):
            raise FormatError(
                f"{path} is not removed: {described(self._store_paths)}, and {run.path} has no run.json that names it"
            )
        return True

    def _is_of_another(self) -> bool:
        """Whether a store names another run as its own."""
        found = found_in(self._store_paths)
        return found is not None and found[0].run != str(self.run.path.resolve())


def _leftover(path: Path, what: str) -> Leftover:
    inside = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    return Leftover(path, sum(part.lstat().st_blocks * 512 for part in [path, *inside]), what)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
