"""A real Envoy in front of replicas that share a Valkey: a session goes on wherever its calls go."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell.v1 import sessions_pb2 as pb
from support import secured
from support.peers import wire
from support.peers.wire import Wire, tensor
from support.processes import until
from support.secured import Server
from support.servers.envoy import Envoy
from support.servers.replica_servers import started
from support.servers.served import local_server
from support.servers.valkey_servers import Valkey

pytestmark = pytest.mark.skipif(secured.is_on(), reason="with TLS Envoy is tried in test_envoy")
X = [0.5, -1.0, 2.0]


def replicas(valkey: Valkey, count: int) -> contextlib.AbstractContextManager[list[Server]]:
    """Servers with the same store."""
    store = ["--store", valkey.url(), "--durability", "async"]
    return started([local_server("seq", extra_args=store) for _ in range(count)])


class JsonCaller:
    """Steps a session in JSON, one step after the other, and sends again what got no answer: once each, by request id."""

    def __init__(self, envoy: Envoy, session_id: str) -> None:
        self._envoy = envoy
        self._path = f"/v1/sessions/{session_id}"
        assert envoy.json("POST", self._path, {"model": "seq"})[0] == 200
        self.revision = 0
        self.outputs: list[list[float]] = []

    def step(self) -> None:
        body = {
            "inputs": [{"values": X}],
            "expected_revision": self.revision,
            "request_id": self.revision + 1,
        }
        until(lambda: self._is_answered(body))

    def _is_answered(self, body: dict[str, Any]) -> bool:
        status, answer = self._envoy.json("POST", f"{self._path}:step", body)
        if status == 503:
            return False
        assert status == 200, answer
        self.revision += 1
        assert answer["revision"] == str(self.revision)
        self.outputs.append(answer["outputs"][0]["values"])
        return True


@pytest.mark.slow
def test_sessions_go_on_while_replicas_die_and_stop(tmp_path: Path) -> None:
    x = np.array([X], np.float32)
    stop = threading.Event()
    counts: list[int] = []
    with Valkey(append="everysec") as valkey, replicas(valkey, 3) as servers:
        addresses = [server.address for server in servers]
        with Envoy(tmp_path, addresses) as envoy, stepwell.connect(envoy.address) as client:
            callers = [JsonCaller(envoy, f"json-{number}") for number in range(4)]

            def by_json(caller: JsonCaller) -> None:
                while not stop.is_set():
                    caller.step()

            def by_sdk() -> None:
                with client.open_sessions("seq", 20) as group:
                    steps = 0
                    while not stop.is_set():
                        group.step(np.repeat(x, 20, 0))
                        steps += 1
                        assert [int(one) for one in group.revisions] == [steps] * 20
                    counts.append(steps)

            def progress() -> None:
                """Everybody gets on."""
                before = [caller.revision for caller in callers]
                until(
                    lambda: all(
                        caller.revision > was + 2 for caller, was in zip(callers, before, strict=True)
                    )
                )

            with ThreadPoolExecutor(len(callers) + 1) as pool:
                running = [pool.submit(by_json, caller) for caller in callers]
                running.append(pool.submit(by_sdk))
                try:
                    progress()
                    servers[0].kill()
                    progress()
                    servers[0].restart()
                    until(lambda: envoy.healthy() == set(addresses))
                    assert servers[1].stop() == 0
                    progress()
                    servers[2].kill()
                    progress()
                finally:
                    stop.set()
                for done in running:
                    done.result()
            assert counts[0] > 10
            longest = max(caller.revision for caller in callers)
            with Wire(servers[0].address) as one:
                steps = np.repeat(x[:, None], longest, 1)
                (wanted,) = wire.arrays(one.predict("seq", [tensor(steps)]).outputs).values()
                for caller in callers:
                    found = np.array(caller.outputs, np.float32)
                    np.testing.assert_allclose(found, wanted[0, : caller.revision], rtol=1e-5, atol=1e-6)
                    session_id = caller._path.rpartition("/")[2]
                    read = one.sessions.GetSession(
                        pb.GetSessionRequest(session_id=session_id), timeout=wire.TIMEOUT_S
                    )
                    assert read.session.revision == caller.revision
