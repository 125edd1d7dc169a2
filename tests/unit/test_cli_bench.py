"""The parts of `stepwell bench`: latencies, plans, inputs, and what it finds out about the server."""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
import sys
import time
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stepwell
from stepwell import TensorInfo
from stepwell.cli import main
from stepwell.cli.bench import Counts, Latencies, Plan, facts, parts, random_inputs
from stepwell.cli.toolkit import listener
from stepwell.cli.toolkit.target import Target

WHOLE = Plan(
    target=Target("127.0.0.1:50051", 10.0),
    model="forecast",
    mode="unary",
    sessions=10,
    concurrency=7,
    group_size=1,
    steps_per_call=1,
    batch_size=1,
    prefix="bench-",
)


def plan(**changes: object) -> Plan:
    return dataclasses.replace(WHOLE, **changes)  # type: ignore[arg-type]


# --- latencies ---


def test_quantiles_are_numpys_to_one_per_cent() -> None:
    times = np.random.default_rng(1).lognormal(-6, 1.5, 5000)
    latencies = Latencies()
    for one in times:
        latencies.add(float(one))

    for q in (0.5, 0.9, 0.99, 0.999):
        exact = float(np.quantile(times, q, method="inverted_cdf"))
        assert latencies.quantile_s(q) == pytest.approx(exact, rel=0.01)
    assert latencies.max_s == times.max()
    assert latencies.quantile_s(1.0) <= times.max()
    assert latencies.count == 5000
    assert latencies.in_ms()["mean"] == pytest.approx(times.mean() * 1e3, abs=1e-4)


def test_latencies_of_any_size_are_counted() -> None:
    latencies = Latencies()
    for seconds in (0.0, 1e-9, 1e-6, 3600.0, 1e9):
        latencies.add(seconds)

    assert latencies.quantile_s(0.5) == pytest.approx(1e-6, rel=0.01)
    assert latencies.quantile_s(1.0) == pytest.approx(3600, rel=0.01)
    assert latencies.count == 5


def test_without_calls_there_are_no_quantiles() -> None:
    assert set(Latencies().in_ms().values()) == {None}


def test_latencies_of_processes_merge() -> None:
    left, right, both = Latencies(), Latencies(), Latencies()
    for i in range(1, 10_000):
        one = left if i % 3 else right
        one.add(i / 1000)
        both.add(i / 1000)

    merged = Latencies()
    for one in (left, right):
        merged.merge(pickle.loads(pickle.dumps(one)))  # noqa: S301 - our own

    expected = both.in_ms()
    assert (merged.count, merged.in_ms()) == (both.count, expected)


def test_the_client_is_the_limit_when_its_event_loop_works_all_the_time() -> None:
    counts = Counts()
    until = time.monotonic() + 10
    while time.thread_time() - counts.began_cpu_s < 0.05 and time.monotonic() < until:
        sum(range(10_000))
    counts.end()
    assert 0 < counts.busy <= 1.1

    found: dict[str, Any] = {
        "steps_per_s": 1.0, "batch_size": 1, "server_cpu_s": None, "server_cpu_note": "it is elsewhere",
        "sessions": 1, "concurrency": 1, "group_size": None, "steps_per_call": 1, "processes": 1, "mode": "unary",
        "seconds": 1.0, "calls": 1, "steps": 1, "calls_per_s": 1.0, "latency_ms": {}, "errors": {},
        "unanswered": 0,
    }  # fmt: skip
    for busy, says in ((0.95, True), (0.5, False)):
        shown = dict(facts(found | {"client_busy": busy, "client_is_limit": says}))
        assert ("the client is the bottleneck: use more --processes" in shown["client CPU"]) is says


# --- plan ---


@pytest.mark.parametrize("mode", ["unary", "group"])
@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize(
    ("sessions", "concurrency", "group_size"), [(8, 7, 1), (1, 1, 1), (100, 13, 7), (9, 9, 4)]
)
def test_shares_are_the_whole(
    mode: str, processes: int, sessions: int, concurrency: int, group_size: int
) -> None:
    whole = plan(mode=mode, sessions=sessions, group_size=group_size if mode == "group" else 1)
    whole = dataclasses.replace(whole, concurrency=min(concurrency, whole.units))

    shares = whole.shares(processes)

    assert len(shares) <= processes
    assert [one for share in shares for one in share.ids()] == whole.ids()
    assert sum(share.concurrency for share in shares) == whole.concurrency
    assert all(0 < share.concurrency <= share.units for share in shares)
    assert all(share.sessions % whole.group_size == 0 for share in shares[:-1])


