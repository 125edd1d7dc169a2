"""What an attacker costs a quiet client, and the server in memory: beside each attack, beside a bare sink, and alone.

    make bench ARGS=attacks

The quiet client steps one session every few milliseconds, over a connection of its own, as a caller of one tenant. The
attacker is a process of its own: a stranger without a token, or a caller of another tenant. The sink is a process that
takes in the same attack and does nothing: what the quiet client loses beside it is the machine's doing, not the
server's. Each attack is measured on a server of its own, which keeps sessions in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
from google.protobuf import duration_pb2

import stepwell
from bench import harness, loads
from bench.attacks.attacker import Attack
from bench.floods import new_token
from bench.harness import HERE, MODELS, Key, Measure, Point, Result, measured
from bench.loads import Plan
from stepwell.testing import LocalServer
from stepwell.v1 import models_pb2, sessions_pb2

_MODEL = "small"
_SESSIONS = "/stepwell.v1.SessionService/"
_INTERVAL_S = 0.003
"""The quiet client steps so often, unless the last step takes longer."""
_LOOK_S = 0.02
"""The server's memory is looked at so often."""
_BEFORE_S, _AFTER_S = 0.5, 0.5
"""The attack begins before the quiet client is measured, and ends after it."""
_WATCHED_TIMES = 3
"""A point is measured for this many times `--seconds`: a 99th percentile needs some hundreds of steps."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """An attack by name."""

    attack: Callable[[], Attack]
    is_known: bool
    """The attacker is a caller of another tenant; else a stranger."""
    sessions: int = 0
    """The attacker's tenant has opened so many before."""


def _attack(path: str, message: bytes, connections: int, calls: int, **more: Any) -> Attack:
    return Attack(path, connections, calls, Attack.packed(message), **more)


def _names(size: int) -> bytes:
    return sessions_pb2.OpenSessionRequest(model="x" * size).SerializeToString()


def _unknown(count: int) -> list[str]:
    return [f"unknown-{number}" for number in range(count)]


def _closes(count: int) -> bytes:
    return sessions_pb2.CloseSessionsRequest(session_ids=_unknown(count)).SerializeToString()


def _late_step() -> bytes:
    inputs = [loads.tensor(1, MODELS[_MODEL][1])]
    return sessions_pb2.StepRequest(session_id="member-0", inputs=inputs).SerializeToString()


