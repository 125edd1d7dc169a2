"""The compiler that is kept warm: one import for many models, each alone; whatever ends, nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import stepwell_server
from stepwell_server import program_file
from stepwell_server.catalog.files.programs import load_program
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host import sandbox
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.host.limits import Limits
from support.clock import ManualClock
from support.models import programs
from support.processes import HANG_S, children, descriptors, home_of, is_there, until

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="it looks at processes as Linux shows them"
)
STAGES = ["load", "trace", "probe", "convert", "check"]
PACKAGE = str(Path(stepwell_server.__file__).parents[1])
#: A module that stops where it is imported, which is in the middle of compiling, after it has created a file.
WAITING = """
import os, threading
open(os.environ["HOME"] + "/here", "x").close()
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCompiler]:
    with WarmCompiler(tmp_path_factory.mktemp("kept")) as compiler:
        yield compiler


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A compiled model: to try it, processes import no framework, and are there soon."""
    file = tmp_path / "lstm.stepwell"
    program_file.save(programs.program("lstm_dense"), file)
    return file


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "waiting.py").write_text(WAITING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def busy(compiler: WarmCompiler) -> tuple[int, int]:
    """Wait until a worker is in the middle of compiling; returns the fork server and the worker."""
    until(lambda: any(True for pid in compiler.pids for _ in home_of(pid).glob("*/home/here")))
    (server,) = compiler.pids
    (worker,) = children(server)
    return server, worker


def touched(file: Path, number: int, folder: Path) -> Path:
    """The same model as another file: none that is in the cache."""
    copy = folder / f"{number}.keras"
    copy.write_bytes(file.read_bytes() + bytes([number]))
    return copy


@pytest.mark.slow
def test_one_process_imports_and_each_model_has_a_worker_of_its_own(kept: WarmCompiler) -> None:
    before = kept.pids  # none, unless another test was first
    stages: list[str] = []
    servers = []
    for name in ("lstm_dense", "gru_reset_after"):
        known = programs.program(name)
        program = kept.compile(programs.saved(name).path, stages.append, keep=False)
        servers += kept.pids
        assert (program.fingerprint, program.files) == (known.fingerprint, known.files)
        assert (program.batch_sizes, program.proof) == (known.batch_sizes, known.proof)
    assert stages == STAGES * 2
    assert servers == [servers[0]] * 2
    assert before in ([], servers[:1])
    assert children(servers[0]) == []


@pytest.mark.slow
def test_a_model_that_is_refused_leaves_nothing_for_the_next_one(
    lstm: Path, kept: WarmCompiler, tmp_path: Path
) -> None:
    kept.compile(touched(lstm, 1, tmp_path), keep=False)
    (server,) = kept.pids
    damaged, large = tmp_path / "damaged.keras", touched(lstm, 2, tmp_path)
    damaged.write_bytes(lstm.read_bytes()[:-200])
    with pytest.raises(ModelError, match=f"^{damaged}: not a .keras file, or a truncated one"):
        kept.compile(damaged)
    with pytest.raises(ModelError, match=f"^{large}: its content must be at most 1000 bytes"):
        kept.compile(large, limits=Limits(1000))
    assert (kept.pids, children(server)) == ([server], [])
    kept.compile(touched(lstm, 3, tmp_path), keep=False)
    assert kept.pids == [server]


LOOK = """
import json, os, socket, sys
from pathlib import Path
from stepwell_server.compile.host import worker
from stepwell_server.compile.host.wire import Channel

folder = Path(sys.argv[1])
given, home, secret = folder / "given", folder / "home", folder / "secret"
tried = {
    "given": lambda: (given / "model").read_bytes(),
    "change given": lambda: (given / "model").write_bytes(b"x"),
    "add to given": lambda: (given / "more").write_bytes(b"x"),
    "home": lambda: (home / "mine").write_bytes(b"x"),
    "secret": lambda: secret.read_bytes(),
    "fork": os.fork,
    "socket": socket.socket,
}

