"""`stepwell top`, of a real server: once, as JSON, and live in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stepwell
from stepwell.cli import main
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.top import Source
from support.servers.server_process import FEATURES, ServerProcess, serve

_TIMEOUT_S = 100.0


@pytest.fixture(scope="module")
def busy() -> Iterator[tuple[ServerProcess, str]]:
    """A server that has done something, and the address of its metrics."""
    with serve("--metrics-listen", "127.0.0.1:0", "--log-format", "json") as server:
        address = json.loads(server.wait_for_log('"metrics"'))["address"]
        yield server, address


@contextlib.contextmanager
def _working(server: ServerProcess) -> Iterator[None]:
    """Steps of one session while the body runs, and errors of another."""
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        with (
            stepwell.connect(server.address) as client,
            client.open_session("forecast", session_id="busy one") as session,
        ):
            while not ended.is_set():
                session.step(np.zeros((1, FEATURES), np.float32))
                with pytest.raises(stepwell.SessionNotFoundError):
                    client.session_info("nobody")
                begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(_TIMEOUT_S)
        yield
    finally:
        ended.set()
        thread.join(_TIMEOUT_S)


def _command(server: ServerProcess, metrics: str, *arguments: str) -> list[str]:
    named = ("--metrics", f"http://{metrics}") if metrics else ()
    where = ("--server", server.address, *named, "--interval", "0.2s")
    return [str(Path(sys.executable).with_name("stepwell")), "top", *where, *arguments]


def _run(server: ServerProcess, metrics: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return _invoked(*_command(server, metrics, *arguments)[1:])


def _invoked(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = CliRunner().invoke(main, arguments)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


@contextlib.contextmanager
def _in_terminal(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command in a terminal of 80 columns, and the file descriptor of who sits at it."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
    running = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        yield running, ours
    finally:
        running.kill()
        running.wait()
        os.close(ours)


def _rest(terminal: int) -> bytes:
    """All that comes until the command has closed the terminal."""
    seen = b""
    with contextlib.suppress(OSError):
        while some := os.read(terminal, 65536):
            seen += some
    return seen


@pytest.mark.slow
def test_one_picture_for_people_and_for_programs(busy: tuple[ServerProcess, str]) -> None:
    server, metrics = busy
    with _working(server):
        found = json.loads(_run(server, metrics, "--json").stdout)
        shown = _run(server, metrics, "--once")
    (model,) = found["models"]
    assert model["model"] == "forecast"
    assert model["row_steps_per_s"] > 0
    assert (model["passes_per_s"], model["rows_per_pass"]) == (pytest.approx(model["row_steps_per_s"]), 1)
    assert 0 < model["p50_s"] <= model["p99_s"]
    assert 0 < model["busy"] < 20  # a share, but of a time that is not quite the one it was counted in
    assert model["sessions"] == model["resident_rows"] == 1
    assert {method["method"] for method in found["methods"]} >= {"Step", "GetSession"}
    assert [(error["reason"], error["model"]) for error in found["errors"]] == [("SESSION_NOT_FOUND", "")]
    assert [slow["session_id"] for slow in found["slow_sessions"]] == ["busy one"]
    assert found["server"]["memory_bytes"] > 1e6
    assert found["server"]["store_ready"] is True
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in shown.stdout
    for word in ("MODEL", "P99", "forecast", "METHOD", "SLOW SESSION", "busy one", "SESSION_NOT_FOUND"):
        assert word in shown.stdout, word


@pytest.fixture(scope="module")
def other() -> Iterator[ServerProcess]:
    """Another server of this machine, with metrics of its own."""
    with serve("--metrics-listen", "127.0.0.1:0", "--log-format", "json") as server:
        yield server


def _top(*servers: ServerProcess, metrics: str = "") -> subprocess.CompletedProcess[str]:
    addresses = ",".join(server.address for server in servers)
    named = ("--metrics", f"http://{metrics}") if metrics else ()
    return _invoked("top", "--json", "--interval", "200ms", "--server", addresses, *named)


def _info(server: ServerProcess) -> stepwell.ServerInfo:
    with stepwell.connect(server.address) as client:
        return client.server_info()


def test_each_server_says_where_its_metrics_are(
    busy: tuple[ServerProcess, str], other: ServerProcess
) -> None:
    server, metrics = busy
    mine, theirs = _info(server), _info(other)
    assert mine.metrics_address == metrics
    assert mine.id != theirs.id
    done = _top(other, server)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["servers"]
    assert [(row["metrics"], row["id"]) for row in found] == [
        (one.metrics_address, one.id) for one in (theirs, mine)
    ]
    assert done.stderr == ""


def test_metrics_of_another_server_are_never_shown_without_a_word(
    busy: tuple[ServerProcess, str], other: ServerProcess
) -> None:
    """That a server says another one's address is made up here: a forwarded port, or the default one, would do it."""
    server, metrics = busy
    mine, theirs = _info(server), _info(other)
    with stepwell.connect(server.address) as client:
        with pytest.MonkeyPatch.context() as patch:
            wrong = dataclasses.replace(mine, metrics_address=theirs.metrics_address)
            patch.setattr(stepwell.Client, "server_info", lambda *_, **__: wrong)
            with pytest.raises(Failure) as caught:
                Source(server.address, client, None, 10.0).read()
        for name in (server.address, mine.id, f"http://{theirs.metrics_address}/metrics", theirs.id):
            assert name in caught.value.message
    named = _top(server, metrics=theirs.metrics_address or "")
    assert named.returncode == 0
    assert (
        f"note: --metrics has metrics of the server process {theirs.id}; --server is {mine.id}"
        in named.stderr
    )
    assert _top(server, metrics=metrics).stderr == ""


