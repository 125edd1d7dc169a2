"""A fork behaves as a process that `subprocess` starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.secured import Server
from support.servers import fork_server
from support.servers.fault_servers import arguments

pytestmark = [
    pytest.mark.slow,  # only a change of the harness can break it
    pytest.mark.skipif(sys.platform != "linux", reason="there are forks on Linux only"),
]
PROGRAM = """
import json, os, random, sys, threading
shown = {
    "arguments": sys.argv[1:],
    "count": os.environ.get("COUNT"),
    "descriptors": len(os.listdir("/proc/self/fd")) - 1,
    "folder": os.getcwd(),
    "forked": "stepwell_server.app" in sys.modules,
    "name": __name__,
    "parent": os.getppid(),
    "path": sys.path[0],
    "session": os.getsid(0) == os.getpid(),
    "threads": threading.active_count(),
}
try:
    print(json.dumps(shown, sort_keys=True), flush=True)
    print(random.getrandbits(64))
    print("and this", file=sys.stderr)
    sys.stdin.read()
except KeyboardInterrupt:
    sys.exit(7)
sys.exit(5)
"""
WRAPPER = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
COMMAND = (sys.executable, "-m", "program", "a", "b c")


@pytest.fixture(autouse=True)
def _on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_is_on", True)
    monkeypatch.setattr(fork_server, "_PROGRAM", "program")
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(PROGRAM)


def started(
    environment: Mapping[str, str] | None = None, *, command: Sequence[str] = COMMAND, **others: Any
) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {**os.environ, "COUNT": "3", **(environment or {})}
    return fork_server.Process(command, env=env, text=True, **pipes, **others)


def test_it_is_like_a_process_that_subprocess_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    forks = [started(start_new_session=True) for _ in range(2)]
    found = [fork.communicate(timeout=100) for fork in forks]
    monkeypatch.setattr(fork_server, "_is_on", False)
    with started(start_new_session=True) as plain:
        out, err = plain.communicate(timeout=100)
    assert [fork.returncode for fork in forks] == [plain.returncode] * 2 == [5, 5]
    assert [one[1] for one in found] == [err] * 2
    shown = [one[0].splitlines() for one in found]
    assert [one[0].replace('"forked": true', '"forked": false') for one in shown] == [out.splitlines()[0]] * 2
    assert '"forked": true' in shown[0][0]
    assert len({shown[0][1], shown[1][1]}) == 2, "forks draw the same random numbers"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 7)]
)
def test_it_gets_signals(number: signal.Signals, code: int) -> None:
    with started() as fork:
        assert fork.stdout is not None
        assert '"forked": true' in fork.stdout.readline()
        fork.send_signal(number)
        assert fork.wait(100) == code


def test_a_process_that_reads_another_environment_at_its_start_is_no_fork() -> None:
    with started({"PYTHONFOO": "1"}) as process:
        out, _ = process.communicate(timeout=100)
    assert '"forked": false' in out


@pytest.mark.parametrize(
    "command", [(sys.executable, "program.py"), (sys.executable, "-c", WRAPPER, *COMMAND)]
)
def test_a_script_or_a_wrapper_is_no_fork(command: Sequence[str]) -> None:
    """A script may replace what modules have taken from each other already; a wrapper changes what a process sees."""
    with started(command=command) as process:
        out, _ = process.communicate(timeout=100)
    assert '"forked": false' in out


def test_servers_end_with_the_process_that_started_them() -> None:
    code = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from support.servers import fork_server
fork_server.switch_on()
fork_server._PROGRAM = "program"
process = fork_server.Process({COMMAND!r}, text=True, stdin=-1, stdout=-1, stderr=-3)
assert '"forked": true' in process.stdout.readline()
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=250,
    )
    # the end of the output, which the fork has too, comes when both have ended
    assert done.stdout == ""


def test_a_server_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_PROGRAM", "stepwell_server")
    with Server(**arguments(tmp_path / "data", [])) as server:
        command = Path(f"/proc/{server.pid}/cmdline").read_text()
        assert "fork_server.py" in command
        assert server.kill() == -9
        server.restart()
        assert server.stop() == 0