_STEP = f"{_SESSIONS}Step"
_MEBIBYTE = 1 << 20
KINDS = {
    "compressed: empty gzip members": Kind(
        lambda: _attack(_STEP, gzip.compress(b"", mtime=0) * 400_000, 4, 1, is_compressed=True),
        is_known=False,
    ),
    "compressed: 64 KiB that inflate to 63 MiB": Kind(
        lambda: _attack(_STEP, gzip.compress(bytes(63 * _MEBIBYTE), mtime=0), 4, 4, is_compressed=True),
        is_known=False,
    ),
    "compressed: 4 KiB that inflate to 4 MiB, of a caller": Kind(
        lambda: _attack(_STEP, gzip.compress(bytes(4 * _MEBIBYTE - 1), mtime=0), 4, 4, is_compressed=True),
        is_known=True,
    ),
    "half calls": Kind(lambda: Attack(_STEP, 7, 10_000, ends=False), is_known=False),
    "half calls, of a caller": Kind(lambda: Attack(_STEP, 7, 10_000, ends=False), is_known=True),
    "watches": Kind(lambda: _attack("/grpc.health.v1.Health/Watch", b"", 7, 10_000), is_known=False),
    "refused messages of 30 MiB": Kind(lambda: _attack(_STEP, bytes(30 * _MEBIBYTE), 4, 1), is_known=False),
    "names of 4 MiB": Kind(
        lambda: _attack(f"{_SESSIONS}OpenSession", _names(4 * _MEBIBYTE), 3, 1), is_known=True
    ),
    "names of 60 MiB": Kind(
        lambda: _attack(f"{_SESSIONS}OpenSession", _names(60 * _MEBIBYTE), 1, 1), is_known=True
    ),
    "lists of a million empty entries": Kind(
        lambda: _attack(f"{_SESSIONS}ImportSessions", b"\x0a\x00" * 1_000_000, 2, 1), is_known=True
    ),
    "lists of three million ids": Kind(
        lambda: _attack(f"{_SESSIONS}CloseSessions", b"\x0a\x01x" * 3_000_000, 2, 1), is_known=True
    ),
    "closes of 60,000 unknown ids": Kind(
        lambda: _attack(f"{_SESSIONS}CloseSessions", _closes(60_000), 3, 1), is_known=True
    ),
    "closes of 4,096 unknown ids": Kind(
        lambda: _attack(f"{_SESSIONS}CloseSessions", _closes(4096), 3, 1), is_known=True
    ),
    "forks of 60,000 unknown ids": Kind(
        lambda: _attack(
            f"{_SESSIONS}ForkSessions",
            sessions_pb2.ForkSessionsRequest(session_ids=_unknown(60_000)).SerializeToString(),
            3,
            1,
        ),
        is_known=True,
    ),
    "lookups of unknown sessions": Kind(
        lambda: _attack(
            f"{_SESSIONS}GetSession",
            sessions_pb2.GetSessionRequest(session_id="nobody").SerializeToString(),
            4,
            256,
        ),
        is_known=True,
    ),
    "lists of 20,000 sessions": Kind(
        lambda: _attack(
            f"{_SESSIONS}ListSessions",
            sessions_pb2.ListSessionsRequest(page_size=10_000).SerializeToString(),
            4,
            4,
        ),
        is_known=True,
        sessions=20_000,
    ),
    "lists of 20,000 sessions of which none fits": Kind(
        lambda: _attack(
            f"{_SESSIONS}ListSessions",
            sessions_pb2.ListSessionsRequest(
                page_size=10_000, idle_longer=duration_pb2.Duration(seconds=3600)
            ).SerializeToString(),
            4,
            4,
        ),
        is_known=True,
        sessions=20_000,
    ),
    "steps that are late": Kind(
        lambda: _attack(_STEP, _late_step(), 4, 256, more_headers=[("grpc-timeout", "1u")]),
        is_known=True,
        sessions=1,
    ),
    "wrong tokens with 350 headers": Kind(
        lambda: _attack(
            _STEP,
            b"",
            4,
            256,
            more_headers=[("authorization", "Bearer wrong"), *((f"x-{n}", "0123456789") for n in range(350))],
        ),
        is_known=False,
    ),
    "uploads without an end": Kind(
        lambda: Attack("/stepwell.v1.ModelAdminService/UploadModel", 7, 10_000, ends=False), is_known=True
    ),
    "sessions that are opened": Kind(
        lambda: _attack(
            f"{_SESSIONS}OpenSession",
            sessions_pb2.OpenSessionRequest(model=_MODEL).SerializeToString(),
            4,
            64,
        ),
        is_known=True,
    ),
    "steps of unknown sessions": Kind(
        lambda: _attack(_STEP, sessions_pb2.StepRequest(session_id="nobody").SerializeToString(), 4, 256),
        is_known=True,
    ),
    "calls of no method": Kind(lambda: _attack("/no/method", b"", 8, 500), is_known=False),
    "health checks of 200 connections": Kind(
        lambda: _attack("/grpc.health.v1.Health/Check", b"", 200, 60), is_known=False
    ),
    "lookups of a model": Kind(
        lambda: _attack(
            "/stepwell.v1.ModelService/GetModel",
            models_pb2.GetModelRequest(name="x" * 200).SerializeToString(),
            4,
            64,
        ),
        is_known=True,
    ),
}