def attempt(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"

worker._Jobs.do = lambda _jobs, _job: {name: attempt(action) for name, action in tried.items()}
ours, theirs = socket.socketpair()
Channel(ours).send({"job": "look", "timeout_s": 60})
ours.shutdown(socket.SHUT_WR)
said = os.dup(1)
terms = {"home": str(home), "given": str(given), "imports": [], "disk_bytes": 1 << 20}
code = worker.run(Channel(theirs), os.open("/dev/null", os.O_WRONLY), terms, os.getppid())
answers = Channel(ours)
answers.receive()
os.write(said, json.dumps([code, answers.receive()]).encode())
"""


def test_a_worker_reads_what_it_is_given_and_no_other_file(tmp_path: Path) -> None:
    for folder in ("given", "home"):
        (tmp_path / folder).mkdir()
    (tmp_path / "given" / "model").write_bytes(b"model")
    (tmp_path / "secret").write_bytes(b"secret")
    run = subprocess.run(
        [sys.executable, "-P", "-c", LOOK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env=os.environ | {"PYTHONPATH": PACKAGE},
        check=True,
    )
    code, said = json.loads(run.stdout)
    found, had = said["done"], sandbox.tried()
    assert (code, found["given"], found["home"]) == (0, "done", "done")
    if had.files:
        assert {found[name] for name in ("change given", "add to given", "secret")} == {"PermissionError"}
    if had.programs:
        assert (found["fork"], found["socket"]) == ("PermissionError", "PermissionError")


@pytest.mark.slow
def test_links_that_a_worker_leaves_are_not_followed(lstm: Path, waiting: Path) -> None:
    """A link in place of the program is not followed."""
    trap = 'import os\nos.symlink({secret!r}, os.environ["HOME"] + "/program.stepwell")\n'
    break_out = (
        "import stepwell_server.program_file as file, stepwell_server.compile.host.worker as worker\n"
        "worker.program_file.save = lambda *_arguments, **_options: None\n"
    )
    known = programs.saved("gru_reset_after")
    entry = next(known.cache_dir.glob("*.stepwell"))
    (waiting / "waiting.py").write_text(trap.format(secret=str(entry)) + break_out)
    with (
        WarmCompiler(waiting / "cache", ["waiting"]) as compiler,
        pytest.raises(OSError, match="Too many levels of symbolic links"),
    ):
        compiler.compile(lstm, keep=False)
    assert [file.name for file in (waiting / "cache").iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "fork server"])
def test_a_killed_process_is_reported_and_the_next_model_compiles(
    who: str, lstm: Path, waiting: Path
) -> None:
    with WarmCompiler(waiting / "cache", ["waiting"]) as compiler, ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compiler.compile, lstm)
        server, worker = busy(compiler)
        folder = home_of(server)
        os.kill(worker if who == "worker" else server, signal.SIGKILL)
        with pytest.raises(
            ModelError, match=r"lstm_dense.keras: the compiling process was killed in stage load"
        ):
            compiling.result(HANG_S)
        until(lambda: not is_there(worker))
        assert is_there(server) == (who == "worker")
        assert list(folder.glob("*/home")) == []
        (waiting / "waiting.py").write_text("")
        assert compiler.compile(lstm, keep=False).fingerprint == programs.program("lstm_dense").fingerprint
        assert (compiler.pids == [server]) == (who == "worker")


@pytest.mark.slow
def test_a_fork_server_that_was_killed_while_idle_is_started_again(
    kept: WarmCompiler, compiled: Path
) -> None:
    kept.settle(compiled)
    (server,) = kept.pids
    os.kill(server, signal.SIGKILL)
    until(lambda: not is_there(server))
    kept.settle(compiled)
    assert kept.pids not in ([], [server])


def test_a_worker_without_a_folder_is_reported_and_leaks_nothing(compiled: Path, tmp_path: Path) -> None:
    with WarmCompiler(tmp_path / "cache") as compiler:
        compiler.settle(compiled)
        (server,) = compiler.pids
        folder, before = home_of(server), descriptors()
        shutil.rmtree(folder)
        folder.write_text("in the way")
        with pytest.raises(ModelError, match="the compiling process cannot be started: Not a directory"):
            compiler.settle(compiled)
        assert descriptors() == before
        folder.unlink()
        folder.mkdir()
        compiler.settle(compiled)
        assert compiler.pids == [server]


@pytest.mark.slow
def test_compilations_run_in_order_and_callers_can_give_up(lstm: Path, waiting: Path) -> None:
    gone = threading.Event()
    told: list[str] = []
    heard = threading.Event()

    def tell(stage: str) -> None:
        told.append(stage)
        heard.set()

    first_gone = threading.Event()
    with WarmCompiler(waiting / "cache", ["waiting"]) as compiler, ThreadPoolExecutor(3) as pool:
        limits = dataclasses.replace(compiler.limits, abandoned=first_gone)
        first = pool.submit(compiler.compile, lstm, limits=limits)
        server, worker = busy(compiler)
        limits = dataclasses.replace(compiler.limits, abandoned=gone)
        second = pool.submit(compiler.compile, touched(lstm, 1, waiting), tell, limits=limits)
        assert heard.wait(HANG_S)
        assert told == ["waiting"]
        gone.set()
        with pytest.raises(ModelError, match="no caller is waiting for it"):
            second.result(HANG_S)
        assert children(server) == [worker]  # the first one continues
        heard.clear()
        third = pool.submit(compiler.compile, touched(lstm, 2, waiting), tell)
        assert heard.wait(HANG_S)
        (waiting / "waiting.py").write_text("")
        first_gone.set()
        with pytest.raises(ModelError, match="no caller is waiting for it"):
            first.result(HANG_S)
        third.result(HANG_S)
        assert told == ["waiting", "waiting", *STAGES]
        assert compiler.pids[0] == server


@pytest.mark.slow
def test_closing_ends_the_running_compilation(lstm: Path, waiting: Path) -> None:
    compiler = WarmCompiler(waiting / "cache", ["waiting"])
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(compiler.compile, lstm)
        server, worker = busy(compiler)
        folder = home_of(server)
        compiler.close()
        compiler.close()
        with pytest.raises(ModelError, match="no caller is waiting for it"):
            compiling.result(HANG_S)
    assert (compiler.pids, is_there(server), is_there(worker), folder.exists()) == ([], False, False, False)
    with pytest.raises(ModelError, match="no caller is waiting for it"):
        compiler.compile(lstm, keep=False)


def test_unused_processes_end(compiled: Path) -> None:
    clock, known = ManualClock(), programs.saved("lstm_dense")
    with WarmCompiler(known.cache_dir, clock=clock, idle_s=60.0) as compiler:
        assert compiler.end_idle()
        compiler.settle(compiled)
        (server,) = compiler.pids
        clock.advance(59.0)
        assert not compiler.end_idle()
        compiler.compile(known.path, keep=False)  # from the cache: nobody needs the processes for that
        clock.advance(1.0)
        assert compiler.end_idle()
        assert (compiler.pids, is_there(server)) == ([], False)
        compiler.settle(compiled)
        assert compiler.pids != []


ORPHANED = """
import sys
from pathlib import Path
from stepwell_server.compile.host.compiler import WarmCompiler
WarmCompiler(Path(sys.argv[1]), ["waiting"]).compile(Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_all_of_it_ends_with_the_server_however_that_ends(lstm: Path, waiting: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", ORPHANED, str(waiting / "cache"), str(lstm)],
        env=os.environ | {"PYTHONPATH": PACKAGE, "TMPDIR": str(waiting)},
    )
    try:
        until(lambda: any(True for _ in waiting.glob("stepwell-compile-*/*/home/here")))
        (server,) = children(process.pid)
        (worker,) = children(server)
    finally:
        process.kill()
        process.wait(HANG_S)
    until(lambda: not is_there(server) and not is_there(worker))
    assert list(waiting.glob("stepwell-compile-*")) == []


def test_a_compiled_model_is_tried_by_a_worker_without_frameworks(compiled: Path, tmp_path: Path) -> None:
    known, file = programs.program("lstm_dense"), compiled
    stages: list[str] = []
    with WarmCompiler(tmp_path / "cache") as compiler:
        program = load_program(file, compiler, stages.append)
        (server,) = compiler.pids
        mapped = Path(f"/proc/{server}/maps").read_text()
        assert ("ai_edge_litert" in mapped, "libtensorflow" in mapped) == (True, False)
        assert children(server) == []
        with pytest.raises(ModelError, match=r"must be at most 9 bytes \(--max-model-bytes\)"):
            load_program(file, compiler, limits=Limits(9))
        file.write_bytes(file.read_bytes()[:-40])
        with pytest.raises(ModelError, match=f"^{file}: not a .stepwell file, or a truncated one"):
            load_program(file, compiler)
        assert compiler.pids == [server]
    assert stages == ["load", "check"]
    assert (program.fingerprint, program.batch_sizes) == (known.fingerprint, known.batch_sizes)
    assert not (tmp_path / "cache").exists()
