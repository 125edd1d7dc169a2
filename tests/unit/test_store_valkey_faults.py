"""The store on Valkey when answers are lost, memory is used up, or the server is slow, gone or another one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from stepwell_server import logs
from stepwell_server.errors import Overloaded, ServerError, StoreAway, StoreGone, Unavailable
from stepwell_server.store.base import (
    ALL_KEPT,
    Batch,
    CommitResult,
    End,
    KeyFileError,
    StoredSession,
    StoreError,
    Tombstone,
    new_stamp,
)
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.record import decode_header
from stepwell_server.store.valkey.connection import url as urls
from stepwell_server.store.valkey.connection.client import Access, ConnectionLost, Link
from stepwell_server.store.valkey.connection.nodes import MAX_LINKS
from stepwell_server.store.valkey.inspection import inspect
from stepwell_server.store.valkey.store import ValkeyStore
from support.certificates import Authority
from support.peers.dropping_proxy import DroppingProxy
from support.servers.valkey_servers import HOST, Valkey, paused
from support.stores.disk_store import record, template
from support.stores.records import scan
from support.stores.valkey_store import end, fresh_prefix, opened, put, shared, time_limit

SHORT = "timeout_ms=1000"


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey(append="always") as server:
        yield server


@pytest.mark.parametrize("durability", ["sync", "async"])
async def test_a_commit_whose_answer_was_lost_is_sent_again(valkey: Valkey, durability: str) -> None:
    async with DroppingProxy(valkey.port) as cut:
        url = f"valkey://{HOST}:{cut.port}/0?prefix={fresh_prefix()}"
        store = await opened(url, durability=durability)  # type: ignore[arg-type]
        ids = [f"s{i}" for i in range(20)]
        cut.losses = 2
        kept, first = await put(store, template(ids), [0] * 20)
        assert kept is ALL_KEPT
        cut.losses = 1
        kept, second = await put(store, template(ids, 1), [first] * 20)
        assert kept is ALL_KEPT
        assert (await store.count(), await store.count_of("m")) == (20, 20)
        assert {each.stamp for each in await store.fetch(ids)} == {second}
        cut.losses = 1
        assert await end(store, [Tombstone("s0", End.CLOSED, 1.0)], [second]) is ALL_KEPT
        cut.losses = 1
        documents = Batch(documents=[("d", b"x")], documents_follow={"d": None})
        assert await store.apply(documents) is ALL_KEPT
        cut.losses = 1
        assert (await store.fetch(["s0"]))[0].tombstone == Tombstone("s0", End.CLOSED, 1.0)
        assert (cut.lost, await store.count()) == (6, 19)
        await store.close()


async def test_an_empty_commit_sends_no_request(valkey: Valkey) -> None:
    """Else it would wait for an answer to nothing, and take the server for gone."""
    store = await opened(valkey.url(f"?prefix={fresh_prefix()}"))
    assert await store.count() == 0
    before = valkey.info("stats")["total_connections_received"]
    assert await store.apply(Batch()) is ALL_KEPT
    assert await store.count() == 0
    assert valkey.info("stats")["total_connections_received"] == before
    await store.close()


@pytest.mark.slow
async def test_a_commit_that_is_never_answered_is_unknown(valkey: Valkey) -> None:
    async with DroppingProxy(valkey.port) as cut:
        store = await opened(f"valkey://{HOST}:{cut.port}/0?prefix={fresh_prefix()}")
        _, first = await put(store, [("s", record("s"))], [0])
        cut.losses = 10_000
        with time_limit(store, 1.0):
            kept, second = await put(store, [("s", record("s", 1))], [first])
            assert kept == CommitResult(unknown=frozenset({"s"}))
            with pytest.raises(StoreAway):
                await store.fetch(["s"])
        cut.losses = 0
        assert (await store.fetch(["s"]))[0].stamp == second
        await store.close()


def test_a_name_that_is_looked_up_for_too_long_leaves_no_error_behind() -> None:
    """The servers' event loop is uvloop's."""

    async def give_up() -> list[dict[str, object]]:
        errors: list[dict[str, object]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        for _ in range(8):
            opening = asyncio.create_task(Link.open(("nobody.invalid", 1), Access()))
            await asyncio.sleep(0)  # it has begun, and looks the name up
            opening.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionLost):
                await opening
            with pytest.raises(socket.gaierror):  # and by now the name is known not to exist
                await loop.getaddrinfo("nobody.invalid", 1)
        gc.collect()
        return errors

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(give_up()) == []


@pytest.mark.slow
async def test_a_server_that_stops_and_returns() -> None:
    with Valkey(append="always") as valkey:
        async with shared(valkey.url()) as (store,):
            _, first = await put(store, [("s", record("s"))], [0])
            valkey.kill()
            with time_limit(store, 1.0):
                assert (await store.check()).problem
                with pytest.raises(StoreAway) as caught:
                    await put(store, [("s", record("s", 1))], [first])
                assert caught.value.retry_after_s > 0
                # callers need not know where the store is
                assert str(valkey.port) not in str(caught.value)
                with pytest.raises(StoreAway):
                    await store.fetch(["s"])
                health = await store.check()
                assert f"{HOST}:{valkey.port} cannot be connected to: Connection refused" in health.problem
                reads = (store.fetch(["s"]) for _ in range(200))
                results = await asyncio.gather(*reads, return_exceptions=True)
                assert {type(result) for result in results} == {StoreAway}
            valkey.start()
            assert (await put(store, [("s", record("s", 1))], [first]))[0] is ALL_KEPT
            assert (await store.check()).problem == ""


@pytest.mark.slow
async def test_a_hung_server_delays_calls_only_briefly() -> None:
    with Valkey(append="always") as valkey:
        async with shared(valkey.url()) as (store,):
            ids = [f"s{i}" for i in range(60)]
            _, first = await put(store, template(ids), [0] * 60)
            with paused(valkey), time_limit(store, 1.0):
                asked = [put(store, [(i, record(i, 1))], [first]) for i in ids]
                asked += [store.fetch([i]) for i in ids]  # type: ignore[misc]
                results = await asyncio.gather(*asked, return_exceptions=True)
                kept = [each[0] for each in results if isinstance(each, tuple)]
                refused = [each for each in results if isinstance(each, BaseException)]
                assert len(kept) + len(refused) == 120
                assert all(each == CommitResult(unknown=each.unknown) and each.unknown for each in kept)
                assert {type(each) for each in refused} == {StoreAway}
                assert f"{valkey.address} " in (await store.check()).problem
            found = await store.fetch(ids)
            assert {
                decode_header(i, each.record or b"").revision for i, each in zip(ids, found, strict=True)
            } <= {0, 1}
            assert int(valkey.info("clients")["connected_clients"]) <= MAX_LINKS + 2
            kept_again, _ = await put(store, template(ids, 2), [each.stamp for each in found])
            assert kept_again is ALL_KEPT


async def test_a_store_that_is_full_refuses_and_lets_sessions_end(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        ids = [f"s{i}" for i in range(9)]
        _, first = await put(store, template(ids), [0] * 9)
        valkey.ask("CONFIG", "SET", "maxmemory", 1)
        try:
            with pytest.raises(Overloaded, match="the store must have free memory; it has none") as caught:
                await put(store, template(ids, 1), [first] * 9)
            assert caught.value.retry_after_s > 0
            with pytest.raises(Overloaded):
                await put(store, [("new", record("new"))], [0])
            with pytest.raises(Overloaded):
                await store.apply(Batch(documents=[("d", b"x")]))
            assert {each.stamp for each in await store.fetch(ids)} == {first}
            assert await end(store, [Tombstone("s0", End.CLOSED, 1.0)], [first]) is ALL_KEPT
            assert (await store.fetch(["s0"]))[0].tombstone is not None
            assert (await store.count(), await store.count_of("m")) == (8, 8)
            assert "of its memory is used" in (await store.check()).warning
        finally:
            valkey.ask("CONFIG", "SET", "maxmemory", 0)
        assert (await put(store, template(ids[1:], 1), [first] * 8))[0] is ALL_KEPT


async def test_scripts_that_were_forgotten_are_loaded_again(valkey: Valkey) -> None:
    async with shared(valkey.url()) as (store,):
        _, first = await put(store, [("s", record("s"))], [0])
        valkey.ask("SCRIPT", "FLUSH")
        assert (await put(store, [("s", record("s", 1))], [first]))[0] is ALL_KEPT


async def test_a_store_that_was_emptied_is_made_again_as_it_was() -> None:
    with Valkey(append="") as valkey:
        async with shared(valkey.url(), 2) as (a, b):
            await put(a, [("s", record("s"))], [0])
            assert ((await a.check()).problem, a.damage) == ("", "")
            valkey.ask("FLUSHALL")
            assert (await a.check()).problem == ""
            assert a.damage == "the store was emptied: the sessions that it had are lost"
            assert (await b.check()).problem == ""
            async with shared(valkey.url()) as (other,):
                url = valkey.url(f"?prefix={a._url.prefix}")
                again = await opened(url)
                assert (again.secret, again.incarnation) == (a.secret, a.incarnation) != (other.secret, "")
                await again.close()
            valkey.ask("HSET", f"{a._url.prefix}{{meta}}store", "incarnation", "12345678")
            with pytest.raises(StoreGone, match="another one has replaced it"):
                await a.check()


@pytest.mark.slow
async def test_sync_waits_for_disk_and_replicas(valkey: Valkey) -> None:
    prefix = fresh_prefix()
    quick = await opened(valkey.url(f"?prefix={prefix}"))
    # no replica is there: what was written cannot be as safe as was asked
    strict = await opened(valkey.url(f"?prefix={prefix}&replicas=1&timeout_ms=5000"), durability="sync")
    plain = await opened(valkey.url(f"?prefix={prefix}"), durability="sync")
    _, stamp = await put(quick, [("s", record("s")), ("gone", record("gone"))], [0, 0])
    await end(quick, [Tombstone("gone", End.CLOSED, 0.0)], [stamp])
    with time_limit(strict, 1.0):
        kept, _ = await put(strict, [("t", record("t"))], [0])
        assert kept == CommitResult(unknown=frozenset({"t"}))
        valkey.ask("PING")  # its disk may be busy still, and then it would not answer in time
        # nor are changes of other servers returned before they are safe, nor what is as it was known, or not there: it
        # may not be the primary any more
        for name, known in (("s", []), ("gone", []), ("s", [stamp]), ("never", [])):
            with pytest.raises(
                StoreAway,
                match=r"must have the data on its disk and that of 1 replicas \(replicas=1\)",
            ):
                await strict.fetch([name], known)
        with pytest.raises(StoreAway):
            await strict.documents()
        with pytest.raises(StoreAway):
            await strict.apply(Batch(documents=[("d", b"x")]))
        valkey.ask("PING")
        assert "replicas=1 of the URL must be connected; 0 are" in (await strict.check()).problem
    for name in ("s", "gone"):
        assert (await plain.fetch([name]))[0].is_known is False
    assert (await plain.fetch(["s"], [stamp]))[0].is_known
    assert (await plain.check()).problem == (await plain.check()).warning == ""
    with Valkey(append="always") as replica:
        replica.follow(valkey)
        # a replica says what it has on its disk when it is asked, but at times only a second later
        patient = await opened(valkey.url(f"?prefix={prefix}&replicas=1"), durability="sync")
        assert (await put(patient, [("u", record("u"))], [0]))[0] is ALL_KEPT
        assert (await patient.fetch(["s"]))[0].stamp == stamp
        assert (await patient.fetch(["s"], [stamp]))[0].is_known
        assert (await patient.fetch(["s", "s"], [stamp, 7]))[1].stamp == stamp
        found = await patient.fetch(["s", "u", "never"], [7, 7, 7])
        assert [each.record is not None for each in found] == [True, True, False]
        many = [f"many{i}" for i in range(40)]
        _, third = await put(patient, [(i, record(i)) for i in many[::2]], [0] * 20)
        found = await patient.fetch(many, [third, 7, 7, 7] * 10)
        assert [each.is_known for each in found] == [i % 4 == 0 for i in range(40)]
        assert [each.record is not None for each in found] == [i % 4 == 2 for i in range(40)]
        # nobody waits for disks to hear that nothing is there, or that nothing has changed
        before = valkey.info("commandstats")["cmdstat_waitaof"]
        assert await patient.fetch(["no", "one"]) == [StoredSession(), StoredSession()]
        assert (await patient.fetch(["s"], [stamp]))[0].is_known
        assert valkey.info("commandstats")["cmdstat_waitaof"] == before
        await patient.close()
    for store in (quick, strict, plain):
        await store.close()


@pytest.mark.slow
async def test_a_primary_that_lost_its_replicas_is_not_believed() -> None:
    """It is cut off, another has taken over, and it does not know."""
    with Valkey(append="always") as old, Valkey(append="always") as new:
        new.follow(old)
        url = f"?prefix={fresh_prefix()}&replicas=1"
        async with contextlib.AsyncExitStack() as stack:
            here = await opened(old.url(url), durability="sync")
            stack.push_async_callback(here.close)
            _, first = await put(here, [("s", record("s"))], [0])
            assert (await here.fetch(["s"], [first]))[0].is_known
            new.ask("REPLICAOF", "NO", "ONE")
            there = await opened(new.url(url.removesuffix("&replicas=1")), durability="sync")
            stack.push_async_callback(there.close)
            assert (await put(there, [("s", record("s", 1))], [first]))[0] is ALL_KEPT
            with time_limit(here, 1.0):
                asked = (here.fetch(["s"], [first]), here.fetch(["s"]), here.fetch(["never"]))
                found = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(each) for each in found] == [StoreAway] * 3


@pytest.mark.slow
async def test_reads_are_confirmed_also_where_the_user_may_not_wait_for_replicas_alone() -> None:
    with Valkey(append="always") as primary, Valkey(append="always") as replica:
        replica.follow(primary)
        rules: list[str] = ["on", ">own", "~*", "&*", "+@all", "-wait"]
        primary.ask("ACL", "SETUSER", "own", *rules)
        store = await opened(f"valkey://own:own@{primary.address}/0?replicas=1", durability="sync")
        _, stamp = await put(store, [("s", record("s"))], [0])
        with pytest.raises(StoreAway):
            await store.fetch(["s"], [stamp])
        assert (await store.fetch(["s"], [stamp]))[0].is_known
        await store.close()


async def test_sync_reads_succeed_although_memory_is_full() -> None:
    with Valkey(append="always") as valkey:
        async with shared(valkey.url(), 2, durability="sync") as (a, b):
            _, stamp = await put(a, [("s", record("s"))], [0])
            valkey.ask("CONFIG", "SET", "maxmemory", 1)
            assert (await b.fetch(["s"]))[0].stamp == stamp
            assert (await b.fetch(["never"]))[0].record is None


async def test_a_time_limit_that_replicas_can_miss_is_a_warning(valkey: Valkey) -> None:
    for rest, told in (("&timeout_ms=1499", True), ("&timeout_ms=1500", False), ("", False)):
        url = f"valkey://{valkey.address}/0?prefix={fresh_prefix()}&replicas=1{rest}"
        warnings = " ".join((await inspect(urls.parse(url, {}), "sync")).findings.warnings)
        assert ("with replicas=1 timeout_ms must be at least 1500, because" in warnings) is told


async def test_acknowledged_sync_changes_survive_a_kill() -> None:
    with Valkey(append="always") as valkey:
        async with shared(valkey.url(), durability="sync") as (store,):
            ids = [f"s{i}" for i in range(50)]
            kept, _ = await put(store, template(ids), [0] * 50)
            assert kept is ALL_KEPT
            valkey.restart()
            assert await store.count() == 50
            assert all(each.record for each in await store.fetch(ids))


@pytest.mark.parametrize(
    ("settings", "durability", "message"),
    [
        (("appendonly", "no"), "sync", "durability sync needs appendonly yes"),
        (("appendfsync", "no"), "sync", "durability sync needs appendfsync always; it is no"),
        (("appendfsync", "everysec"), "sync", "durability sync needs appendfsync always; it is everysec"),
    ],
)
async def test_a_server_whose_settings_break_the_promise_is_refused(
    settings: tuple[str, str], durability: str, message: str
) -> None:
    with Valkey(append="always") as valkey:
        store = await opened(valkey.url(), durability="sync")
        valkey.ask("CONFIG", "SET", *settings)
        assert message in (await store.check()).problem
        await store.close()
        with pytest.raises(StoreError, match=message):
            await opened(valkey.url(), durability="sync")
        await (await opened(valkey.url())).close()


async def test_unsafe_settings_are_a_warning() -> None:
    with Valkey(append="", policy="allkeys-lru") as volatile:
        store = await opened(volatile.url())
        health = await store.check()
        assert (health.problem, health.warns_of) == ("", "store")
        assert "the server keeps nothing on disk (appendonly no)" in health.warning
        assert "maxmemory-policy must be noeviction; with allkeys-lru sessions are deleted" in health.warning
        volatile.ask("CONFIG", "SET", "save", "60 1")
        assert "changes since its last snapshot are lost" in (await store.check()).warning
        await store.close()


async def test_user_and_password() -> None:
    with Valkey(append="", password="hidden") as valkey:
        for login in ("", ":wrong@", "nobody:hidden@"):
            url = f"valkey://{login}{valkey.address}/0?{SHORT}"
            with pytest.raises(StoreError, match=f"{valkey.address} denies access|must allow") as caught:
                await opened(url)
            assert "hidden" not in str(caught.value)
        await (await opened(f"valkey://:hidden@{valkey.address}/0")).close()
        # a user who may do no more than what is needed
        rules = ["on", ">own", "~stepwell:*", "-@all", "+@connection", "+@read", "+@write"]
        rules += ["+evalsha", "+script|load", "+waitaof", "+wait", "+role", "+info", "+time"]
        valkey.ask("ACL", "SETUSER", "own", *rules)
        store = await opened(f"valkey://own:own@{valkey.address}/0")
        assert (await put(store, [("s", record("s"))], [0]))[0] is ALL_KEPT
        assert await store.apply(Batch(documents=[("d", b"x")])) is ALL_KEPT
        assert [one.document for one in await store.replicas("own", b"x")] == [b"x"]
        assert (await store.check()).problem == ""
        valkey.ask("ACL", "SETUSER", "own", "-evalsha")
        with pytest.raises(Unavailable, match=r"it refuses: NOPERM$"):
            await put(store, [("t", record("t"))], [0])
        assert "no permissions to run the 'evalsha' command" in (await store.check()).problem
        with pytest.raises(StoreAway, match="no permissions to run the 'evalsha' command"):
            await opened(f"valkey://own:own@{valkey.address}/0")
        valkey.ask("ACL", "SETUSER", "own", "+evalsha")
        assert (await store.check()).problem == ""
        valkey.ask("ACL", "DELUSER", "own")  # its connections end
        with pytest.raises(StoreAway):
            await store.fetch(["s"])
        assert "denies access" in (await store.check()).problem
        await store.close()


async def test_a_store_that_refuses_changes_reports_a_problem() -> None:
    with Valkey(append="") as valkey:
        store = await opened(valkey.url())
        valkey.ask("CONFIG", "SET", "min-replicas-to-write", "1")
        with pytest.raises(Unavailable, match=r"it refuses: NOREPLICAS$"):
            await put(store, [("s", record("s"))], [0])
        assert "Not enough good replicas to write" in (await store.check()).problem
        valkey.ask("CONFIG", "SET", "min-replicas-to-write", "0")
        assert (await store.check()).problem == ""
        # what has no memory left still reads and closes sessions
        valkey.ask("CONFIG", "SET", "maxmemory", "1")
        with pytest.raises(Overloaded):
            await put(store, [("s", record("s"))], [0])
        assert (await store.check()).problem == ""
        await store.close()


async def test_a_flood_of_refusals_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Valkey(append="") as valkey:
        store = await opened(valkey.url())
        valkey.ask("CONFIG", "SET", "min-replicas-to-write", "1")
        for tell_s, said in [(1e9, [{}]), (0.0, [{}, {"more_before": 19}])]:
            monkeypatch.setattr(logs, "REPEAT_S", tell_s)
            for _ in range(20 if tell_s else 1):
                with pytest.raises(Unavailable):
                    await put(store, [("s", record("s"))], [0])
            told = [line for line in caplog.records if line.message == "the store refuses"]
            fields = [dict(line.__dict__["fields"]) for line in told]
            assert all("NOREPLICAS" in each.pop("reason") for each in fields)
            assert fields == said
        await store.close()


@pytest.mark.slow
async def test_a_store_with_a_hung_replica_reports_a_problem() -> None:
    with Valkey(append="always") as primary, Valkey(append="always") as replica:
        replica.follow(primary)
        store = await opened(primary.url("?replicas=1"), durability="sync")
        assert (await put(store, [("s", record("s"))], [0]))[0] is ALL_KEPT
        while (await store.check()).problem:  # it does not wait long for a disk
            pass
        with paused(replica), time_limit(store, 1.5):  # it is connected still
            assert (await put(store, [("t", record("t"))], [0]))[0] == CommitResult(unknown=frozenset({"t"}))
            assert "1 replicas (replicas=1)" in (await store.check()).problem
        primary.wait_for_replica()  # it has much to make up on a busy disk
        assert (await put(store, [("u", record("u"))], [0]))[0] is ALL_KEPT
        while (await store.check()).problem:  # it does not wait long for a disk
            pass
        await store.close()


async def test_a_password_may_change_while_it_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "password"
    file.touch(0o600)
    file.write_text("one\n")
    with Valkey(append="") as valkey:
        valkey.ask("ACL", "SETUSER", "app", "on", ">one", "~*", "&*", "+@all")
        store = await opened(f"valkey://app@{valkey.address}/0?password_file={file}")
        _, stamp = await put(store, [("s", record("s"))], [0])
        # the file first: whoever connects from now on has the new one
        valkey.ask("ACL", "SETUSER", "app", ">two")
        file.write_text("two\n")
        valkey.ask("CLIENT", "KILL", "USER", "app")
        valkey.ask("ACL", "SETUSER", "app", "<one")
        assert (await store.fetch(["s"]))[0].stamp == stamp
        # the file too late
        valkey.ask("ACL", "SETUSER", "app", "resetpass", ">three")
        valkey.ask("CLIENT", "KILL", "USER", "app")
        with time_limit(store, 1.0), pytest.raises(StoreAway):
            await store.fetch(["s"])
        file.write_text("three\n")
        assert (await store.fetch(["s"]))[0].stamp == stamp
        # one that cannot be read is as it was
        file.write_text("")
        valkey.ask("CLIENT", "KILL", "USER", "app")
        assert (await store.fetch(["s"]))[0].stamp == stamp
        assert "the last password is used" in caplog.text
        assert not any(word in caplog.text for word in ("two", "three"))
        await store.close()


async def test_tls(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    mine = ours.issue("client")
    stranger = theirs.issue("client")
    pair = f"&cert={mine.cert}&key={mine.key}"
    optional = ("--tls-auth-clients", "optional")
    with Valkey(append="", tls=ours.issue(), ca=ours.cert, options=optional) as valkey:
        for rest, message in [
            (f"?ca={theirs.cert}{pair}", "TLS with .* must succeed"),
            (
                f"?ca={ours.cert}{pair}&server_name=other.example",
                "TLS with .* must succeed: .*other.example",
            ),
            (f"?ca={tmp_path}/none{pair}", "ca: .*/none must contain CA"),
            (
                f"?ca={ours.cert}&cert={mine.key}&key={mine.key}",
                "cert and key: .* must be a certificate and its key",
            ),
            # the words of TLS, not of the system's error of the same number
            (f"?ca={mine.key}", r"ca: .* must contain CA certificates: .*NO_CERTIFICATE"),
            (f"?ca={ours.cert}&cert={mine.cert}&key={stranger.key}", "cert and key: .*KEY_VALUES_MISMATCH"),
        ]:
            with pytest.raises(StoreError, match=message):
                await opened(valkey.url(rest))
        with pytest.raises((StoreError, ServerError)):  # it knows certificates of its own authority alone
            await opened(valkey.url(f"?ca={ours.cert}&cert={stranger.cert}&key={stranger.key}&{SHORT}"))
        with pytest.raises(ServerError):  # it speaks TLS alone
            await opened(f"valkey://{valkey.address}/0?{SHORT}")
        store = await opened(valkey.url(f"?ca={ours.cert}{pair}&server_name=localhost"))
        assert (await put(store, template([f"s{i}" for i in range(300)], size=900), [0] * 300))[0] is ALL_KEPT
        assert await store.count() == 300
        await store.close()


async def test_states_are_encrypted(valkey: Valkey) -> None:
    prefix = fresh_prefix()
    url = valkey.url(f"?prefix={prefix}&partitions=1")
    ring = Keyring({"new": bytes(range(32)), "old": bytes(32)})
    store = await opened(url, keyring=ring)
    ids = ["a", "b", "c"]
    _, first = await put(store, template(ids, 3, size=64), [0, 0, 0])
    _, second = await put(store, template(ids, 4, size=64), [first] * 3)
    raw = valkey.ask("GET", f"{prefix}{{0}}s:a")
    assert bytes([4]) * 16 not in raw
    assert [bytes(each.record or b"") for each in await store.fetch(ids)] == [
        bytes(r) for _, r in template(ids, 4, size=64)
    ]
    assert [header.revision for _, header in await scan(store, limit=9) if header] == [4, 4, 4]
    assert [header["revision"] for header in (await store.heads(limit=9)).heads] == [4, 4, 4]
    await store.close()
    with pytest.raises(KeyFileError, match="is encrypted with key new: give the key file"):
        await opened(url)
    with pytest.raises(KeyFileError, match="it lacks new"):
        await opened(url, keyring=Keyring({"other": bytes(32)}))
    with pytest.raises(KeyFileError, match="key new must be the key"):
        await opened(url, keyring=Keyring({"new": bytes(32)}))
    again = await opened(url, keyring=Keyring({"next": b"x" * 32, "new": bytes(range(32))}))
    assert (await again.fetch(["a"]))[0].stamp == second
    # what was stored is moved to another session: nobody takes it for its state
    valkey.ask("SET", f"{prefix}{{0}}s:b", raw)
    (moved,) = await again.fetch(["b"])
    with pytest.raises(ServerError):
        decode_header("b", moved.record or b"")
    await again.close()


async def test_encryption_begins_and_keys_change_while_all_servers_read_all(valkey: Valkey) -> None:
    url = valkey.url(f"?prefix={fresh_prefix()}")
    keys = {"a": bytes(range(32)), "b": bytes(32)}

    async def started(*names: str, encrypts: bool = True) -> ValkeyStore:
        ring = Keyring({name: keys[name] for name in names}, encrypts=encrypts) if names else None
        return await opened(url, keyring=ring)

    async def all_read(*servers: ValkeyStore) -> None:
        """Each writes a session, and all of them read it; the stamps go on as if nothing were encrypted."""
        for number, writer in enumerate(servers):
            name = f"{number} of {len(servers)} {new_stamp()}"
            await put(writer, [(name, record(name, 1))], [0])
            for reader in servers:
                (found,) = await reader.fetch([name])
                assert bytes(found.record or b"") == record(name, 1)
                assert not (await reader.check()).problem

    plain = await started()
    # one after the other is restarted: first with what decrypts, then with what encrypts
    waiting = await started("a", encrypts=False)
    await all_read(plain, waiting)
    encrypting = await started("a")
    await all_read(waiting, encrypting)
    both = await started("a", "b")
    await all_read(encrypting, both)
    later = await started("b", "a")
    await all_read(both, later)
    # a server without a key gives no wrong answers, reports the missing key, and is not ready
    (name, _), *_ = await scan(later, limit=1)
    await put(later, [("sealed", record("sealed"))], [0])
    for behind in (plain, encrypting):
        assert "other servers encrypt the store with key" in (await behind.check()).problem
        with pytest.raises(StoreAway, match="which this server lacks: restart it with the file"):
            await behind.fetch([name, "sealed"])
    for store in (plain, waiting, encrypting, both, later):
        await store.close()
