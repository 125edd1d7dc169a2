"""Looking after many sessions with both clients, against the real server: lists, closing, moving, leases."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest

import stepwell
from stepwell import _leases
from stepwell._session_file import read
from stepwell.testing import LocalServer
from support.scripted_server import MODEL, Fault, ScriptedServer
from support.served import Served, local_server
from support.shells import SHELLS, connect

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
        assert "1000 sessions, more are read when they are used" in repr(found)
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
        ({"order": "name"}, r"order must be one of \['id', 'last_used', 'created'\]; got 'name'"),
        ({"limit": 0}, "limit must be"),
        ({"idle_longer_s": -1}, "idle_longer_s must be from 0 to 1e11; got -1"),
        ({"idle_longer_s": "1h"}, "idle_longer_s must be a number of seconds; got '1h'"),
    ],
)
async def test_bad_arguments_of_lists(client: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(stepwell.InvalidInputError, match=message):
        await client.sessions(**arguments)


async def test_orders_filters_and_closing(client: Any) -> None:
    names = [f"order-{number}" for number in (3, 1, 2)]
    for name in names:
        await client.open_session("seq", session_id=name)
    await (await client.open_session("seq", session_id="order-1")).get_state()
    assert await gone_through(client.sessions(prefix="order-")) == sorted(names)
    assert await gone_through(client.sessions(prefix="order-", order="created")) == names
    last = client.sessions(prefix="order-", order="last_used", descending=True, limit=1)
    assert await gone_through(last) == ["order-1"]
    assert await gone_through(client.sessions(prefix="order-", idle_longer_s=3600)) == []
    for arguments in (
        {},
        {"session_ids": names, "prefix": "order-"},
        {"prefix": "order-", "everything": True},
    ):
        with pytest.raises(
            stepwell.InvalidInputError, match="close_sessions must have session_ids, a filter"
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
            from support.wire import Wire

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
    from support import wire

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
    with pytest.raises(stepwell.InvalidInputError, match="existing must be one of"):
        await client.import_sessions(file, existing="keep")
    with pytest.raises(stepwell.InvalidInputError, match="session_ids or filters; got both"):
        await client.export_sessions(file, ["a"], prefix="b")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        await client.export_sessions(tmp_path / "nowhere" / "file", ["a"])
    assert file.read_bytes() == good
    assert os.listdir(tmp_path) == ["some.sessions"], "nothing is left of what failed"
    assert session.session_id == "file-1"
    with pytest.raises(stepwell.SessionNotFoundError):
        await client.session_info("file-1")


# --- leases ---

HOLDER = """
import asyncio, sys, stepwell
kind, address, lease_s = sys.argv[1:]
async def main():
    async with stepwell.aio.connect(address, lease_s=float(lease_s)) as client:
        session, group = await client.open_session("seq"), await client.open_sessions("seq", 3)
        fork = await session.fork()
        print(session.id, fork.id, *group.ids, flush=True)
        await asyncio.Event().wait()
if kind == "aio":
    asyncio.run(main())