def test_a_server_that_was_restarted_is_asked_again(
    busy: tuple[ServerProcess, str], other: ServerProcess
) -> None:
    """Its id is another one, and where the system chooses the port so are its metrics."""
    before, after = _info(busy[0]), _info(other)
    told = [before, after]
    with stepwell.connect(busy[0].address) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(stepwell.Client, "server_info", lambda *_, **__: told[0])
        metrics = Source(busy[0].address, client, None, 10.0)
        assert metrics.read().server_ids == [before.id]
        told.pop(0)
        metrics._id = "of a process that is gone"
        assert (metrics.read().server_ids, metrics.name) == ([after.id], after.metrics_address)


def test_a_server_reports_itself_as_its_metrics_do(busy: tuple[ServerProcess, str]) -> None:
    server, metrics = busy
    with _working(server):
        by_itself, by_metrics = (json.loads(_top(server, metrics=where).stdout) for where in ("", metrics))
    (one,) = by_itself["servers"]
    assert one == {"id": _info(server).id, "metrics": "", "error": ""}
    assert (len(by_itself["replicas"]), by_metrics["replicas"]) == (1, [])
    assert _shape(by_itself | {"replicas": []}) == _shape(by_metrics)
    for found in (by_itself, by_metrics):
        (model,) = found["models"]
        assert (model["model"], model["sessions"]) == ("forecast", 1)
        assert 0 < model["p50_s"] <= model["p99_s"]
        assert model["row_steps_per_s"] > 0
        assert [(error["reason"], error["model"]) for error in found["errors"]] == [("SESSION_NOT_FOUND", "")]
        assert [slow["session_id"] for slow in found["slow_sessions"]] == ["busy one"]
    same = ("version", "front", "store", "store_id", "store_ready", "ready", "max_memory_bytes")
    assert all(by_itself["server"][key] == by_metrics["server"][key] for key in same)


def _shape(found: Any) -> Any:
    """Keys and types of a document; of a list those of its first entry."""
    if isinstance(found, dict):
        return {key: _shape(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_shape(each) for each in found[:1]]
    return (
        "number" if isinstance(found, (int, float)) and not isinstance(found, bool) else type(found).__name__
    )


def test_a_server_without_metrics_reports_itself_alone(other: ServerProcess) -> None:
    with serve("--metrics-listen", "off") as server:
        assert _info(server).metrics_address == ""
        done = _top(server)
        assert (done.returncode, done.stderr) == (0, "")
        assert [model["model"] for model in json.loads(done.stdout)["models"]] == ["forecast"]
        both = _top(server, other)
    assert both.returncode == 0, "the other one answers"
    assert f"the server at {server.address} (--server) serves no metrics" in both.stdout


def test_what_cannot_be_read_is_said(busy: tuple[ServerProcess, str]) -> None:
    server, metrics = busy
    for address, said in (
        ("127.0.0.1:1", "cannot be read: "),
        (f"{metrics}/elsewhere", "(--metrics): 404"),
    ):
        failed = _run(server, address, "--once")
        assert failed.returncode == 1
        assert f"http://{address}" in failed.stderr
        assert said in failed.stderr
        assert failed.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 130])
def test_a_server_that_is_gone_holds_up_nothing(busy: tuple[ServerProcess, str], code: int) -> None:
    """Its calls may take an hour; pictures, and the way out, do not wait for them."""
    server, _ = busy
    seen = b""

    def wait_for(words: bytes, times: int = 1) -> None:
        nonlocal seen
        seen = b""
        while seen.count(words) < times:
            assert select.select([ours], [], [], _TIMEOUT_S)[0], seen
            seen += os.read(ours, 65536)

    with serve("--metrics-listen", "127.0.0.1:0") as gone:
        program = str(Path(sys.executable).with_name("stepwell"))
        options = ["--interval", "500ms", "--timeout-s", "1h", "--server", f"{gone.address},{server.address}"]
        with _in_terminal([program, "top", *options]) as (running, ours):
            wait_for(b"2 servers")
            gone.process.kill()
            wait_for(b"NO ANSWER", 3)  # pictures go on
            assert seen.count(b"2 servers") >= 2
            if code:
                running.send_signal(signal.SIGINT)
            else:
                os.write(ours, b"q")
            _rest(ours)
            assert running.wait(_TIMEOUT_S) == code


@pytest.mark.slow
@pytest.mark.parametrize("reports_itself", [True, False])
def test_on_a_terminal_it_runs_until_q_is_pressed(
    busy: tuple[ServerProcess, str], reports_itself: bool
) -> None:
    server, metrics = busy[0], "" if reports_itself else busy[1]
    seen = b""
    with _working(server), _in_terminal(_command(server, metrics)) as (running, ours):
        while seen.count(b"busy one") < 2:  # the second picture
            seen += os.read(ours, 65536)
        os.write(ours, b"q")
        seen += _rest(ours)
        assert running.wait(_TIMEOUT_S) == 0
    assert b"\x1b[?1049h" in seen, "a screen of its own"
    assert b"\x1b[?1049l" in seen, "given back"
    assert b"forecast" in seen
