"""Merging batches, so that a store commits several of them together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from stepwell_server.store.base import NO_LIMITS, Batch, Write, as_server_error
from stepwell_server.store.record import F64, JoinedPuts, RecordBytes

#: The maximum of records in one transaction, unless a single batch has more.
MAX_RECORDS = 8192


def fail(writes: Sequence[Write], error: Exception) -> None:
    """Set the same error on all these writes."""
    why = as_server_error(error)
    for write in writes:
        write.error = why


def keep(writes: Sequence[Write], commit: Callable[[Batch], None]) -> None:
    """Build the batches and commit them in as few transactions as their order allows; each write gets its own error."""
    for write in writes:
        write.make()
    groups = deque(groups_of([write for write in writes if write.error is None]))
    while groups:
        group = groups.popleft()
        try:
            commit(merged([write.batch for write in group]))
        except Exception as error:
            if len(group) == 1:
                group[0].error = as_server_error(error)
            else:  # one by one: a full disk may have room for the end of a session, but not for a new one
                groups.extendleft([write] for write in reversed(group))


def groups_of(writes: Iterable[Write]) -> list[list[Write]]:
    """Group neighbours that may share a transaction. A batch that names a session deleted by another comes later."""
    groups: list[list[Write]] = []
    gone: set[str] = set()
    for write in writes:
        batch = write.batch
        named = [*batch.forgets, *(put[0] for put in batch.puts)] if gone else ()
        if not groups or not gone.isdisjoint(named):
            groups.append([])
            gone = set()
        groups[-1].append(write)
        gone.update(batch.deletes)
        gone.update(stone.session_id for stone in batch.tombstones)
    return groups


def merged(batches: Sequence[Batch]) -> Batch:
    """Return one batch with the effect of these batches in order. `groups_of` decides which may be merged."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        puts=JoinedPuts([part for batch in batches for part in _parts(batch.puts)]),
        deletes=[name for batch in batches for name in batch.deletes],
        forgets=[name for batch in batches for name in batch.forgets],
        tombstones=[stone for batch in batches for stone in batch.tombstones],
        counts=[count for batch in batches for count in batch.counts],
        tenant_counts=[count for batch in batches for count in batch.tenant_counts],
        documents=[document for batch in batches for document in batch.documents],
        goes_back=any(batch.goes_back for batch in batches),
        follows=np.concatenate([batch.follows for batch in batches]),
        stamps=np.concatenate([batch.stamps for batch in batches]),
        resized=[name for batch in batches for name in batch.resized],
        delete_follows=np.concatenate([batch.delete_follows for batch in batches]),
        undoes=[name for batch in batches for name in batch.undoes],
        min_idle_s=_limits([batch.min_idle_s for batch in batches], batches, 0.0),
        max_idle_s=_limits([batch.max_idle_s for batch in batches], batches, np.inf),
        documents_follow={name: was for batch in batches for name, was in batch.documents_follow.items()},
    )


def _limits(limits: Sequence[F64], batches: Sequence[Batch], none: float) -> F64:
    """Return the limits of all deletions; a batch without limits contributes `none` for each of its deletions."""
    if not any(map(len, limits)):
        return NO_LIMITS
    return np.concatenate(
        [
            each if len(each) else np.full(len(batch.deletes), none)
            for each, batch in zip(limits, batches, strict=True)
        ]
    )


def _parts(puts: Sequence[tuple[str, RecordBytes]]) -> Sequence[Sequence[tuple[str, RecordBytes]]]:
    return puts.parts if isinstance(puts, JoinedPuts) else [puts] if puts else ()
