"""Looking after many sessions with both clients, against the real server: lists, closing, moving, limits for being idle."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell._admin.session_file import read
from support.sdk.client_kinds import SHELLS, connect
from support.sdk.scripted_server import MODEL, ScriptedServer
from support.servers.served import Served, local_server

WAIT_S = 100.0


@pytest.fixture(params=SHELLS)
async def client(request: pytest.FixtureRequest, served: Served) -> AsyncIterator[Any]:
    async with connect(request.param, served.address, timeout_s=WAIT_S) as client:
        yield client


async def gone_through(found: Any) -> list[str]:
    """The ids of a list that is read page by page."""
    if hasattr(found, "__aiter__"):
        return [info.session_id async for info in found]
    return [info.session_id for info in await found]


async def test_a_list_is_read_as_it_is_used_and_is_a_list_all_the_same(served: Served) -> None:
    with stepwell.connect(served.address) as client, client.open_sessions("seq", 2300) as group:
        prefix = group.ids[0][: len("s-12345678-made")]  # what the ids of one call begin with
        found = client.sessions(prefix=prefix)
        assert "1000 sessions, more are read as you iterate" in repr(found)
        first = next(iter(found))
        assert (first.session_id, bool(found)) == (group.ids[0], True)
        assert [info.session_id for info in found] == sorted(group.ids)
        client.close_session(group.ids[7])
        assert len(list(found)) == len(found) == 2299
        assert found[0].session_id == group.ids[0]
        assert [info.session_id for info in found[:2]] == list(group.ids[:2])
        client.close_session(group.ids[8])
        assert len(found) == 2299, "what was read whole does not change any more"
        assert found == list(found)
        assert found != []
        assert not client.sessions(prefix="nobody-")
        assert client.sessions(prefix="nobody-") == []
        assert len(client.sessions(prefix=prefix, limit=1500)) == 1500
        assert client.count_sessions(prefix=prefix) == 2298
        async with stepwell.aio.connect(served.address) as other:
            ids = [info.session_id async for info in other.sessions(prefix=prefix)]
            assert ids == [info.session_id for info in await other.sessions(prefix=prefix)]
            assert ids == [info.session_id for info in client.sessions(prefix=prefix)]
            assert len(await other.sessions(prefix=prefix, limit=3)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit must be"),
        ({"idle_longer_s": -1}, "idle_longer_s must be from 0 to 1e11; got -1"),
        ({"idle_longer_s": "1h"}, "idle_longer_s must be a number of seconds; got '1h'"),
    ],
)
async def test_bad_arguments_of_lists(client: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(stepwell.InvalidInputError, match=message):
        await client.sessions(**arguments)


async def test_filters_and_closing(client: Any) -> None:
    names = [f"order-{number}" for number in (3, 1, 2)]
    for name in names:
        await client.open_session("seq", session_id=name)
    await (await client.open_session("seq", session_id="order-1")).get_state()
    assert await gone_through(client.sessions(prefix="order-")) == sorted(names)
    assert await gone_through(client.sessions(prefix="order-", limit=1)) == ["order-1"]
    assert await gone_through(client.sessions(prefix="order-", idle_longer_s=3600)) == []
    for arguments in (
        {},
        {"session_ids": names, "prefix": "order-"},
        {"prefix": "order-", "everything": True},
    ):
        with pytest.raises(
            stepwell.InvalidInputError, match="close_sessions must have exactly one of session_ids, a filter"
        ):
            await client.close_sessions(**arguments)
    with pytest.raises(stepwell.InvalidInputError, match="session_ids must be a list of ids; got 'order-1'"):
        await client.close_sessions("order-1")
    with pytest.raises(stepwell.InvalidInputError, match="session_ids must be a list of ids; got 'order-1'"):
        await client.export_sessions("unwritten.sessions", "order-1")
    told: list[int] = []
    assert await client.close_sessions(prefix="order-", model="gru") == 0
    assert await client.close_sessions(["order-3", "nobody"], progress=told.append) == 1
    assert await client.close_sessions(prefix="order-", progress=told.append) == 2
    assert told == [1, 2]


async def test_sessions_move_to_another_server(served: Served, tmp_path: Path) -> None:
    """A retry after the move is answered once: the client's handle, which got no answer, goes on over there."""
    file = tmp_path / "moved.sessions"
    x = np.random.default_rng(1).standard_normal((2, 3, 3)).astype(np.float32)
    with local_server("seq", "gru") as target, stepwell.connect(served.address) as old:
        one = old.open_session("seq", batch_size=2, session_id="moves-1")
        one.step(x)
        request_id, expected = 77, one.revision
        first = served.wire.step("moves-1", _tensors(x), expected_revision=expected, request_id=request_id)
        with old.open_sessions("gru", 1500, session_ids=[f"moves-g{n}" for n in range(1500)]) as group:
            told: list[int] = []
            report = old.export_sessions(file, prefix="moves-", progress=told.append)
            assert (report.exported, report.failures, told[-1]) == (1501, {}, 1501)
            group.close()
        for _ in range(2):  # again: nothing happens
            async with connect("aio", target.address) as new:
                moved = await new.import_sessions(file)
                assert (moved.imported, moved.failures) == (1501, {})
        with stepwell.connect(target.address) as new:
            info, before = new.session_info("moves-1"), old.session_info("moves-1")
            assert (info.revision, info.position, info.created_time) == (2, 6, before.created_time)
            from support.peers.wire import Wire

            with Wire(target.address) as wire:
                again = wire.step("moves-1", _tensors(x), expected_revision=expected, request_id=request_id)
            assert again.replayed
            assert again.outputs[0].data == first.outputs[0].data
            assert new.open_session("seq", batch_size=2, session_id="moves-1").get_state() == one.get_state()
            there = new.import_sessions(file, existing="skip")
            assert there.imported == 1501
            exported = new.export_sessions(tmp_path / "back.sessions", ["moves-1", "nobody"])
            assert (exported.exported, list(exported.failures)) == (1, ["nobody"])
        one.close()


