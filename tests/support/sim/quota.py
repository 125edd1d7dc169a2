"""Quotas of a tenant over replicas: nobody begins more sessions than it may have, as far as a replica can know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from stepwell_server.clock import Clock
from stepwell_server.core.namespaces import SEPARATOR, tenant_of
from stepwell_server.core.quotas import NOTHING, Limits, QuotaTable, Usage
from stepwell_server.engine.quotas import Quotas
from support.sim.node import Birth
from support.sim.world import World

TENANT = "t"
PREFIX = TENANT + SEPARATOR


@dataclasses.dataclass(slots=True)
class Admission:
    """A replica has counted a session that is about to be made."""

    whose: str
    session: str
    at_s: float
    asked_s: float
    """When what it knows of others was asked for, or before."""
    gone_s: float = float("inf")
    """When it took it for ended, or not made: it counts until the store is asked later than that."""


class WatchedQuotas(Quotas):
    """The quotas of one life of a replica, with what it counted written down."""

    def __init__(self, world: World, clock: Clock, most: int, whose: str, book: list[Admission]) -> None:
        super().__init__(QuotaTable(tenants={TENANT: Limits(sessions=most)}), clock)
        self._world = world
        self._skew_s = clock.monotonic() - world.now
        self._whose = whose
        self._book = book

    def begin(self, session_ids: Sequence[str], each: Usage, owner: str = "") -> None:
        super().begin(session_ids, each, owner)
        counts: Any = self._counts
        asked = counts._asked.get(TENANT)
        asked_s = 0.0 if asked is None else asked.at - self._skew_s
        self._book += [Admission(self._whose, each, self._world.now, asked_s) for each in session_ids]

    def end(self, sessions: Iterable[tuple[str, Usage]]) -> None:
        sessions = list(sessions)
        super().end(sessions)
        self._forget(session for session, _ in sessions)

    def _forget(self, session_ids: Iterable[str]) -> None:
        for session in session_ids:
            for each in reversed(self._book):
                if (each.whose, each.session) == (self._whose, session):
                    each.gone_s = min(each.gone_s, self._world.now)
                    break

    async def known(self) -> int:
        """The tenant's sessions as the store counts them now."""
        await self.refresh([PREFIX])
        return self.tenants().get(TENANT, NOTHING).sessions


def require_kept(births: Sequence[Birth], book: Sequence[Admission], most: int) -> None:
    """Check that a replica begins too many only by what others began since it asked for what they have.

    Raises:
        AssertionError: it did not keep to it.
    """
    there = 0
    ours = sorted((birth for birth in births if tenant_of(birth.session) == TENANT), key=lambda b: b.at_s)
    for place, birth in enumerate(ours):
        there += birth.by
        if birth.by < 0 or not birth.whose:
            continue
        admission = _admission_of(birth, book)
        assert admission is not None, f"{birth.whose} has made {birth.session!r}, which it had not counted"
        others = sum(
            other.by > 0
            and other.at_s >= admission.asked_s
            and not _is_counted(_admission_of(other, book), admission)
            for other in ours[:place]
        )
        assert there <= most + others, (
            f"{birth.session!r} is session {there} of its tenant, which may have {most}, at {birth.at_s:.6f} s;"
            f" {birth.whose} asked at {admission.asked_s:.6f} s, and others began {others} since then"
        )


def _admission_of(birth: Birth, book: Sequence[Admission]) -> Admission | None:
    """The last time that the replica which made a session had counted it; None: a fail-over brought it back."""
    for each in reversed(book):
        if (each.whose, each.session) == (birth.whose, birth.session) and each.at_s <= birth.at_s:
            return each
    return None


def _is_counted(other: Admission | None, admission: Admission) -> bool:
    """Whether a replica that admitted a session knew of another one by itself."""
    return (
        other is not None
        and other.whose == admission.whose
        and other.at_s <= admission.at_s
        and other.gone_s > admission.asked_s
    )
