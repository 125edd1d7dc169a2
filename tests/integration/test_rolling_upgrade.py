"""A rolling upgrade of a model: replicas that share a store load its new version one by one, then the default moves once.

Sessions are stepped all the while, each on one replica or on all of them in turn. No caller gets an error, and what
each session answers is that of the versions in their order: before the move, then after it, never back.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest

import stepwell
from support import secured
from support.checks.replay import LstmDense
from support.load.driver import FEATURES, MODEL
from support.load.moving_defaults import PATIENCE_S, Admin, Reference
from support.models import programs
from support.peers.wire import Wire, arrays, of_call, tensor
from support.processes import until
from support.secured import Server
from support.servers.replica_servers import replicas
from support.servers.server_process import ServerProcess, forecast, retrained
from support.servers.valkey_servers import Valkey

pytestmark = pytest.mark.skipif(secured.is_on(), reason="versions are the same with TLS")
#: The versions by their numbers; 2 has other weights than 1.
FILES = {1: forecast, 2: retrained}


class Sessions:
    """Some sessions as they must be."""

    def __init__(self, count: int) -> None:
        self._reference = Reference({v: LstmDense.load(made().path) for v, made in FILES.items()}, count)
        self._numbers = np.random.default_rng(count)
        self._count = count
        self.ran: list[list[int]] = [[] for _ in range(count)]
        """The versions on which each was stepped, each once for as long as it stayed there."""
        self.steps = 0

    def draw(self) -> Any:
        return self._numbers.standard_normal((self._count, FEATURES)).astype(np.float32)

    def answered(self, x: Any, y: Any, said: Sequence[int]) -> None:
        """A step of all of them."""
        ran = self._reference.step(x, np.asarray(y)).tolist()
        assert ran == list(said), "a step ran on another version than it says"
        for own, version in zip(self.ran, ran, strict=True):
            if own[-1:] != [version]:
                own.append(version)
        self.steps += 1


class Callers:
    """Steps sessions by threads until it is stopped."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(len(servers) + 2)
        self._running: list[Future[None]] = []
        self.sessions: list[Sessions] = []

    def __enter__(self) -> Self:
        for server in self._servers:
            self._begin(self._by_frames, Sessions(20), server)
        self._begin(self._by_turns, Sessions(1))
        return self

    def _begin(self, work: Any, sessions: Sessions, *args: Any) -> None:
        self.sessions.append(sessions)
        self._running.append(self._pool.submit(work, sessions, *args))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for done in self._running:
            done.result()

    def progress(self) -> None:
        """Return when everybody got on."""
        before = [each.steps for each in self.sessions]

        def have() -> bool:
            for done in self._running:
                if done.done():
                    done.result()
            return all(own.steps > was + 3 for own, was in zip(self.sessions, before, strict=True))

        until(have)

    def have_gone(self, *versions: int) -> None:
        """Return when all sessions are on the last of these; they went there by the others, in their order."""
        until(lambda: all(own[-1:] == [versions[-1]] for each in self.sessions for own in each.ran))
        for each in self.sessions:
            for own in each.ran:
                assert own == list(versions)

    def _by_frames(self, sessions: Sessions, server: Server) -> None:
        """On one replica, whose client sends again what is refused for a moment."""
        with (
            stepwell.connect(server.address, timeout_s=PATIENCE_S) as client,
            client.open_sessions(MODEL, 20) as group,
        ):
            while not self._stop.is_set():
                x = sessions.draw()
                y = group.step(x)
                sessions.answered(x, y, group.model_versions.tolist())

    def _by_turns(self, sessions: Sessions) -> None:
        """On all of them, one after the other; by request id, so that each step is made once."""
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(server.address)) for server in self._servers]
            session_id = wires[0].open(MODEL)
            for revision, wire in zip(itertools.count(), itertools.cycle(wires)):
                if self._stop.is_set():
                    return
                x = sessions.draw()
                answer = self._answer(wire, session_id, x, revision)
                (y,) = arrays(answer.outputs).values()
                sessions.answered(x, y, [answer.model_version])

    @staticmethod
    def _answer(wire: Wire, session_id: str, x: Any, revision: int) -> Any:
        found: list[Any] = []

        def is_answered() -> bool:
            try:
                found.append(
                    wire.step(session_id, [tensor(x)], expected_revision=revision, request_id=revision + 1)
                )
            except grpc.RpcError as error:
                if of_call(error).code != "UNAVAILABLE":
                    raise
            return bool(found)

        until(is_answered)
        return found[0]


@pytest.mark.slow
def test_a_model_is_upgraded_replica_by_replica_under_load() -> None:
    with (
        Valkey(append="everysec") as valkey,
        replicas(valkey, 3) as servers,
        contextlib.ExitStack() as stack,
    ):
        admins = [Admin(server.address) for server in servers]
        for admin in admins:
            stack.callback(admin.close)
        with Callers(servers) as callers:
            callers.progress()
            for admin in admins:
                assert admin.load(retrained().path, version=2, keep_default=True) == 2
                callers.progress()
            callers.have_gone(1)
            assert admins[0].move(2)
            callers.have_gone(1, 2)
            until(lambda: all(admin.default() == 2 for admin in admins))
            assert admins[1].move(1)  # and back
            callers.have_gone(1, 2, 1)
            callers.progress()


def test_a_replica_without_the_version_lets_others_have_its_sessions_and_goes_on_when_it_is_loaded(
    tmp_path: Path,
) -> None:
    file = tmp_path / "retrained.keras"
    shutil.copyfile(retrained().path, file)
    with (
        Valkey(append="everysec") as valkey,
        replicas(valkey, 2) as servers,
        contextlib.ExitStack() as stack,
    ):
        admins = [Admin(server.address) for server in servers]
        for admin in admins:
            stack.callback(admin.close)
        with Callers(servers) as callers:
            callers.progress()
            assert admins[0].load(file, version=2, keep_default=True) == 2
            file.unlink()  # or the other would load it by itself
            assert admins[0].move(2)
            with Wire(servers[1].address) as wire:
                until(lambda: _refusal(wire) == "UNAVAILABLE")
            assert admins[1].load(retrained().path, version=2, keep_default=True) == 2
            callers.have_gone(1, 2)
            callers.progress()


def _refusal(wire: Wire) -> str:
    try:
        wire.close(wire.open(MODEL))
    except grpc.RpcError as error:
        return of_call(error).code
    return ""


@pytest.mark.slow
def test_a_replica_whose_file_is_another_says_so_and_does_not_start() -> None:
    with Valkey(append="everysec") as valkey, replicas(valkey, 1):
        arguments = [f"{MODEL}={retrained().path}", "--store", valkey.url(), "--durability", "async"]
        cache = ["--cache-dir", str(programs.cache_dir()), "--listen", "127.0.0.1:0"]
        with ServerProcess(*arguments, *cache, ready=False) as server:
            code, _, err = server.finish()
    assert code == 2, err
    assert (
        "stepwell: error: --store: version 1 of model 'forecast' must be the same file on all servers" in err
    )
    assert "forecast@2=PATH" in err
