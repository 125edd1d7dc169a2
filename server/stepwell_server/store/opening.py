"""Makes the store that the settings ask for: the one module that knows which stores there are."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from stepwell_server.clock import Clock
from stepwell_server.store.awaited import AwaitedStore
from stepwell_server.store.base import Store
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.times import StoreTimes

Kind = Literal["disk", "memory"]


def open_store(
    kind: Kind,
    *,
    data_dir: Path | None,
    durability: Literal["sync", "async"],
    clock: Clock,
    times: StoreTimes | None = None,
) -> Store:
    """Open a store, or make it if it is not there. One on disk writes into `times` how long it takes.

    A change that was acknowledged survives, on disk, the loss of power (`sync`) or the end of the process (`async`).

    Raises:
        StoreBusy: another server uses it.
        StoreError: it cannot be opened.
    """
    if kind == "memory" or data_dir is None:
        return AwaitedStore(MemoryStore())
    return AwaitedStore(DiskStore(data_dir, durability=durability, clock=clock, times=times))
