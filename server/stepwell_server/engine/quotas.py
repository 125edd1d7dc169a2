"""Who has how much, and whether there may be more of it: charged where sessions begin and steps come in.

Sessions and rows are the tenant's that the session's id says. They are also those of the caller that made the session, if
it has such a quota when it makes it: the session's record says so then. Steps and bytes are those of the tenant, and of the caller,
that asks. A step that is sent again is charged again: it was refused or it was served.

Where others use the store, sessions and rows are those of all servers together; steps and bytes are counted by each for
itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.callers import Caller
from stepwell_server.core.namespaces import tenant_of
from stepwell_server.core.quotas import NO_LIMITS, Buckets, Limits, QuotaTable, TokenBucket
from stepwell_server.engine.change import Change
from stepwell_server.engine.shared_counts import SharedCounts
from stepwell_server.engine.state.fields import owner_of
from stepwell_server.engine.types import Members
from stepwell_server.errors import InvalidInput, QuotaExceeded, ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Store

#: Nobody knows when a session ends.
_SESSIONS_AGAIN_S, _BYTES_AGAIN_S = 1.0, 0.05
#: So often it is asked what tenants have in a store that others use, for people who look at it, in seconds.
_LOOK_S = 15.0
#: Records that are counted before others get a turn.
_AT_ONCE = 2000
_log = Log("engine.quotas")
QUOTAS = ("sessions", "rows", "steps_per_second", "bytes_in_flight", "models")
OTHER = "other"
"""The label of tenants that have none of their own."""


@dataclasses.dataclass(frozen=True, slots=True)
class TenantCounts:
    """What metrics say, by the labels of tenants."""

    sessions: Mapping[str, int]
    rows: Mapping[str, int]
    steps: Mapping[str, int]
    refused: Mapping[tuple[str, str], int]
    """By tenant and quota."""


_Scope = tuple[str, str, Limits]
"""What a message calls it, its name, its quotas."""


class Quotas:
    """Counts and limits of tenants and callers. Lives on the event loop."""

    def __init__(self, table: QuotaTable, clock: Clock, most_labels: int = 100) -> None:
        """`most_labels` tenants have a label in the metrics: those of the table first, then as they come."""
        self._clock = clock
        self._most_labels = most_labels
        self._labels: dict[str, str] = {}
        self._buckets = Buckets()
        self._bytes: Counter[str] = Counter()
        self._sessions: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._owners: dict[str, str] = {}
        """Who has made sessions, of those that are counted for their callers."""
        self._of_callers: dict[str, Counter[str]] = {}
        """Sessions and rows of those callers."""
        self._shared: SharedCounts | None = None
        """Who knows sessions and rows, where others use the store."""
        self._steps: Counter[str] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()
        self.use(table)

    def use(self, table: QuotaTable) -> None:
        """From now on these are the quotas."""
        self._table = table
        for tenant in table.tenants:
            self._label(tenant)

    async def count(self, store: Store) -> None:
        """Count the sessions that a store has, at the start; one that others use counts them by itself."""
        if store.local is None:
            self._shared = SharedCounts(store, self._clock)
            await self._shared.refresh_all(self._table.tenants)
            return
        after = ""
        while len(heads := await store.heads(after=after, limit=_AT_ONCE)):
            ids = [str(key, "utf-8", "replace") for key in heads.keys]
            after = ids[-1]
            for place, fields in heads.fields.items():
                if owner := owner_of(fields):
                    self._own(owner, [ids[place]], int(heads.heads["batch_size"][place]))
            for session_id, rows in zip(ids, heads.heads["batch_size"].tolist(), strict=True):
                tenant = tenant_of(session_id)
                self._sessions[tenant] += 1
                self._rows[tenant] += rows
            await asyncio.sleep(0)

    # ------------------------------------------------------------------------------------------------------- sessions

    def owner(self, who: Caller, session_id: str = "") -> str:
        """As whose sessions those count, beside its tenant's, that a caller makes now; empty: as nobody's.

        One of an id that is there, and is replaced, stays whose it was.
        """
        if session_id in self._owners:
            return self._owners[session_id]
        limits = self._table.callers.get(str(who)) if who.name else None
        return str(who) if limits is not None and limits.counts_sessions else ""

    def begin(self, session_ids: Sequence[str], rows: int, owner: str = "") -> None:
        """Count sessions of so many rows each that are about to be made, of one tenant: then they are `made`, or `not_made`.

        `owner`: see `owner`.

        Raises:
            QuotaExceeded: they would be too many, and none is counted.
        """
        tenant, count = tenant_of(session_ids[0]), len(session_ids)
        limits = self._table.of_tenant(tenant)
        there, rows_there = self._of(tenant)
        self._require_room(tenant, "sessions", limits.sessions, there, count)
        self._require_room(tenant, "rows", limits.rows, rows_there, count * rows)
        if owner:
            self._require_own_room(tenant, owner, count, count * rows)
            self._own(owner, session_ids, rows)
        if self._shared is not None:
            self._shared.making(tenant, count, count * rows)
        else:
            self._change(tenant, count, count * rows)

    def made(self, session_ids: Sequence[str], rows: int) -> None:
        """The store has sessions that were counted, of one tenant."""
        if self._shared is not None:
            tenant, count = tenant_of(session_ids[0]), len(session_ids)
            self._shared.making(tenant, -count, -count * rows)
            self._shared.begin(tenant, count, count * rows)

    def not_made(self, session_ids: Sequence[str], rows: int) -> None:
        """Sessions that were counted, of one tenant, are not there, as far as that is known."""
        if self._shared is not None:
            count = len(session_ids)
            self._shared.making(tenant_of(session_ids[0]), -count, -count * rows)
        else:
            self.end((session_id, rows) for session_id in session_ids)

    def end(self, sessions: Iterable[tuple[str, int]]) -> None:
        """Sessions have ended for good: their ids and rows."""
        for session_id, rows in sessions:
            self._change(tenant_of(session_id), -1, -rows)
            if self._owners and (owner := self._owners.pop(session_id, "")):
                own = self._of_callers[owner]
                own.subtract({"sessions": 1, "rows": rows})
                if not own["sessions"]:
                    del self._of_callers[owner]

    def change_rows(self, session_id: str, more: int) -> None:
        """A session is to have so many rows more, or has less.

        Raises:
            QuotaExceeded: they would be too many, and are not counted.
        """
        tenant, owner = tenant_of(session_id), self._owners.get(session_id, "")
        if more > 0:
            self._require_room(tenant, "rows", self._table.of_tenant(tenant).rows, self._of(tenant)[1], more)
            if owner:
                self._require_own_room(tenant, owner, 0, more)
        self._change(tenant, 0, more)
        if owner:
            self._of_callers[owner]["rows"] += more

    def callers(self) -> Mapping[str, tuple[int, int]]:
        """Sessions and rows of each caller for whom they are counted."""
        return {owner: (own["sessions"], own["rows"]) for owner, own in self._of_callers.items()}

    def _own(self, owner: str, session_ids: Sequence[str], rows: int) -> None:
        self._owners.update(dict.fromkeys(session_ids, owner))
        own = self._of_callers.setdefault(owner, Counter())
        own["sessions"] += len(session_ids)
        own["rows"] += rows * len(session_ids)

    def _require_own_room(self, tenant: str, owner: str, sessions: int, rows: int) -> None:
        limits, own = self._table.callers.get(owner, NO_LIMITS), self._of_callers.get(owner, Counter())
        for quota, most, more in (("sessions", limits.sessions, sessions), ("rows", limits.rows, rows)):
            self._require_room(tenant, quota, most, own[quota], more, whose=f"caller {owner!r}")

    async def refresh(self, session_ids: Iterable[str]) -> None:
        """Know what tenants have who are about to begin sessions, where others use the store.

        Raises:
            Unavailable: it cannot be asked now.
        """
        if self._shared is None:
            return
        for tenant in {tenant_of(session_id) for session_id in session_ids}:
            limits = self._table.of_tenant(tenant)
            if limits.sessions is not None or limits.rows is not None:
                await self._shared.refresh(tenant)

    async def run(self) -> None:
        """Know what tenants have for people who look at it, until cancelled."""
        while (shared := self._shared) is not None:
            await asyncio.sleep(_LOOK_S)
            try:
                await shared.refresh_all([*{*self._labels.values(), *self._table.tenants}])
            except ServerError as error:
                _log.warning("the store could not be asked what tenants have", error=error)

    def _of(self, tenant: str) -> tuple[int, int]:
        """Sessions and rows of a tenant."""
        if self._shared is not None:
            return self._shared.at_most(tenant)
        return self._sessions[tenant], self._rows[tenant]

    def _change(self, tenant: str, sessions: int, rows: int) -> None:
        if self._shared is not None:
            if rows > 0:
                self._shared.begin(tenant, sessions, rows)
            else:
                self._shared.end(tenant, -sessions, -rows)
            return
        self._sessions[tenant] += sessions
        self._rows[tenant] += rows
        if not self._sessions[tenant]:
            del self._sessions[tenant], self._rows[tenant]

    def require_model(self, tenant: str, has: int) -> None:
        """Refuse one more version of a model to a tenant whose admins have loaded so many.

        Raises:
            QuotaExceeded: they would be too many.
        """
        self._require_room(tenant, "models", self._table.of_tenant(tenant).models, has, 1)

    def _require_room(
        self, tenant: str, quota: str, most: int | None, there: int, more: int, *, whose: str = ""
    ) -> None:
        if most is not None and there + more > most:
            what = f"{quota} of {whose or _named(tenant)} must stay within {most}; there are {there}, and {more} came"
            raise self._exceeded(tenant, quota, most, what, _SESSIONS_AGAIN_S)

    # ---------------------------------------------------------------------------------------------------------- steps

    def charge(self, who: Caller, steps: int, byte_count: int) -> Callable[[], None]:
        """Charge somebody for steps, and for bytes until what is returned is called.

        Raises:
            QuotaExceeded: it is too much now, and nothing is charged.
            InvalidInput: it will always be.
        """
        now, scopes = self._clock.monotonic(), self._scopes(who)
        for what, name, limits in scopes:
            if limits.steps_per_second is not None and steps > limits.most_steps:
                raise InvalidInput(
                    f"steps of one request (rows times time steps) must be at most the burst of the quota"
                    f" steps_per_second of {what}, {limits.most_steps}; got {steps}: send fewer at once"
                )
            most = limits.bytes_in_flight
            if most is not None and byte_count > most:
                raise InvalidInput(
                    f"inputs of one request must have at most the bytes of the quota bytes_in_flight of {what}, {most};"
                    f" got {byte_count}: send fewer at once"
                )
            if most is not None and self._bytes[name] + byte_count > most:
                raise self._exceeded(
                    who.tenant,
                    "bytes_in_flight",
                    most,
                    f"bytes_in_flight of {what} must stay within {most}; {self._bytes[name]} are, and {byte_count} came",
                    _BYTES_AGAIN_S,
                )
        taken: list[TokenBucket] = []
        for what, name, limits in scopes:
            if limits.steps_per_second is None:
                continue
            bucket = self._buckets.of(name, limits, now)
            delay_s = bucket.take(steps, now)
            if delay_s:
                for other in taken:
                    other.give_back(steps)
                rate = limits.steps_per_second
                raise self._exceeded(
                    who.tenant,
                    "steps_per_second",
                    rate,
                    f"steps_per_second of {what} must stay within {rate:g}, {limits.most_steps} at once; {steps} came",
                    delay_s,
                )
            taken.append(bucket)
        names = [name for _, name, limits in scopes if limits.bytes_in_flight is not None]
        for name in names:
            self._bytes[name] += byte_count
        self._steps[self._label(who.tenant)] += steps

        def release() -> None:
            for name in names:
                self._bytes[name] -= byte_count
                if not self._bytes[name]:
                    del self._bytes[name]

        return release

    def charge_change(self, change: Change) -> tuple[list[tuple[Members, ServerError]], Callable[[], None]]:
        """Charge those who ask for a checked step; the members that are refused leave it.

        Returns:
            What is refused, and what is to be called when the change has ended.

        Raises:
            QuotaExceeded, InvalidInput: all is refused, for one reason.
        """
        refused: list[tuple[Members, ServerError]] = []
        releases: list[Callable[[], None]] = []
        groups = list(_by_caller(change))
        row_bytes = change.byte_count // max(1, change.row_count)
        for who, members in groups:
            rows = int(change.sizes[members].sum())
            try:
                releases.append(
                    self.charge(who, 0 if change.reset else rows * change.steps, rows * row_bytes)
                )
            except (QuotaExceeded, InvalidInput) as error:
                if len(groups) == 1 and change.callers is None:
                    raise
                refused.append((members, error))
        if refused:
            gone = np.concatenate([members for members, _ in refused])
            change.members = np.setdiff1d(change.members, gone)

        def release() -> None:
            for each in releases:
                each()

        return refused, release

    def _scopes(self, who: Caller) -> list[_Scope]:
        table, name = self._table, str(who)
        scopes: list[_Scope] = [(_named(who.tenant), f"{who.tenant}/", table.of_tenant(who.tenant))]
        own = table.callers.get(name) if name else None
        if own is not None:
            scopes.append((f"caller {name!r}", name, own))
        return scopes

    # -------------------------------------------------------------------------------------------------------- metrics

    def counts(self) -> TenantCounts:
        """What there is and was, by label."""
        sessions: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for tenant, (count, own_rows) in self.tenants().items():
            sessions[self._label(tenant)] += count
            rows[self._label(tenant)] += own_rows
        labels = self._labels.values()
        for label in labels:
            sessions[label] += 0
            rows[label] += 0
        steps = dict.fromkeys(labels, 0) | self._steps
        refused = {(label, quota): 0 for label in labels for quota in QUOTAS} | self._refused
        return TenantCounts(sessions, rows, steps, refused)

    def tenants(self) -> Mapping[str, tuple[int, int]]:
        """Sessions and rows of each tenant that has some; where others use the store, of those that are known here."""
        if self._shared is not None:
            known = {tenant: self._shared.about(tenant) for tenant in self._shared.tenants()}
            return {tenant: has for tenant, has in known.items() if has[0]}
        return {tenant: (count, self._rows[tenant]) for tenant, count in self._sessions.items()}

    def _label(self, tenant: str) -> str:
        label = self._labels.get(tenant)
        if label is None:
            if len(self._labels) >= self._most_labels:
                return OTHER
            label = self._labels[tenant] = tenant
        return label

    def _exceeded(self, tenant: str, quota: str, most: float, message: str, delay_s: float) -> QuotaExceeded:
        self._refused[self._label(tenant), quota] += 1
        return QuotaExceeded(message, retry_after_s=delay_s, quota=quota, limit=f"{most:g}")


def _named(tenant: str) -> str:
    return f"tenant {tenant!r}" if tenant else "all callers together"


def _by_caller(change: Change) -> Iterable[tuple[Caller, Members]]:
    if change.whos is None:
        return [(change.who, change.members)]
    found: dict[Caller, list[int]] = {}
    for member in change.members.tolist():
        found.setdefault(change.whos[member], []).append(member)
    return [(who, np.array(own, np.intp)) for who, own in found.items()]
