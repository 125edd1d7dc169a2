"""How many sessions the store has: in all, of each model, and of tenants.

A store counts by names (`LocalStore.count_of`): that of a model, which counts everybody's; of a tenant `TENANT<US>` and
`TENANT<US>MODEL`; of all tenants together `<US>` and `<US>MODEL`. So what is no tenant's is the difference, and a folder
from before there were tenants has the right counts.

A store that others use counts rows too, as no server knows those of all sessions: `<US><US>TENANT`, and `<US><US>` of
those of none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from stepwell_server.core.namespaces import SEPARATOR, tenant_of
from stepwell_server.store.base import Store


def of_tenants(sessions: Iterable[tuple[str, str]], by: int) -> list[tuple[str, int]]:
    """`Batch.tenant_counts` of sessions, each with its id and its model, that begin (1) or end (-1)."""
    counts: Counter[str] = Counter()
    for session_id, model in sessions:
        if SEPARATOR in session_id:
            tenant = tenant_of(session_id)
            counts.update(f"{whose}{SEPARATOR}{name}" for whose in ("", tenant) for name in ("", model))
    return [(name, by * count) for name, count in counts.items()]


def of_rows(sessions: Iterable[tuple[str, int]], by: int) -> list[tuple[str, int]]:
    """By how much counts of rows change when sessions begin (1) or end (-1), each with its id and its rows."""
    counts: Counter[str] = Counter()
    for session_id, rows in sessions:
        counts[rows_of(tenant_of(session_id))] += rows
    return [(name, by * count) for name, count in counts.items()]


def rows_of(tenant: str) -> str:
    """The name by which a store that others use counts the rows of a tenant's sessions; empty: of those of none."""
    return f"{SEPARATOR}{SEPARATOR}{tenant}"


async def count(store: Store, tenant: str | None, model: str) -> int:
    """How many sessions a tenant has (empty: those of none; None: everybody's), of a model (empty: of all)."""
    if tenant:
        return await store.count_of(f"{tenant}{SEPARATOR}{model}")
    everybodys = await (store.count_of(model) if model else store.count())
    if tenant is None:
        return everybodys
    return everybodys - await store.count_of(f"{SEPARATOR}{model}")
