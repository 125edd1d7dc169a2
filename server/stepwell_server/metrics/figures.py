"""The figures of the server for WatchServer: computed from the metrics, as `stepwell top` does."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepwell._base.activity import Scrape, Seen, picture

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.metrics.server import Source
    from stepwell_server.process.readiness import Readiness, Report
    from stepwell_server.process.replicas import Replica

#: A reading that is younger than this is used again.
_FRESH_S = 0.05


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """The metrics at one time."""

    scrape: Scrape
    when: float
    """On the monotonic clock."""


class Figures:
    """Reads the metrics, and computes what happened between two readings. Lives on the event loop.

    Readings that are needed at about the same time are one, and so is what is computed from them: many watches cost little
    more than one.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        readiness: Readiness,
        clock: Clock,
        replicas: Callable[[], Sequence[Replica]] = tuple,
    ) -> None:
        self._sources = sources
        self._replicas = replicas
        self._readiness = readiness
        self._clock = clock
        self._last: Reading | None = None
        self._process: Any = None
        self._known: dict[tuple[Reading | None, Reading], asyncio.Task[Mapping[str, Any]]] = {}

    @property
    def report(self) -> Report:
        """Whether the server is ready."""
        return self._readiness.report

    @property
    def replicas(self) -> Sequence[Replica]:
        """The servers that share the store."""
        return self._replicas()

    async def read(self) -> Reading:
        """Read the metrics."""
        if self._process is None:
            self._process = await asyncio.to_thread(_process_collector)
        now = self._clock.monotonic()
        if self._last is None or now - self._last.when > _FRESH_S:
            families = [family for source in self._sources for family in source()]
            families += self._process.collect()
            samples = ((each.name, each.labels, each.value) for one in families for each in one.samples)
            self._last = Reading(Scrape(samples, now), now)
            self._known = {}
        return self._last

    async def between(self, before: Reading | None, now: Reading) -> Mapping[str, Any]:
        """Compute the activity between two readings: the document of `stepwell top --json`, without slow sessions."""
        task = self._known.get((before, now))
        if task is None:
            seen = Seen("", None if before is None else before.scrape, now.scrape)
            work = asyncio.to_thread(picture, [seen], [], self._clock.now())
            task = self._known[before, now] = asyncio.create_task(work)
        return await asyncio.shield(task)


def _process_collector() -> Any:
    # here: a server that nobody watches should not import this
    from prometheus_client import ProcessCollector

    return ProcessCollector(registry=None)
