"""Opening the store of a run, and no other in its place."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from megatrain_io.errors import ConfigError, CorruptionError, FormatError
from megatrain_io.runs.folder import RunFolder
from megatrain_io.store.paged_store import Engine, Ledger, PagedStore

__all__ = ["naming_the_way_back", "open_store"]


def open_store(run: RunFolder, *, engine: Engine = "auto", ledger: Ledger | None = None) -> PagedStore:
    """Open the store that ``run.json`` names, at its newest whole generation.

    Raises:
        ConfigError: this is no run folder, or its ``run.json`` is damaged.
        FormatError: the store in its place is another run's; and what opening raises.
    """
    info = run.read()
    state = PagedStore(*run.store_paths(), engine=engine, ledger=ledger)
    if state.uuid != info.store_uuid:
        uuid = state.uuid
        state.close()
        raise FormatError(
            f"{state.path} is store {uuid}, and {run.info_file} names {info.store_uuid}: it belongs to another "
            "run. Put the right store in its place, or use the run that this one belongs to"
        )
    return state


@contextmanager
def naming_the_way_back(run: RunFolder) -> Iterator[None]:
    """Note on an error about damaged bytes of the run's store the command that finds out what is left."""
    try:
        yield
    except CorruptionError as error:
        try:
            paths = run.store_paths()
        except ConfigError:
            paths = []
        # Activation checkpoints and waiting gradients lie in files of their own, and cost a step only.
        if any(f"{path}+" in str(error) for path in paths):
            command = f"megatrain-io verify {shlex.quote(str(run.path.absolute()))}"
            error.add_note(
                f"`{command}` finds all that is damaged, and whether the state before it is whole."
            )
        raise
