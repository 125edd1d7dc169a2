"""Ids that the server makes: which cannot be guessed, which follow from the request, and in which namespace."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from stepwell_server.core.scheduler import LoopQueue
from stepwell_server.engine.sessions.directory import MAX_ID_LENGTH, IdMaker, require_session_id, shown
from stepwell_server.engine.threads import Pieces
from stepwell_server.errors import InvalidInput
from stepwell_server.store.memory import MemoryStore
from support.stores.fake_shared_store import RemoteStore

NAMESPACES = ["", "acme\x1f"]
FOREIGN = "s-00000000-" + "A" * 22


@pytest.fixture
def ids() -> IdMaker:
    return IdMaker(RemoteStore(MemoryStore()))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("request_id", [0, 5])
async def test_ids_of_one_call_lie_together_and_tell_nothing_of_each_other(
    ids: IdMaker, namespace: str, request_id: int
) -> None:
    made = await ids.make_many(
        request_id, 4096, Pieces(LoopQueue(asyncio.get_running_loop().call_soon)), namespace=namespace
    )
    assert made == sorted(set(made))
    (common,) = {one[:-22] for one in made}
    assert common.startswith(f"{namespace}s-")
    parts = [one[-22:] for one in made]
    # Of 4,096 random numbers of 128 bits no two are alike in their first 66 bits, or in their last 62: an
    # exception is to be expected once in 100,000 million runs.
    assert len({part[:11] for part in parts}) == len({part[-11:] for part in parts}) == 4096
    assert all(ids.is_generated(one) and not ids.is_from_elsewhere(one) for one in made)
    assert all(len(one) <= MAX_ID_LENGTH for one in made)


@pytest.mark.parametrize("namespace", NAMESPACES)
async def test_ids_follow_from_the_request_the_namespace_and_the_sources(
    ids: IdMaker, namespace: str
) -> None:
    pieces = Pieces(LoopQueue(asyncio.get_running_loop().call_soon))

    async def made(
        maker: IdMaker = ids,
        request_id: int = 5,
        count: int = 3,
        sources: Sequence[str] = (),
        whose: str = namespace,
    ) -> set[str]:
        one = maker.make(request_id, " ".join(sources), namespace=whose)
        return {one, *await maker.make_many(request_id, count, pieces, sources, namespace=whose)}

    first = await made()
    assert await made() == first
    assert first < await made(count=9)
    others = [
        await made(request_id=6),
        await made(whose="zeta\x1f"),
        await made(whose="5\x1f"),
        await made(sources=["a"]),
        await made(sources=["a", "b"]),
        await made(IdMaker(RemoteStore(MemoryStore()))),
        await made(request_id=0),
        await made(request_id=0),
    ]
    assert len(set().union(first, *others)) == 4 * (1 + len(others))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_ids_of_earlier_releases_are_known(ids: IdMaker, namespace: str) -> None:
    for made in (FOREIGN, f"{FOREIGN}-00ff", f"{FOREIGN}abcd"):
        assert ids.is_generated(namespace + made)
        assert ids.is_from_elsewhere(namespace + made)
    for chosen in (
        "s-00000000-short",
        f"{FOREIGN}abc",
        f"{FOREIGN}-00fg",
        "user",
        f"acme\x1f{namespace}{FOREIGN}x",
    ):
        assert not ids.is_generated(namespace + chosen)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_limits_are_those_of_what_the_caller_says(namespace: str) -> None:
    require_session_id("session_id", namespace + "x" * MAX_ID_LENGTH)
    for bad in ("", " a", "a ", "a\nb", "x" * (MAX_ID_LENGTH + 1), "a\x1fb"):
        if not namespace and "\x1f" in bad:
            continue  # what a caller without a tenant says so is in nobody's namespace: `namespaces.inner`
        with pytest.raises(InvalidInput, match=r"^session_id must be 1 to 256 printable"):
            require_session_id("session_id", namespace + bad)
    assert shown(namespace + "x" * 300) == f"300 characters, {'x' * 32!r}..."