else:
    client = stepwell.connect(address, lease_s=float(lease_s))
    session, group = client.open_session("seq"), client.open_sessions("seq", 3)
    print(session.id, session.fork().id, *group.ids, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def leasing() -> Any:
    with local_server("seq") as server:
        yield server


def _ask_on(client: stepwell.Client, session_id: str) -> None:
    while True:
        client.session_info(session_id)


def ended(client: stepwell.Client, ids: list[str]) -> None:
    """Wait until sessions have ended because their client is gone."""
    for session_id in ids:
        with pytest.raises(
            stepwell.SessionExpiredError, match="client had been gone for longer than the lease"
        ):
            _ask_on(client, session_id)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_sessions_of_a_client_that_is_killed_end_and_those_of_others_do_not(
    leasing: LocalServer, kind: str
) -> None:
    # who lives must not miss it because the machine is busy
    argv = [sys.executable, "-c", HOLDER, kind, leasing.address, "5"]
    with (
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed,
        subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as lives,
        stepwell.connect(leasing.address, lease_s=None) as client,
    ):
        assert killed.stdout is not None
        assert lives.stdout is not None
        gone, stays = killed.stdout.readline().split(), lives.stdout.readline().split()
        unleased, named = client.open_session("seq"), client.open_session("seq", session_id=f"named-{kind}")
        assert len(gone) == len(stays) == 5
        assert {client.session_info(each).lease_s for each in (*gone, *stays)} == {5.0}
        killed.send_signal(signal.SIGKILL)
        ended(client, gone)
        # the other client has not stepped its sessions for as long: it lives, and says so in the background
        assert [client.session_info(each).lease_s for each in (*stays, unleased.id, named.id)] == [
            *[5.0] * 5,
            None,
            None,
        ]
        lives.kill()
        ended(client, stays)
        client.close_sessions([unleased.id, named.id])


@pytest.mark.slow
async def test_a_lease_is_renewed_only_while_a_session_needs_it(leasing: LocalServer) -> None:
    with stepwell.connect(leasing.address, lease_s=1) as client:
        with client.open_session("seq", session_id="named"):
            lease = client._core.lease
            assert lease is not None
            assert not lease.is_needed, "a named session has none"
        session = client.open_session("seq")
        thread = cast("threading.Thread", _leases.RENEWER._thread)
        assert thread is not None
        with stepwell.connect(leasing.address, lease_s=2) as other, other.open_sessions("seq", 2):
            assert _leases.RENEWER._thread is thread, "one for all clients"
        session.close()
        await asyncio.to_thread(thread.join, WAIT_S)
        assert not thread.is_alive()
        client.close_session("named")
    async with stepwell.aio.connect(leasing.address, lease_s=1) as awaited:
        second = await awaited.open_session("seq")
        task = awaited._renewing
        assert task is not None
        await second.close()
        await asyncio.wait_for(task, WAIT_S)


def test_a_client_that_is_not_closed_and_lost_does_not_hold_its_sessions(leasing: LocalServer) -> None:
    client = stepwell.connect(leasing.address, lease_s=1)
    lost = client.open_session("seq").id
    del client
    gc.collect()
    with stepwell.connect(leasing.address) as other:
        ended(other, [lost])


@pytest.mark.slow
async def test_leases_are_renewed_whatever_the_last_answer_was() -> None:
    with ScriptedServer() as server, stepwell.connect(server.address, lease_s=1) as client:
        lease = client._core.lease
        assert lease is not None
        client.open_session(MODEL)  # its answer says nothing of a lease
        assert not lease.is_needed
        assert server.requests("OpenSession")[0].lease.duration.seconds == 1
        client.open_sessions(MODEL, 2)  # that of a group cannot say so
        assert server.wait_until(lambda: len(server.requests("RenewLease")) >= 2)
        assert {request.client_id for request in server.requests("RenewLease")} == {lease.client_id}
        # UNIMPLEMENTED is also what a proxy's 404 becomes
        for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
            assert goes_on(server, code)
        client.close()
        async with stepwell.aio.connect(server.address, lease_s=1) as awaited:
            await awaited.open_sessions(MODEL, 2)
            assert await asyncio.to_thread(goes_on, server, grpc.StatusCode.UNIMPLEMENTED)


def test_a_call_that_cannot_begin_ends_no_other_clients_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        ScriptedServer() as server,
        stepwell.connect(server.address, lease_s=1) as failing,
        stepwell.connect(server.address, lease_s=1) as other,
    ):
        begin, refused = failing._renewal._start, threading.Event()

        def fail_once(*arguments: Any) -> None:
            if refused.is_set():
                return begin(*arguments)
            refused.set()
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(failing._renewal, "_start", fail_once)
        ids = set()
        for client in (failing, other):
            client.open_sessions(MODEL, 2)
            assert client._core.lease is not None
            ids.add(client._core.lease.client_id)
        assert refused.wait(WAIT_S)
        asked = len(server.requests("RenewLease"))
        assert server.wait_until(
            lambda: {each.client_id for each in server.requests("RenewLease")[asked:]} == ids
        )


def goes_on(server: ScriptedServer, code: grpc.StatusCode) -> bool:
    """Refuse to renew a lease once; whether it is renewed again."""
    server.fail("RenewLease", Fault(code))
    asked = len(server.requests("RenewLease"))
    return server.wait_until(lambda: len(server.requests("RenewLease")) > asked + 1)


@pytest.mark.parametrize("lease_s", [0.5, -1, float("inf"), "1h", True])
def test_bad_leases(lease_s: Any) -> None:
    with pytest.raises(stepwell.InvalidInputError, match="lease_s must be"):
        stepwell.connect("127.0.0.1:1", lease_s=lease_s)


def test_a_group_has_its_lease_whichever_members_are_closed_before() -> None:
    with ScriptedServer() as server, stepwell.connect(server.address, lease_s=100) as client:
        lease = client._core.lease
        assert lease is not None
        group = client.open_sessions(MODEL, 3)
        group[0].close()
        group[:2].close()
        assert lease.is_needed, "the last member must not end though its client is there"
        group.close()
        assert not lease.is_needed
