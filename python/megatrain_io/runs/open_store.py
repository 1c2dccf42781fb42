"""Opening the store of a run, and no other in its place."""

from megatrain_io.errors import FormatError
from megatrain_io.runs.folder import RunFolder
from megatrain_io.store.paged_store import Engine, Ledger, PagedStore

__all__ = ["open_store"]


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
