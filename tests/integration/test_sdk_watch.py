"""Watches of the SDK on real servers: events, closing, lost connections, replicas."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell import aio
from stepwell._watch.core import SessionWatch
from stepwell.errors import InvalidInputError, SessionNotFoundError
from support.load.driver import MODEL
from support.secured import Server
from support.servers import served
from support.servers.replica_servers import replicas
from support.servers.valkey_servers import Valkey

TIMEOUT_S = 100.0


def x(seed: int = 0, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal((*(shape or (1,)), 3)).astype(np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served.local_server("seq", extra_args=["--store", "memory"]) as found:
        yield found


@pytest.fixture
def client(server: Server) -> Iterator[stepwell.Client]:
    with stepwell.connect(server.address) as found:
        yield found


def test_events_are_what_the_session_did(client: stepwell.Client) -> None:
    with (
        client.open_session("seq") as session,
        session.watch(inputs=True, outputs=True, states=True) as watch,
    ):
        first = next(watch)
        assert (first.kind, first.revision, first.model, first.error) == ("present", 0, "seq", None)
        for turn in range(10):
            value = x(turn)
            y = session.step(value)
            event = next(watch)
            assert (event.kind, event.session_id, event.revision) == ("step", session.id, turn + 1)
            assert event.inputs["x"].tobytes() == value.tobytes()
            assert next(iter(event.outputs.values())).tobytes() == y.tobytes()
            state = session.get_state()
            assert {name: array.tobytes() for name, array in event.states.items()} == {
                name: array.tobytes() for name, array in state.items()
            }
        session.reset_states()
        event = next(watch)
        assert (event.kind, event.position, event.revision) == ("reset", 0, 11)
        session.close()
        ended = next(watch)
        assert (ended.kind, type(ended.error)) == ("ended", SessionNotFoundError)
        assert list(watch) == []


def test_many_sessions_and_samples(client: stepwell.Client) -> None:
    with client.open_sessions("seq", 1500) as group, client.watch_sessions(group.ids, every=3) as watch:
        assert {next(watch).session_id for _ in range(1500)} == set(group.ids)
        for turn in range(3):
            group.step(x(turn, 1500))
        events = [next(watch) for _ in range(1500)]
        assert {(event.revision, event.skipped_revisions) for event in events} == {(3, 2)}


def test_an_interval_ends_with_the_last_state(client: stepwell.Client) -> None:
    with client.open_session("seq") as session, session.watch(states=True, interval_s=0.05) as watch:
        for turn in range(50):
            session.step(x(turn))
        shown = next(watch)
        while shown.revision < 50:
            shown = next(watch)
        state = session.get_state()
        assert all(array.tobytes() == state[name].tobytes() for name, array in shown.states.items())


def test_wrong_arguments_cost_no_call(client: stepwell.Client) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"session_ids": "abc"}, "session_ids must be a collection of ids; got the string 'abc'"),
        ({"session_ids": []}, "session_ids must have at least one id; got none"),
        ({"session_ids": ["a", "a"]}, "session_ids"),
        ({"session_ids": ["a"], "every": 0}, "every"),
        ({"session_ids": ["a"], "every": 2, "interval_s": 1.0}, "every must be 1 with interval_s; got 2"),
        (
            {"session_ids": ["a"], "interval_s": float("nan")},
            "interval_s must be a number above 0 and at most 3600",
        ),
        ({"session_ids": ["a"], "states": 1}, "states"),
        (
            {"session_ids": ["a"], "states": True, "state_names": "lstm/h"},
            "state_names must be a list of names; got 'lstm/h'",
        ),
        (
            {"session_ids": ["a"], "states": True, "state_names": ["h", None]},
            "state_names must be printable strings; got None",
        ),
        (
            {"session_ids": ["a"], "state_names": ["h"]},
            "state_names must be None unless states is True; got ['h']",
        ),
    ]
    for arguments, words in wrong:
        with pytest.raises(InvalidInputError) as caught:
            client.watch_sessions(**arguments)
        assert words in str(caught.value), arguments
    with client.watch_sessions(["a"], interval_s=0.001) as watch, pytest.raises(InvalidInputError):
        next(watch)


async def test_a_defect_ends_a_watch_rather_than_leave_its_reader_waiting(
    server: Server, client: stepwell.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(SessionWatch, "values", fail)
    with client.watch_sessions(["a"]) as watch, pytest.raises(ZeroDivisionError, match="a defect"):
        next(watch)
    async with aio.connect(server.address) as other, other.watch_sessions(["a"]) as events:
        with pytest.raises(ZeroDivisionError, match="a defect"):
            await asyncio.wait_for(anext(events), TIMEOUT_S)


def test_closing_wakes_a_thread_that_waits(client: stepwell.Client) -> None:
    with client.open_session("seq") as session:
        watch, found = session.watch(), []
        next(watch)
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            found.append(list(watch))

        thread = threading.Thread(target=wait)
        thread.start()
        assert begun.wait(TIMEOUT_S)
        watch.close()
        thread.join(TIMEOUT_S)
        assert found == [[]]
        with client.watch_server(interval_s=0.2) as figures:  # the server has forgotten it
            assert next(figures).is_ready


def test_a_watch_that_nobody_closed_leaves_no_thread(client: stepwell.Client) -> None:
    with client.open_session("seq") as session:
        before = set(threading.enumerate())
        watch = session.watch()
        next(watch)
        (thread,) = [one for one in set(threading.enumerate()) - before if one.name == "stepwell-watch"]
        del watch
        gc.collect()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


async def test_an_async_watch_that_nobody_closed_leaves_no_task(server: Server) -> None:
    async with aio.connect(server.address) as client, await client.open_session("seq") as session:
        before = asyncio.all_tasks()
        watch = session.watch()
        await anext(watch)
        tasks = asyncio.all_tasks() - before
        assert tasks
        del watch
        gc.collect()
        _, left = await asyncio.wait(tasks, timeout=TIMEOUT_S)
        assert not left
        async with session.watch() as another:
            await anext(another)


async def test_the_async_client_has_the_same(server: Server) -> None:
    async with aio.connect(server.address) as client, await client.open_session("seq") as session:
        async with session.watch(outputs=True) as watch:
            assert (await anext(watch)).kind == "present"
            y = await session.step(x())
            event = await anext(watch)
            assert next(iter(event.outputs.values())).tobytes() == y.tobytes()
            await session.close()
            assert [event.kind async for event in watch] == ["ended"]
        async with client.watch_server(interval_s=0.2) as figures:
            found = [await anext(figures) for _ in range(2)]
            assert found[0].interval_s == 0 < found[1].interval_s
            assert found[1].models["seq"].executor == "litert"
        watch = client.watch_sessions(["never"])
        assert [type(event.error) async for event in watch] == [SessionNotFoundError]
        waiting = asyncio.ensure_future(anext(client.watch_server()))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


def test_a_watch_continues_after_a_restart_and_counts_what_it_missed(tmp_path: Path) -> None:
    with (
        served.local_server("seq", data_dir=tmp_path) as server,
        stepwell.connect(server.address) as client,
    ):
        session, quiet = (
            client.open_session("seq", session_id="a"),
            client.open_session("seq", session_id="b"),
        )
        with client.watch_sessions(["a", "b"], states=True) as watch:
            assert {next(watch).session_id for _ in range(2)} == {"a", "b"}
            session.step(x())
            assert next(watch).revision == 1
            server.kill()
            server.restart()
            for turn in range(3):
                session.step(x(turn))
            event = next(watch)
            skipped = event.skipped_revisions
            while event.revision < 4:
                event = next(watch)
                skipped += event.skipped_revisions
            assert event.session_id == "a", "the other has not changed"
            quiet.step(x())
            assert (next(watch).session_id, event.revision) == ("b", 4)


def test_a_server_that_is_not_there_is_reported() -> None:
    with (
        stepwell.connect("127.0.0.1:1", connect_timeout_s=0.1) as client,
        client.watch_sessions(["a"]) as watch,
        pytest.raises(stepwell.UnavailableError, match="no server was reached"),
    ):
        next(watch)


def test_each_session_is_watched_on_its_replica_and_on_another_one_when_that_is_killed() -> None:
    with (
        Valkey() as valkey,
        replicas(valkey, 2) as servers,
        stepwell.connect([server.address for server in servers]) as client,
        stepwell.connect(servers[0].address) as direct,
    ):
        sessions = [client.open_session(MODEL, session_id=f"s{i}") for i in range(8)]
        others = [direct.open_session(MODEL, session_id=session.id) for session in sessions]
        with client.watch_sessions([session.id for session in sessions], inputs=True, states=True) as watch:
            assert {next(watch).session_id for _ in sessions} == {session.id for session in sessions}
            for session in sessions:
                session.step(x())
                event = next(watch)
                assert (event.session_id, event.kind, event.from_store) == (session.id, "step", False)
                assert event.inputs
            for other in others:  # the sessions of the second replica are then changed by the first
                other.refresh()
                other.step(x())
            events = [next(watch) for _ in sessions]
            assert {event.revision for event in events} == {2}
            assert {event.from_store for event in events} == {False, True}
            for event in events:
                (state,) = [session.get_state() for session in sessions if session.id == event.session_id]
                assert all(array.tobytes() == state[name].tobytes() for name, array in event.states.items())
            servers[1].kill()
            left = {session.id for session in sessions}
            for session in sessions:
                session.refresh()
                session.step(x())
            while left:
                event = next(watch)
                if event.revision == 3:
                    left.discard(event.session_id)
