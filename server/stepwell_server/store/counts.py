"""What the store has: sessions in all, of each model, and of tenants; and of a session, what counts for quotas.

A store counts by names (`LocalStore.count_of`): that of a model, which counts everybody's; of a tenant `TENANT<US>` and
`TENANT<US>MODEL`; of all tenants together `<US>` and `<US>MODEL`. So what is no tenant's is the difference, and a folder
from before there were tenants has the right counts.

A store that others use counts rows and bytes too, as no server knows those of all sessions: rows `<US><US>TENANT`,
bytes `<US><US><US>TENANT`, with an empty name those of none.

The bytes of a session are those of its rows (state and last output), of a last reply that is kept as arrays, and of
extension fields that are not the server's own (`fields.counted_bytes`), and `SESSION_BYTES` for everything else. That
follows from the record alone, and stays the same when the record is encrypted or carried.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable

from stepwell_server.core.namespaces import SEPARATOR, tenant_of
from stepwell_server.core.quotas import SESSION_BYTES, Usage
from stepwell_server.store.base import Store
from stepwell_server.store.fields import counted_bytes
from stepwell_server.store.heads import heads_of
from stepwell_server.store.record import Header, RecordBytes, header_or_none


def of_tenants(sessions: Iterable[tuple[str, str]], by: int) -> list[tuple[str, int]]:
    """Return `Batch.tenant_counts` after `by` sessions of each id and model begin, or end if `by` is negative."""
    counts: dict[str, int] = {}
    for session_id, model in sessions:
        for whose in ("", tenant_of(session_id)) if SEPARATOR in session_id else ():
            for name in (f"{whose}{SEPARATOR}", f"{whose}{SEPARATOR}{model}"):
                counts[name] = counts.get(name, 0) + by
    return list(counts.items())


def usage_of(header: Header) -> Usage:
    """Return what a session uses, by the header of its record."""
    extra_bytes = header.state_bytes + counted_bytes(header.fields)
    return Usage(1, header.batch_size, SESSION_BYTES + extra_bytes)


def usage_of_record(session_id: str, stored: RecordBytes) -> tuple[int, Usage]:
    """Return a record's revision and what the session uses; of a corrupt record 0, and what was counted for it."""
    header = header_or_none(session_id, stored)
    if header is None:
        return 0, heads_of([session_id.encode()], [stored]).usage(0)
    return header.revision, usage_of(header)


def of_usage(sessions: Iterable[tuple[str, Usage]]) -> list[tuple[str, int]]:
    """Return the changes of the row and byte counts, given each session's change in usage."""
    counts: Counter[str] = Counter()
    for session_id, usage in sessions:
        tenant = tenant_of(session_id)
        counts[rows_of(tenant)] += usage.rows
        counts[bytes_of(tenant)] += usage.bytes
    return list(counts.items())


def rows_of(tenant: str) -> str:
    """Return the name under which a shared store counts the rows of a tenant's sessions; empty: of sessions without one."""
    return f"{SEPARATOR}{SEPARATOR}{tenant}"


def bytes_of(tenant: str) -> str:
    """As `rows_of`, for bytes."""
    return f"{SEPARATOR}{rows_of(tenant)}"


async def count(
    store: Store, tenant: str | None, model: str, everybody: Callable[[], Awaitable[int]] | None = None
) -> int:
    """Count the sessions of a tenant (empty: without a tenant; None: all) and a model (empty: all).

    `everybody` counts all sessions; the default counts those with a record.
    """
    if tenant:
        return await store.count_of(f"{tenant}{SEPARATOR}{model}")
    everybodys = await (store.count_of(model) if model else (everybody or store.count)())
    if tenant is None:
        return everybodys
    return everybodys - await store.count_of(f"{SEPARATOR}{model}")


async def usage_of_tenant(store: Store, tenant: str) -> Usage:
    """Return what all sessions of a tenant use, in a store that counts rows and bytes."""
    sessions, rows, byte_count = await asyncio.gather(
        count(store, tenant, ""), store.count_of(rows_of(tenant)), store.count_of(bytes_of(tenant))
    )
    return Usage(sessions, rows, byte_count)