@contextlib.contextmanager
def _attacking(address: str, file: Path, token: str, run_s: float) -> Iterator[dict[str, Any]]:
    """While the block runs an address is attacked; afterwards the result says what was done."""
    found: dict[str, Any] = {}
    command = [sys.executable, str(HERE / "attacks" / "attacker.py"), address, str(file), str(run_s)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TOKEN": token}
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("the attacker did not begin")
            time.sleep(_BEFORE_S)
            yield found
        except BaseException:
            process.kill()
            raise
        output, _ = process.communicate(timeout=run_s + 60)
    found |= json.loads(output)


class _Quiet:
    """The client that is measured."""

    def __init__(self, server: LocalServer, token: str) -> None:
        self._channel = grpc.insecure_channel(server.address)
        self._step: Any = self._channel.unary_unary(_STEP)
        self._metadata = [("authorization", f"Bearer {token}")]
        with stepwell.connect(server.address, token=token) as client:
            session = client.open_session(_MODEL, session_id="quiet")
        inputs = [loads.tensor(1, MODELS[_MODEL][1])]
        self._request = sessions_pb2.StepRequest(session_id=session.id, inputs=inputs).SerializeToString()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def measure(self, run_s: float) -> Result:
        """Latencies of steps over so many seconds. Every step must succeed."""
        taken, end = [], time.perf_counter() + run_s
        while (began := time.perf_counter()) < end:
            self._step(self._request, metadata=self._metadata, timeout=60)
            took = time.perf_counter() - began
            taken.append(took * 1000)
            time.sleep(max(0.0, _INTERVAL_S - took))  # the pace of the load
        return {
            f"{name}_ms": float(np.quantile(taken, share)) for name, share in (("p50", 0.5), ("p99", 0.99))
        }


class _Memory:
    """The largest resident memory of a process, from here on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.first_bytes = self.most_bytes = harness.resident_bytes(pid)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(_LOOK_S):
            self.most_bytes = max(self.most_bytes, harness.resident_bytes(self._pid))


def beside(kind: Kind, run_s: float, options: tuple[str, ...], tokens: tuple[str, str]) -> Result:
    """A quiet client alone, beside the attack on a sink, and beside the attack on its server."""
    own, other = tokens
    token = other if kind.is_known else ""
    all_s = _BEFORE_S + run_s + _AFTER_S
    with (
        tempfile.TemporaryDirectory() as folder,
        harness.serve(_MODEL, extra_args=options) as server,
        _Quiet(server, own) as quiet,
    ):
        assert server.pid is not None
        if kind.sessions:
            with stepwell.connect(server.address, token=other) as client:
                ids = [f"member-{number}" for number in range(kind.sessions)]
                client.open_sessions(_MODEL, len(ids), session_ids=ids)
        file = Path(folder) / "attack.json"
        file.write_text(json.dumps(dataclasses.asdict(kind.attack())))
        quiet.measure(_BEFORE_S)
        alone = quiet.measure(run_s)
        with (
            harness.started(str(HERE / "attacks" / "sink.py")) as (_, address),
            _attacking(address, file, token, all_s) as sunk,
        ):
            at_sink = quiet.measure(run_s)
        with _Memory(server.pid) as memory, _attacking(server.address, file, token, all_s) as done:
            attacked = quiet.measure(run_s)
    found: dict[str, Any] = {}
    for name, figures in (("alone", alone), ("sink", at_sink), ("attacked", attacked)):
        found |= {f"{name}_{figure}": value for figure, value in figures.items()}
    return found | {
        "p99_against_sink": attacked["p99_ms"] / at_sink["p99_ms"],
        "p99_against_alone": attacked["p99_ms"] / alone["p99_ms"],
        "grown_mib": (memory.most_bytes - memory.first_bytes) / _MEBIBYTE,
        "calls": done["ended"],
        "sent_mib": done["sent_mib"],
        "sink_calls": sunk["ended"],
        "sink_sent_mib": sunk["sent_mib"],
    }


def attacks(plan: Plan) -> list[Point]:
    """Each attack on the server's best front."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "callers.tokens"
        tokens = new_token(file, "quiet"), new_token(file, "hostile")
        options = ("--auth-tokens", str(file))
        run_s = _WATCHED_TIMES * plan.times.run_s
        measures: dict[Key, Measure] = {
            (name,): lambda kind=kind: beside(kind, run_s, options, tokens)  # type: ignore[misc]
            for name, kind in KINDS.items()
        }
        return measured(("attack",), measures, plan.repeats)