def _tensors(x: Any) -> Any:
    from support.peers import wire

    return wire.tensors({"": x})


async def test_files_that_are_no_sessions_are_refused_before_anything_is_sent(
    client: Any, tmp_path: Path
) -> None:
    file = tmp_path / "some.sessions"
    await client.open_session("seq", session_id="file-1")
    await client.export_sessions(file, ["file-1"])
    await client.close_session("file-1")
    good = file.read_bytes()
    (session,) = read(file)
    line = good.index(b"\n") + 1
    for content, message in [
        (b"", "it begins otherwise"),
        (b"safetensors", "it begins otherwise"),
        (good[:8], "it begins otherwise"),
        (good[:line], "its end is missing"),
        (good[:-1], "at byte [0-9]+: an entry was cut off"),
        (good + b"x", "something follows its end"),
        (good[:80] + bytes([good[80] ^ 8]) + good[81:], "checksum of an entry is wrong"),
        (good + good[line:], "something follows its end"),
    ]:
        file.write_bytes(content)
        with pytest.raises(stepwell.InvalidInputError, match=message):
            await client.import_sessions(file)
    file.write_bytes(good)
    calls: list[tuple[type[Exception], str, Any]] = [
        (
            stepwell.InvalidInputError,
            "existing must be one of",
            client.import_sessions(file, existing="keep"),
        ),
        (stepwell.InvalidInputError, "or filters; got both", client.export_sessions(file, ["a"], prefix="b")),
        (FileNotFoundError, "nowhere", client.export_sessions(tmp_path / "nowhere" / "file", ["a"])),
    ]
    for kind, message, call in calls:
        with pytest.raises(kind, match=message):
            await call
    assert file.read_bytes() == good
    assert os.listdir(tmp_path) == ["some.sessions"], "nothing is left of what failed"
    assert session.session_id == "file-1"
    with pytest.raises(stepwell.SessionNotFoundError):
        await client.session_info("file-1")


