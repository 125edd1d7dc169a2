"""How many sessions the store has: in all and of each model, and the same of each tenant and of all tenants together.

The names of what is counted: `MODEL`; of a tenant `TENANT<US>` and `TENANT<US>MODEL`; of all tenants `<US>` and
`<US>MODEL`. So what is no tenant's is the difference, and a folder from before there were tenants has the right counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stepwell_server.core.namespaces import SEPARATOR, tenant_of
from stepwell_server.store.base import Store

Counts = list[tuple[str, int]]
"""As `Batch.counts`."""


def changed(session_ids: Sequence[str], model: str, by: int) -> Counts:
    """The counts of sessions of a model that begin (1) or end (-1)."""
    if SEPARATOR not in "".join(session_ids):
        return [(model, by * len(session_ids))]
    counts: Counter[str] = Counter()
    for tenant, count in Counter(map(tenant_of, session_ids)).items():
        counts[model] += count * by
        for whose in ("", tenant) if tenant else ():
            counts[f"{whose}{SEPARATOR}"] += count * by
            counts[f"{whose}{SEPARATOR}{model}"] += count * by
    return list(counts.items())


async def count(store: Store, tenant: str | None, model: str) -> int:
    """How many sessions a tenant has (empty: those of none; None: everybody's), of a model (empty: of all)."""
    if tenant:
        return await store.count_of(f"{tenant}{SEPARATOR}{model}")
    everybodys = await (store.count_of(model) if model else store.count())
    if tenant is None:
        return everybodys
    return everybodys - await store.count_of(f"{SEPARATOR}{model}")
