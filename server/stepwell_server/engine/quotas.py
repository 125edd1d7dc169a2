"""Enforces quotas: charges sessions when they begin, and steps when they arrive.

Sessions, their rows and bytes count for the tenant in the session's id. They also count for the caller that created
the session, if it had such a quota at that time; the session's record then names it. Steps and bytes in flight
count for the tenant and the caller that send them. A step that is sent again is charged again.

Where other servers use the store, sessions, rows and bytes are counted over all servers (`UsageCounts`). Steps and
bytes in flight are counted by each server on its own.

Bytes are the sessions' size in the store (`store.counts`). They grow when sessions begin, and when the reply of a
step is kept as arrays. Such a step is charged for the most it may add when it arrives, and the session for what it
did add once that is stored.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.clock import Clock
from stepwell_server.core.callers import Caller
from stepwell_server.core.namespaces import tenant_of
from stepwell_server.core.quotas import NO_LIMITS, NOTHING, Buckets, Limits, QuotaTable, TokenBucket, Usage
from stepwell_server.engine.change import Change
from stepwell_server.engine.state.fields import owner_of
from stepwell_server.engine.types import Members
from stepwell_server.engine.usage_counts import UsageCounts
from stepwell_server.errors import InvalidInput, QuotaExceeded, ServerError
from stepwell_server.logs import Log
from stepwell_server.store.base import Store

#: A session's end cannot be predicted, so the retry delay is fixed.
_SESSIONS_RETRY_S, _BYTES_RETRY_S = 1.0, 0.05
#: How often the tenants' usage is read from a shared store for display, in seconds.
_LOOK_S = 15.0
#: Records counted in one batch; other work runs between batches.
_COUNT_BATCH_SIZE = 2000
_log = Log("engine.quotas")
QUOTAS = ("sessions", "rows", "bytes", "steps_per_second", "bytes_in_flight", "models")
OTHER = "other"
"""The metrics label of tenants without a label of their own."""


@dataclasses.dataclass(frozen=True, slots=True)
class TenantCounts:
    """The figures for metrics, by tenant label."""

    sessions: Mapping[str, int]
    rows: Mapping[str, int]
    bytes: Mapping[str, int]
    steps: Mapping[str, int]
    refused: Mapping[tuple[str, str], int]
    """By tenant and quota."""


_Scope = tuple[str, str, Limits]
"""A tenant or caller that is charged: its name for messages, its key and its quotas."""


class Quotas:
    """Usage and quotas of tenants and callers. Lives on the event loop."""

    def __init__(self, table: QuotaTable, clock: Clock, max_labels: int = 100) -> None:
        """The first `max_labels` tenants get a metrics label of their own.

        Tenants in the table come first, then the others in order of appearance.
        """
        self._clock = clock
        self._most_labels = max_labels
        self._labels: dict[str, str] = {}
        self._buckets = Buckets()
        self._bytes: Counter[str] = Counter()
        self._counts = UsageCounts(clock)
        """What tenants use."""
        self._growing: Counter[str] = Counter()
        """Bytes that active steps may add to sessions, by tenant."""
        self._owners: dict[str, str] = {}
        """Callers by the sessions that they created and that count for them."""
        self._of_callers: dict[str, Usage] = {}
        """The usage of those callers."""
        self._steps: Counter[str] = Counter()
        self._refused: Counter[tuple[str, str]] = Counter()
        self.use(table)

    def use(self, table: QuotaTable) -> None:
        """Replace the quotas."""
        self._table = table
        for tenant in table.tenants:
            self._label(tenant)

    async def count(self, store: Store) -> None:
        """At start, count the sessions of a store that does not count them itself."""
        self._counts.store, after = store, ""
        while len(heads := await store.uncounted(after=after, limit=_COUNT_BATCH_SIZE)):
            ids = [str(key, "utf-8", "replace") for key in heads.keys]
            after = ids[-1]
            for place, fields in heads.fields.items():
                if owner := owner_of(fields):
                    self._own(owner, [ids[place]], heads.usage(place))
            for place, session_id in enumerate(ids):
                self._change(tenant_of(session_id), heads.usage(place))
            await asyncio.sleep(0)
        await self._refresh_shown()

    # ------------------------------------------------------------------------------------------------------- sessions

    def owner(self, caller: Caller, session_id: str = "") -> str:
        """The caller for whom new sessions count besides their tenant; empty: none.

        A session that replaces another one of its id keeps the owner.
        """
        if session_id in self._owners:
            return self._owners[session_id]
        limits = self._table.callers.get(str(caller)) if caller.name else None
        return str(caller) if limits is not None and limits.counts_sessions else ""

    def begin(self, session_ids: Sequence[str], each: Usage, owner: str = "") -> None:
        """Count sessions of one tenant before they are created; `made` or `cancel` must follow.

        `each` is the usage of each session; for `owner` see `owner`.

        Raises:
            QuotaExceeded: there would be too many; none is counted.
        """
        tenant, more = tenant_of(session_ids[0]), each * len(session_ids)
        self._require_usage(tenant, owner, more)
        if owner:
            self._own(owner, session_ids, each)
        self._counts.add_pending(tenant, more)

    def made(self, session_ids: Sequence[str], each: Usage) -> None:
        """Confirm that the store has counted sessions of one tenant."""
        tenant, more = tenant_of(session_ids[0]), each * len(session_ids)
        self._counts.begin(tenant, more)
        self._counts.add_pending(tenant, more * -1)

    def cancel(self, session_ids: Sequence[str], each: Usage) -> None:
        """Undo the count of sessions of one tenant that were probably not created.

        If only the answer of a shared store was lost, it may have them. They then count until the store is asked
        again.
        """
        self.made(session_ids, each)
        self.end((session_id, each) for session_id in session_ids)

    def end(self, sessions: Iterable[tuple[str, Usage]]) -> None:
        """Report that sessions have ended: their ids, and the usage of each."""
        for session_id, usage in sessions:
            self._change(tenant_of(session_id), usage * -1)
            if self._owners and (owner := self._owners.pop(session_id, "")):
                self._of_callers[owner] -= usage
                if not self._of_callers[owner].sessions:
                    del self._of_callers[owner]

    def change(self, session_id: str, more: Usage) -> None:
        """Change a session's usage by `more`, which may be negative.

        Raises:
            QuotaExceeded: it would be too much, and is not counted.
        """
        owner = self._owners.get(session_id, "")
        self._require_usage(tenant_of(session_id), owner, more)
        self._change(tenant_of(session_id), more)
        if owner:
            self._of_callers[owner] += more

    def resized(self, sessions: Iterable[tuple[str, int]]) -> None:
        """Report that sessions take this many bytes more or less in the store."""
        by_tenant: Counter[str] = Counter()
        for session_id, more in sessions:
            by_tenant[tenant_of(session_id)] += more
            if self._owners and (owner := self._owners.get(session_id, "")):
                self._of_callers[owner] += Usage(bytes=more)
        for tenant, more in by_tenant.items():
            self._change(tenant, Usage(bytes=more))

    def callers(self) -> Mapping[str, Usage]:
        """The usage of each caller whose sessions are counted."""
        return dict(self._of_callers)

    def _own(self, owner: str, session_ids: Sequence[str], each: Usage) -> None:
        self._owners.update(dict.fromkeys(session_ids, owner))
        self._of_callers[owner] = self._of_callers.get(owner, NOTHING) + each * len(session_ids)

    def _require_usage(self, tenant: str, owner: str, more: Usage) -> None:
        """Refuse usage beyond the quota of a tenant, or of a caller of it."""
        there = self._counts.upper_bound(tenant) + Usage(bytes=self._growing[tenant])
        scopes = [(_named(tenant), self._table.of_tenant(tenant), there)]
        if owner:
            own = self._table.callers.get(owner, NO_LIMITS), self._of_callers.get(owner, NOTHING)
            scopes.append((f"caller {owner!r}", *own))
        for whose, limits, has in scopes:
            for quota in ("sessions", "rows", "bytes"):
                most, wanted, found = getattr(limits, quota), getattr(more, quota), getattr(has, quota)
                if most is not None and wanted > 0 and found + wanted > most:
                    raise self._exceeded(
                        tenant,
                        quota,
                        most,
                        f"{quota} of {whose} must stay within {most}; there are {found}, and this call adds {wanted}",
                        _SESSIONS_RETRY_S,
                    )

    async def refresh(self, session_ids: Iterable[str]) -> None:
        """Update the usage of tenants whose sessions are about to begin.

        Raises:
            Unavailable: the store cannot be asked now.
        """
        for tenant in {tenant_of(session_id) for session_id in session_ids}:
            limits = self._table.of_tenant(tenant)
            if limits.counts_sessions:
                await self._counts.refresh(tenant)

    async def run(self) -> None:
        """Update tenants' usage for display from time to time, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._refresh_shown()
            except ServerError as error:
                _log.warning("could not read the tenants' usage from the store", error=error)

    async def _refresh_shown(self) -> None:
        """Update the usage of the tenants for metrics. No file names the sessions without a tenant, which may be old."""
        await self._counts.refresh_all({"", *self._labels.values(), *self._table.tenants})

    def _change(self, tenant: str, more: Usage) -> None:
        self._counts.begin(tenant, more.positive())
        self._counts.end(tenant, (more * -1).positive())

    def require_model(self, tenant: str, has: int) -> None:
        """Refuse another version of a model to a tenant whose admins have loaded `has` already.

        Raises:
            QuotaExceeded: the tenant's quota is used up.
        """
        most = self._table.of_tenant(tenant).models
        if most is not None and has >= most:
            what = (
                f"models of {_named(tenant)} must stay within {most}; there are {has}, and this call adds 1"
            )
            raise self._exceeded(tenant, "models", most, what, _SESSIONS_RETRY_S)

    # ---------------------------------------------------------------------------------------------------------- steps

    def charge(self, caller: Caller, steps: int, byte_count: int) -> Callable[[], None]:
        """Charge a caller for steps, and for bytes until the returned function is called.

        Raises:
            QuotaExceeded: it is too much at present; nothing is charged.
            InvalidInput: it exceeds the quota by itself.
        """
        now, scopes = self._clock.monotonic(), self._scopes(caller)
        for what, name, limits in scopes:
            if limits.steps_per_second is not None and steps > limits.max_steps:
                raise InvalidInput(
                    f"steps of one request (rows times time steps) must be at most the burst of the quota"
                    f" steps_per_second of {what}, {limits.max_steps}; got {steps}: send fewer at once"
                )
            most = limits.bytes_in_flight
            if most is not None and byte_count > most:
                raise InvalidInput(
                    f"inputs of one request must have at most the bytes of the quota bytes_in_flight of {what}, {most};"
                    f" got {byte_count}: send fewer at once"
                )
            if most is not None and self._bytes[name] + byte_count > most:
                raise self._exceeded(
                    caller.tenant,
                    "bytes_in_flight",
                    most,
                    f"bytes_in_flight of {what} must stay within {most}; {self._bytes[name]} are in flight, and this call adds {byte_count}",
                    _BYTES_RETRY_S,
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
                    caller.tenant,
                    "steps_per_second",
                    rate,
                    f"steps_per_second of {what} must stay within {rate:g}, with at most {limits.max_steps} at once; this call has {steps}",
                    delay_s,
                )
            taken.append(bucket)
        names = [name for _, name, limits in scopes if limits.bytes_in_flight is not None]
        for name in names:
            self._bytes[name] += byte_count
        self._steps[self._label(caller.tenant)] += steps

        def release() -> None:
            for name in names:
                self._bytes[name] -= byte_count
                if not self._bytes[name]:
                    del self._bytes[name]

        return release

    def charge_change(
        self, change: Change, growth: npt.NDArray[np.int64] | None = None
    ) -> tuple[list[tuple[Members, ServerError]], Callable[[], None]]:
        """Charge the callers of a checked step; refused members leave it.

        Args:
            change: The step.
            growth: The most bytes each member may grow by, `(size,)`; None: none.

        Returns:
            The refused members and their errors, and a function to call when the change has ended.

        Raises:
            QuotaExceeded, InvalidInput: all members are refused for one reason.
        """
        refused: list[tuple[Members, ServerError]] = []
        releases: list[Callable[[], None]] = []
        groups = list(_by_caller(change))
        row_bytes = change.byte_count // max(1, change.row_count)
        for caller, members in groups:
            rows = int(change.sizes[members].sum())
            try:
                grown = {} if growth is None else self._growth(change, members, growth)
                releases.append(
                    self.charge(caller, 0 if change.reset else rows * change.steps, rows * row_bytes)
                )
            except (QuotaExceeded, InvalidInput) as error:
                if len(groups) == 1 and change.connections is None:
                    raise
                refused.append((members, error))
                continue
            if grown:
                self._growing.update(grown)
                releases.append(functools.partial(self._grown, grown))
        if refused:
            gone = np.concatenate([members for members, _ in refused])
            change.members = np.setdiff1d(change.members, gone)

        def release() -> None:
            for each in releases:
                each()

        return refused, release

    def _growth(self, change: Change, members: Members, growth: npt.NDArray[np.int64]) -> Mapping[str, int]:
        """How many bytes the sessions of some members may grow by, by tenant.

        Raises:
            QuotaExceeded: a tenant, or the caller that created sessions, has no room for it.
        """
        tenants: Counter[str] = Counter()
        owners: Counter[tuple[str, str]] = Counter()
        for member in members[growth[members] > 0].tolist():
            session_id, more = change.session_ids[member], int(growth[member])
            tenants[tenant_of(session_id)] += more
            if self._owners and (owner := self._owners.get(session_id, "")):
                owners[tenant_of(session_id), owner] += more
        for tenant, more in tenants.items():
            if self._table.of_tenant(tenant).bytes is not None:
                self._counts.look(tenant)
            self._require_usage(tenant, "", Usage(bytes=more))
        for (tenant, owner), more in owners.items():
            self._require_usage(tenant, owner, Usage(bytes=more))
        return tenants

    def _grown(self, grown: Mapping[str, int]) -> None:
        """Release the bytes reserved for growth."""
        self._growing.subtract(grown)
        for tenant in grown:
            if not self._growing[tenant]:
                del self._growing[tenant]

    def _scopes(self, caller: Caller) -> list[_Scope]:
        table, name = self._table, str(caller)
        scopes: list[_Scope] = [(_named(caller.tenant), f"{caller.tenant}/", table.of_tenant(caller.tenant))]
        own = table.callers.get(name) if name else None
        if own is not None:
            scopes.append((f"caller {name!r}", name, own))
        return scopes

    # -------------------------------------------------------------------------------------------------------- metrics

    def counts(self) -> TenantCounts:
        """Current and past figures, by label."""
        has: dict[str, Usage] = {}
        for tenant, usage in self.tenants().items():
            label = self._label(tenant)
            has[label] = has.get(label, NOTHING) + usage
        labels = self._labels.values()
        has = dict.fromkeys(labels, NOTHING) | has
        steps = dict.fromkeys(labels, 0) | self._steps
        refused = {(label, quota): 0 for label in labels for quota in QUOTAS} | self._refused
        return TenantCounts(
            {label: usage.sessions for label, usage in has.items()},
            {label: usage.rows for label, usage in has.items()},
            {label: usage.bytes for label, usage in has.items()},
            steps,
            refused,
        )

    def tenants(self) -> Mapping[str, Usage]:
        """The usage of each tenant known to have sessions."""
        known = {tenant: self._counts.estimate(tenant) for tenant in self._counts.tenants()}
        return {tenant: has for tenant, has in known.items() if has.sessions}

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
    if change.callers is None:
        return [(change.caller, change.members)]
    found: dict[Caller, list[int]] = {}
    for member in change.members.tolist():
        found.setdefault(change.callers[member], []).append(member)
    return [(caller, np.array(own, np.intp)) for caller, own in found.items()]
