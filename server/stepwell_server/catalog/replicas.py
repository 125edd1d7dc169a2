"""Loads defaults and versions with labels that other servers on the same store have chosen, and this one does not have.

Each server loads versions for itself, and the choice is one for all. A server that does not have a chosen version
refuses the calls that need it. If the file is in the same place here, now or later, the server loads it without a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest
from stepwell_server.catalog.files import paths
from stepwell_server.catalog.interfaces import Engine
from stepwell_server.clock import Clock
from stepwell_server.engine.versions.registry import KnownVersion
from stepwell_server.errors import InvalidInput, Overloaded, ServerError, Unavailable, VersionExists
from stepwell_server.files.stamp import Stamp, stamp
from stepwell_server.logs import Log

_log = Log("models")
SCAN_INTERVAL_S = 2.0
"""Between two checks, in seconds."""
_RETRY_INTERVAL_S = 30.0
"""After this time a load is tried again that failed as there was no room, or no answer of the store, in seconds."""
_Key = tuple[str, int]


class ReplicaFollower:
    """Lives on the event loop; `run` runs in a task of its own."""

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        *,
        root: Path | None,
        clock: Clock,
        is_left_out: Callable[[str, KnownVersion], bool] = lambda _name, _known: False,
    ) -> None:
        """Wire it.

        Args:
            engine: knows what was chosen.
            catalog: loads it.
            root: `--models`: files must lie in it; None: anywhere.
            clock: says when to try again.
            is_left_out: whether the folder of models has the file of a version. Blocking.
        """
        self._engine = engine
        self._catalog = catalog
        self._root = root
        self._clock = clock
        self._is_left_out = is_left_out
        self._failed: dict[_Key, Stamp] = {}
        """Files that cannot be loaded, until they change."""
        self._not_before: dict[_Key, float] = {}

    async def run(self) -> None:
        """Load what is missing at intervals, until cancelled."""
        while True:
            await asyncio.sleep(SCAN_INTERVAL_S)
            try:
                await self.look()
            except Exception as error:
                _log.defect(
                    "versions that other servers have could not be looked for; the timer continues", error
                )

    async def look(self) -> int:
        """Load what can be loaded; return how many versions that were. `run` does it at intervals."""
        missing = list(self._missing())
        for key in self._failed.keys() - {(name, known.version) for name, known in missing}:
            del self._failed[key]
        return sum([await self._load(name, known) for name, known in missing])

    def _missing(self) -> Iterator[tuple[str, KnownVersion]]:
        """Chosen versions that come from a file and are not loaded here, defaults first."""
        for name, own in sorted(self._engine.catalogue().items()):
            for known in own.missing():
                if known.source:
                    yield name, known

    async def _load(self, name: str, known: KnownVersion) -> bool:
        key, path = (name, known.version), Path(known.source)
        if self._clock.monotonic() < self._not_before.get(key, 0.0):
            return False
        now = await asyncio.to_thread(stamp, path)
        if now == self._failed.get(key) or await asyncio.to_thread(self._is_left_out, name, known):
            return False
        request = LoadRequest(
            name=name,
            version=known.version,
            path=known.source,
            keep_default=True,
            tenant=known.tenant,
            is_charged=False,
        )
        try:
            await asyncio.to_thread(paths.checked, known.source, self._root)
            await self._catalog.load(request)
        except InvalidInput as error:  # the file is not here, or outside of --models
            self._failed[key] = now
            _log.warning(
                "a version that other servers have is not loaded here",
                model=name,
                version=known.version,
                reason=error.message,
            )
        except (Unavailable, Overloaded, VersionExists):  # transient, or another load of it is running
            self._not_before[key] = self._clock.monotonic() + _RETRY_INTERVAL_S
        except ServerError:
            self._failed[key] = now  # the catalog has logged it
        else:
            _log.info(
                "a version that other servers have is loaded here, too", model=name, version=known.version
            )
            return True
        return False
