"""Two servers of versions of `plain` that share a store, and what it has of them."""

from __future__ import annotations

import json
from typing import Any

from stepwell_server.engine.state.fields import Mark, mark_of
from stepwell_server.engine.versions import document
from stepwell_server.store.record import decode_header
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, fails
from support.engine.two_engines import serving_two
from support.engine.versions import weights
from support.stores.gates import Gated


def two_versions(**options: Any) -> Any:
    """Both servers have versions 1, the default, and 2."""
    return serving_two({"plain": PLAIN}, **options)


async def load_2(*servers: Harness) -> None:
    for at in servers:
        await at.engine.load_version("plain", 2, weights(2), source="2.keras")


def hold_commits(store: Gated) -> Any:
    """Hold commits back; return a wait for the next one."""
    store.commits_held = True
    return store.until("commit", len(store.asked("commit")) + 1)


async def stored_versions(at: Harness) -> dict[str, Any]:
    """The model's entry in the store."""
    content = (await at.store.inner.documents())[document.name_of("plain")]
    found: dict[str, Any] = json.loads(content)
    return found


async def record_of(at: Harness, session_id: str) -> Mark | None:
    """A session's version in the store."""
    stored = (await at.store.found(session_id))[0].record
    assert stored is not None
    return mark_of(decode_header(session_id, stored).fields)


async def fails_exactly(call: Any, kind: type[Exception], match: str = ".") -> None:
    """A call must end with an error of this class, and no subclass of it."""
    assert type(await fails(call, kind, match)) is kind
