"""Loads versions that other servers on the same store have made the default or labeled, and that are missing here.

Each server loads versions itself, but defaults and labels are shared. A server that lacks a chosen version refuses the
calls that need it. If the file exists here at the same path, now or later, the server loads it by itself.
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
"""The time between checks, in seconds."""
_RETRY_INTERVAL_S = 30.0
"""The delay before a load that failed for lack of room or of the store is retried, in seconds."""
_Key = tuple[str, int]


class ReplicaFollower:
    """Loads missing versions. Used on the event loop; `run` is its background task."""

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        *,
        root: Path | None,
        clock: Clock,
        is_left_out: Callable[[str, KnownVersion], bool] = lambda _name, _known: False,
    ) -> None:
        """Initialize it.

        Args:
            engine: has the defaults and labels.
            catalog: loads the versions.
            root: `--models`, where files must be; None: anywhere.
            clock: for retries.
            is_left_out: whether the file of a version is in the folder of models. Blocking.
        """
        self._engine = engine
        self._catalog = catalog
        self._root = root
        self._clock = clock
        self._is_left_out = is_left_out
        self._failed: dict[_Key, Stamp] = {}
        """Versions that failed to load, with the stamps of their files: retried when a file changes."""
        self._not_before: dict[_Key, float] = {}

    async def run(self) -> None:
        """Load missing versions at intervals, until cancelled."""
        while True:
            await asyncio.sleep(SCAN_INTERVAL_S)
            try:
                await self.look()
            except Exception as error:
                _log.defect("the versions of other servers could not be read; the timer continues", error)

    async def look(self) -> int:
        """Load the missing versions that can be loaded; return their number. `run` calls this at intervals."""
        missing = list(self._missing())
        for key in self._failed.keys() - {(name, known.version) for name, known in missing}:
            del self._failed[key]
        return sum([await self._load(name, known) for name, known in missing])

    def _missing(self) -> Iterator[tuple[str, KnownVersion]]:
        """Yield chosen versions that come from a file and are not loaded here, defaults first."""
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