# --- limits for being idle ---


def until_expired(client: stepwell.Client, session_id: str) -> None:
    """Return when a session has expired; to describe it is no use."""
    while True:
        try:
            client.session_info(session_id)
        except stepwell.SessionExpiredError:
            return


@pytest.mark.parametrize("shell", ["sync", "async"])
async def test_each_opening_sets_the_limit_of_its_sessions(served: Served, shell: str) -> None:
    async with connect(shell, served.address, timeout_s=WAIT_S) as client:
        unnamed = await client.open_session("seq")
        named = await client.open_session("seq", session_id=f"limit-{shell}")
        short = await client.open_session("seq", max_idle_s=90.5)
        never = await client.open_session("seq", max_idle_s=0)
        group = await client.open_sessions("seq", 2, max_idle_s=120)
        twins = await group.fork(max_idle_s=700)
        forks = [await short.fork(), await short.fork(max_idle_s=500), await short.fork(f"fork-{shell}")]
        found = {}
        for each in (unnamed, named, short, never, *forks):
            found[each.id] = (await client.session_info(each.id)).max_idle_s
        for each in (*group.ids, *twins.ids):
            found[each] = (await client.session_info(each)).max_idle_s
        assert list(found.values()) == [
            3600.0, None, 90.5, None, 3600.0, 500.0, None, *[120.0] * 2, *[700.0] * 2,
        ]  # fmt: skip
        resumed = await client.open_session("seq", session_id=short.id, max_idle_s=5)
        assert resumed.resumed
        assert (await client.session_info(short.id)).max_idle_s == 90.5
        await client.close_sessions(list(found))


@pytest.mark.slow
def test_a_session_ends_by_its_own_limit_and_use_puts_that_off(served: Served) -> None:
    with stepwell.connect(served.address) as client, stepwell.connect(served.address) as other:
        session, stays = client.open_session("seq", max_idle_s=1), client.open_session("seq", max_idle_s=600)
        client.close()  # its sessions go on without it
        until_expired(other, session.id)
        assert other.session_info(stays.id).revision == 0
        assert session.id not in [each.session_id for each in other.sessions()]
        other.close_session(stays.id)


@pytest.mark.slow
def test_limits_are_kept_through_a_kill(tmp_path: Path) -> None:
    with local_server("seq", data_dir=tmp_path / "data") as server:
        with stepwell.connect(server.address) as client:
            short, long = client.open_session("seq", max_idle_s=1), client.open_session("seq", max_idle_s=900)
            ids = [short.id, long.id]
        server.kill()
        server.restart()
        with stepwell.connect(server.address) as client:
            assert client.session_info(ids[1]).max_idle_s == 900.0
            until_expired(client, ids[0])
            assert [each.session_id for each in client.sessions()] == [ids[1]]


@pytest.mark.parametrize("max_idle_s", [0.5, -1, float("nan"), float("inf"), 315_360_001, "1h", True])
@pytest.mark.parametrize("opening", ["one", "many", "fork", "forks"])
def test_a_limit_out_of_its_range_is_refused(max_idle_s: Any, opening: str) -> None:
    with ScriptedServer() as server, stepwell.connect(server.address) as client:
        session, group = client.open_session(MODEL), client.open_sessions(MODEL, 2)
        calls: dict[str, Callable[[], object]] = {
            "one": lambda: client.open_session(MODEL, max_idle_s=max_idle_s),
            "many": lambda: client.open_sessions(MODEL, 2, max_idle_s=max_idle_s),
            "fork": lambda: session.fork(max_idle_s=max_idle_s),
            "forks": lambda: group.fork(max_idle_s=max_idle_s),
        }
        before = len(server.calls)
        with pytest.raises(stepwell.InvalidInputError, match="max_idle_s must be"):
            calls[opening]()
        assert len(server.calls) == before
