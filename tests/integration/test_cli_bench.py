"""`stepwell bench` against a real server. What is measured is never asserted, only that it adds up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import stepwell
from support.processes import until
from support.servers.served import Served, local_server

QUICK = ("--duration-s", "0.6", "--warm-up-s", "0.2", "--timeout-s", "100")
Bench = Callable[..., Any]


@pytest.fixture
def nothing_is_left(served: Served) -> Iterator[None]:
    before = {one.session_id for one in served.client.sessions()}
    yield
    assert {one.session_id for one in served.client.sessions()} <= before


@pytest.fixture
def bench(served: Served, nothing_is_left: None) -> Bench:
    def run(*arguments: str, json_too: bool = True) -> Any:
        options = (*QUICK, *arguments, *(("--json",) if json_too else ()))
        finished = subprocess.run(
            command(served, *options), capture_output=True, text=True, timeout=200, check=False
        )
        if json_too and finished.returncode == 0:
            return json.loads(finished.stdout)
        return finished

    return run


def command(served: Served, *options: str) -> list[str]:
    return [sys.executable, "-m", "stepwell", "bench", "--server", served.address, *options]


def started(address: str, *options: str, duration_s: int = 300, **others: Any) -> subprocess.Popen[str]:
    """A run that only a signal ends before its time."""
    where = [sys.executable, "-m", "stepwell", "bench", "seq", "--server", address, "--timeout-s", "100"]
    length = ["--warm-up-s", "0", "--duration-s", str(duration_s), "--json"]
    return subprocess.Popen([*where, *length, *options], stdout=subprocess.PIPE, text=True, **others)


def steps_are_made(client: stepwell.Client, sessions: int = 1) -> None:
    """Wait until so many sessions of a run have been stepped some times."""
    until(lambda: sum(one.revision > 5 for one in client.sessions(prefix="bench-")) >= sessions)


def interrupted(process: subprocess.Popen[str]) -> Any:
    """The document of a run that a signal has ended."""
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    result = json.loads(output)
    assert result["interrupted"]
    assert result["steps"] > 0
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "mode"),
    [("seq", "unary"), ("multi", "unary"), ("multi", "frames"), ("multi", "group")],
)
def test_every_mode_counts_what_it_does(bench: Bench, served: Served, mode: str, model: str) -> None:
    shape = ("--sessions", "5", "--concurrency", "3", "--batch-size", "2", "--steps-per-call", "4")

    result = bench(
        model, "--mode", mode, *shape, "--processes", "2", *(("--group-size", "2") if mode == "group" else ())
    )

    assert result["errors"] == {}, result["first_error"]
    assert result["calls"] > 0
    if mode != "group":
        assert result["steps"] == result["calls"] * 4
    else:
        assert result["calls"] * 4 <= result["steps"] <= result["calls"] * 8
    assert result["steps_per_s"] > 0
    assert result["row_steps_per_s"] == pytest.approx(2 * result["steps_per_s"], rel=1e-3)
    latency = result["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert result["processes"] == 2
    assert result["server_pid"] in (served.server.pid, None)
    assert 0 < result["client_busy"] < 1.1


def test_the_document_has_every_documented_key(bench: Bench) -> None:
    from stepwell.cli import main

    described = main.commands["bench"].load().json_keys  # type: ignore[attr-defined]
    keys = [key for text, _ in described for key in text.split(", ")]

    assert sorted(bench("seq", "--sessions", "2")) == sorted(keys)


@pytest.mark.slow
def test_the_result_for_people(bench: Bench) -> None:
    finished = bench("seq", "--mode", "unary", "--sessions", "1", json_too=False)

    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    facts = dict(line.split(maxsplit=1) for line in finished.stdout.splitlines())
    assert (facts["load"], facts["errors"]) == ("unary: 1 sessions, all at once, by 1 process", "none")


def test_a_model_that_is_not_there_is_one_line(bench: Bench) -> None:
    finished = bench("nothing", "--sessions", "1")

    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("stepwell: error: ")
    assert finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_what_the_server_refuses_is_one_line_and_nothing_is_left(bench: Bench) -> None:
    # Each process's inputs are larger than the server takes, so that not one call succeeds.
    finished = bench("seq", "--sessions", "2", "--steps-per-call", "500000")

    assert finished.returncode == 1
    assert "no step was answered: " in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frames", "group"])
def test_interrupted_it_reports_and_closes_its_sessions(
    served: Served, nothing_is_left: None, mode: str
) -> None:
    process = started(served.address, "--mode", mode, "--sessions", "20")
    steps_are_made(served.client)
    process.send_signal(signal.SIGINT)
    interrupted(process)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups of signals")
@pytest.mark.parametrize("number", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_ended_by_a_signal_to_all_its_processes_it_reports_and_closes_its_sessions(
    served: Served, nothing_is_left: None, number: str
) -> None:
    process = started(served.address, "--sessions", "8", "--processes", "2", start_new_session=True)
    steps_are_made(served.client)
    # should the machine kill all processes of the run, the server closes the sessions
    idle_s = {one.max_idle_s for one in served.client.sessions(prefix="bench-")}
    for _ in range(2):  # as `timeout` does
        os.killpg(process.pid, getattr(signal, number))
    assert interrupted(process)["unanswered"] == 0
    assert idle_s == {3600.0 + 300.0}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_calls_that_a_dead_server_never_answers_are_counted(number: str) -> None:
    with local_server("seq") as server, stepwell.connect(server.address) as client:
        options = ("--sessions", "6", "--processes", "2")
        process = started(server.address, *options, duration_s=8, stderr=subprocess.PIPE)
        steps_are_made(client, 6)
        assert server.pid is not None
        os.kill(server.pid, getattr(signal, number))
        try:
            output, errors = process.communicate(timeout=200)
        finally:
            server.kill()
    assert process.returncode == 1, errors
    result = json.loads(output)
    assert result["unanswered"] == 6
    assert result["calls"] > 0
    # each session's last call waited until the run gave up, longer than all that were answered
    assert result["latency_ms"]["max"] == pytest.approx(result["longest_wait_s"] * 1e3, abs=1)
    assert result["longest_wait_s"] > 5
    assert "the server did not answer calls at the end: 6, the longest for " in errors


def test_killed_it_leaves_no_process_and_no_session(served: Served, nothing_is_left: None) -> None:
    with started(served.address, "--mode", "frames", "--sessions", "8", "--processes", "2") as process:
        steps_are_made(served.client)
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: not served.client.sessions(prefix="bench-"))


@pytest.mark.slow
def test_sessions_closed_by_someone_else_are_errors_by_kind(served: Served, nothing_is_left: None) -> None:
    process = started(served.address, "--mode", "unary", "--sessions", "4")
    steps_are_made(served.client, 4)
    victim, other = (one.session_id for one in served.client.sessions(prefix="bench-")[:2])
    served.client.close_session(victim)
    # the victim's next step fails, and the others' do not wait for it
    closed_at = info(served, other).revision
    until(lambda: info(served, other).revision > closed_at + 50)
    process.send_signal(signal.SIGINT)
    result = interrupted(process)
    assert set(result["errors"]) == {"SessionNotFoundError"}
    assert victim in result["first_error"]


def info(served: Served, session_id: str) -> stepwell.SessionInfo:
    return served.client.session_info(session_id)