def test_smaller_numbers_have_no_larger_parts() -> None:
    for count in range(1, 9):
        for large in range(count, 40):
            for small in range(count, large + 1):
                pairs = zip(parts(small, count), parts(large, count), strict=True)
                assert all(a <= b for a, b in pairs)


# --- inputs ---


def spec(dtype: str, *shape: int, temporal: bool = True) -> TensorInfo:
    return TensorInfo("x", dtype, shape, temporal)


@pytest.mark.parametrize(
    ("dtype", "sent"), [("float32", "float32"), ("int32", "int32"), ("bool", "bool"), ("bfloat16", "float32")]
)
def test_inputs_have_the_models_type(dtype: str, sent: str) -> None:
    for one in random_inputs([spec(dtype, 3)], rows=5, steps=4, seed=0):
        assert one["x"].dtype == sent
        assert one["x"].shape == (5, 4, 3)


def test_inputs_without_time_and_single_steps_have_no_time_axis() -> None:
    assert random_inputs([spec("float32", 3)], 5, 1, 0)[0]["x"].shape == (5, 3)
    assert random_inputs([spec("float32", 3, temporal=False)], 5, 4, 0)[0]["x"].shape == (5, 3)


def test_inputs_take_bounded_memory() -> None:
    assert len(random_inputs([spec("float32", 1024)], rows=1024, steps=8, seed=0)) == 2
    with pytest.raises(stepwell.InvalidInputError, match="1073741824 bytes at most"):
        random_inputs([spec("float32", 1024)], rows=1 << 20, steps=1, seed=0)


# --- processor time ---


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS tells no user the sockets of all processes")
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_listener_is_found(family: int, host: str) -> None:
    with socket.socket(family) as listening:
        try:
            listening.bind((host, 0))
        except OSError:
            pytest.skip("no such address here")
        listening.listen()
        port = listening.getsockname()[1]

        found = listener.find_listener(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    assert found.pid == os.getpid()


def test_processor_time_grows() -> None:
    server = listener.Listener((os.getpid(),))
    before = server.cpu_s()
    assert before is not None

    until = time.monotonic() + 10
    while (server.cpu_s() or 0.0) <= before and time.monotonic() < until:
        sum(range(100_000))

    assert (server.cpu_s() or 0.0) > before


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("192.0.2.1:50051", "not on this machine"),
        ("unix:/run/stepwell", "not on a port"),
        ("localhost:1", "listens"),
    ],
)
def test_a_server_that_is_not_found_is_explained(address: str, says: str) -> None:
    found = listener.find_listener(address)

    assert found.pid is None
    assert found.cpu_s() is None
    assert says in found.reason


# --- command line ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--group-size", "4"], "--group-size must be given with --mode group"),
        (["--mode", "bidi"], "'--mode': 'bidi' is not one of"),
        (["--sessions", "0"], "'--sessions': 0 is not in the range"),
        (["--sessions", "1000001"], "'--sessions'"),
        (["--duration-s", "nan"], "'--duration-s'"),
        (["--duration-s", "1e9"], "'--duration-s'"),
        (["--processes", "65"], "'--processes'"),
        (["--steps-per-call", "-1"], "'--steps-per-call'"),
        (["--server", "nowhere"], "'--server'"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["bench", "forecast", *arguments])

    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("stepwell: error: ")
    assert result.stderr.count("\n") == 1


def test_a_server_that_is_away_is_one_line() -> None:
    result = CliRunner().invoke(main, ["bench", "m", "--server", "127.0.0.1:1", "--timeout-s", "0.3"])

    assert result.exit_code == 1
    assert result.stderr.startswith(
        "stepwell: error: no server was reached at 127.0.0.1:1 (--server) within 0.3 s"
    )
    assert result.stdout == ""
