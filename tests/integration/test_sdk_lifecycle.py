"""What a client leaves behind: no thread, no task, no process; and what a cancelled call leaves: a usable session."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell._transport import stream
from stepwell.testing import LocalServer, ServerStartError
from support.sdk.scripted_server import MODEL, ScriptedServer

X = np.ones((1, 2), np.float32)
WAIT_S = 100.0


def put_server(folder: Path, code: str) -> None:
    """A package in the folder that takes the server's place where the folder comes first among the imports."""
    package = folder / "stepwell_server"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(code)


class Begun:
    """The SDK's threads that are there, but for those that were there before: other tests have theirs."""

    def __init__(self) -> None:
        self._before = set(threading.enumerate())

    def threads(self) -> list[threading.Thread]:
        begun = [thread for thread in threading.enumerate() if thread not in self._before]
        return [thread for thread in begun if thread.name.startswith("stepwell")]

    def names(self) -> list[str]:
        return [thread.name for thread in self.threads()]


def test_no_thread_outlives_a_client(server: ScriptedServer) -> None:
    begun = Begun()
    with stepwell.connect(server.address) as client:
        client.open_sessions(MODEL, 2).step(np.ones((2, 2)))
        threads = begun.threads()
        assert {thread.name for thread in threads} == {"stepwell-stream"}
    for thread in threads:
        thread.join(WAIT_S)
    assert begun.names() == []


def test_no_thread_of_grpc_outlives_a_client(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a lock that the call's destructor needs: an interpreter that ends meanwhile would never end."""
    # Private: the requests are taken by that thread, which so has its last turn late.
    requests = stream._Stream._requests
    consumers: list[threading.Thread] = []

    def late(stream: Any) -> Iterator[Any]:
        consumers.append(threading.current_thread())
        yield from requests(stream)
        threading.Event().wait(0.1)

    monkeypatch.setattr(stream._Stream, "_requests", late)
    with stepwell.connect(server.address) as client:
        client.open_sessions(MODEL, 2).step(np.ones((2, 2)))
    assert [consumer.is_alive() for consumer in consumers] == [False]


async def test_no_task_outlives_a_client(server: ScriptedServer) -> None:
    async with stepwell.aio.connect(server.address) as client:
        session = await client.open_session(MODEL)
        await session.step(X)
    # What was told to end may need another turn of the loop; gRPC's own tasks end in their time.
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    if ours := [task for task in left if _runs_code_of(stepwell, task)]:
        await asyncio.wait(ours, timeout=WAIT_S)
    assert [task for task in ours if not task.done()] == []


def _runs_code_of(package: ModuleType, task: asyncio.Task[Any]) -> bool:
    # The loop itself closes generators, such as that of gRPC's requests, in tasks that have no code.
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and str(code.co_filename).startswith(str(Path(str(package.__file__)).parent))


@pytest.mark.parametrize("ending", ["", "client.close()", "raise SystemExit(0)"])
def test_an_interpreter_ends_whether_the_client_was_closed_or_not(
    server: ScriptedServer, ending: str
) -> None:
    code = (
        "import numpy as np, stepwell\n"
        f"client = stepwell.connect({server.address!r})\n"
        f"group = client.open_sessions({MODEL!r}, 2)\n"
        "group.step(np.ones((2, 2)))\n"
        f"{ending}\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


STEPPING = """
import os, sys, threading, numpy as np, stepwell
client = stepwell.connect(sys.argv[1])
begun = threading.Barrier(9)

def use(steps):
    session = client.open_session("sum")
    begun.wait()
    try:
        while steps:
            session.step(np.ones((1, 2), np.float32))
            steps -= 1
    except stepwell.ClosedError:
        pass

def go(steps, daemon):
    threads = [threading.Thread(target=use, args=(steps,), daemon=daemon) for _ in range(8)]
    for thread in threads:
        thread.start()
    begun.wait()
    return threads

def company():
    while client._driver.connections.to(None).sender._thread is None:  # until there is one that the end may meet
        for thread in go(50, False):
            thread.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending",
    [
        "company()",
        "company(); client.close()",
        "company(); go(-1, True)",
        "company(); go(-1, True); client.close()",
        "company(); os.fork() or sys.exit(0)",
        "company(); os._exit(os.waitstatus_to_exitcode(os.waitpid(os.fork() or sys.exit(0), 0)[1]))",
    ],
)
def test_an_interpreter_ends_whatever_its_threads_do(server: ScriptedServer, ending: str) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GRPC_VERBOSITY": "NONE"}
    command = [sys.executable, "-c", f"{STEPPING}\n{ending}", server.address]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def test_a_client_of_one_thread_starts_no_thread_and_one_of_many_ends_what_it_started(
    server: ScriptedServer,
) -> None:
    begun = Begun()
    with stepwell.connect(server.address) as client:
        session = client.open_session(MODEL)
        for _ in range(3):
            session.step(X)
        assert begun.names() == []
        sessions = [client.open_session(MODEL) for _ in range(8)]
        while "stepwell-sender" not in begun.names():
            threads = [threading.Thread(target=one.step, args=(X,)) for one in sessions]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert begun.names() == []


async def test_a_client_may_be_made_before_the_loop_and_closed_unused() -> None:
    client = stepwell.aio.connect("127.0.0.1:1")
    await client.close()
    with pytest.raises(stepwell.ClosedError):
        await client.models()


async def test_a_session_may_be_opened_as_a_task(server: ScriptedServer) -> None:
    async with stepwell.aio.connect(server.address) as client, asyncio.TaskGroup() as tasks:
        opening = [tasks.create_task(client.open_session(MODEL)) for _ in range(3)]
        assert len({(await one).id for one in opening}) == 3


async def test_steps_awaited_together_leave_together(server: ScriptedServer) -> None:
    async with stepwell.aio.connect(server.address) as client:
        sessions = [await client.open_session(MODEL, batch_size=1 + i % 3) for i in range(30)]
        wide = await client.open_session(MODEL)
        x = [np.random.default_rng(i).random((1 + i % 3, 2), np.float32) for i in range(30)]
        steps = [session.step(x[i]) for i, session in enumerate(sessions)]
        outputs = await asyncio.gather(*steps, wide.step(np.ones((1, 4, 2))))
    assert all(np.array_equal(y, x[i]) for i, y in enumerate(outputs[:30]))
    # One frame for those that are alike, one for the session that takes four time steps of float64. If the stream
    # broke, the same one was sent again.
    frames = {tuple(request.step.request_ids) for request in server.requests("StepStream")}
    assert sorted(len(frame) for frame in frames) == [1, 30]


async def test_coalesced_outputs_do_not_share_memory(server: ScriptedServer) -> None:
    async with stepwell.aio.connect(server.address) as client:
        sessions = [await client.open_session(MODEL) for _ in range(2)]
        one, two = await asyncio.gather(*[session.step(X) for session in sessions])
        one += 5
        assert two.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("position", range(5))
async def test_a_cancelled_caller_harms_no_neighbour(server: ScriptedServer, position: int) -> None:
    async with stepwell.aio.connect(server.address) as client:
        sessions = [await client.open_session(MODEL) for _ in range(5)]
        gate, arrived = server.hold("StepStream")
        steps = [asyncio.create_task(session.step(X)) for session in sessions]
        assert await asyncio.to_thread(arrived.acquire, timeout=WAIT_S)
        steps[position].cancel()
        gate.set()
        outcomes = await asyncio.gather(*steps, return_exceptions=True)
        assert isinstance(outcomes.pop(position), asyncio.CancelledError)
        assert all(np.array_equal(y, X) for y in outcomes if isinstance(y, np.ndarray))
        assert len([y for y in outcomes if isinstance(y, np.ndarray)]) == 4
        # The cancelled step did get through: made again it is answered, not applied again.
        assert np.array_equal(await sessions[position].step(X), X)
        assert server.applied == 5


@pytest.mark.parametrize("of", ["a session in frames", "a session", "a group"])
async def test_what_a_cancelled_step_was_for_is_usable(server: ScriptedServer, of: str) -> None:
    async with stepwell.aio.connect(server.address, coalesce=of != "a session") as client:
        n = 3 if of == "a group" else 1
        x = np.ones((n, 2), np.float32)
        stepped: Any = await (client.open_sessions(MODEL, 3) if n == 3 else client.open_session(MODEL))
        gate, arrived = server.hold("Step" if of == "a session" else "StepStream")
        step = asyncio.create_task(stepped.step(x))
        assert await asyncio.to_thread(arrived.acquire, timeout=WAIT_S)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        gate.set()
        assert np.array_equal(await stepped.step(x), x)
        assert server.applied == n
        assert np.all(stepped.revisions == 1 if n == 3 else stepped.revision == 1)


def test_many_threads_share_a_client(server: ScriptedServer) -> None:
    failures: list[BaseException] = []

    def use(client: stepwell.Client) -> None:
        try:
            with client.open_session(MODEL) as session, client.open_sessions(MODEL, 4) as group:
                for i in range(1, 21):
                    assert np.array_equal(session.step(X), i * X)
                    assert np.array_equal(group.step(np.ones((4, 2))), np.full((4, 2), i))
        except BaseException as error:
            failures.append(error)
            raise

    with stepwell.connect(server.address) as client:
        threads = [threading.Thread(target=use, args=(client,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert server.sessions == {}


def test_a_server_that_refuses_to_start_says_why() -> None:
    with pytest.raises(ServerStartError, match=r"ended with exit code 2(?s:.*)no-such-option"):
        LocalServer(extra_args=["--no-such-option"]).start()


def test_a_server_that_takes_too_long_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_server(
        tmp_path, "import sys\nprint('loading', flush=True)\nsys.stdin.read()\nimport time\ntime.sleep(60)\n"
    )
    logs = ""
    for limit_s in (1.0, 4.0, 16.0, 64.0):
        server = LocalServer(env={"PYTHONPATH": str(tmp_path)}, start_timeout_s=limit_s)
        with pytest.raises(ServerStartError, match=f"not ready within {limit_s:g} s"):
            server.start()
        assert server.pid is None
        logs = server.logs()
        if logs:
            break  # else the machine was too busy for it to say something by then
    assert "loading" in logs


LISTENING = """
import socket, sys, threading
host, port = sys.argv[sys.argv.index("--listen") + 1].split(":")
with socket.create_server((host, int(port))) as listening:
    print(f"stepwell: python front, listening on {host}:{listening.getsockname()[1]}", flush=True)
    threading.Event().wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a port for a server that is away")
def test_nobody_gets_the_port_of_a_server_that_is_away(tmp_path: Path) -> None:
    put_server(tmp_path, LISTENING)

    def take(address: str) -> None:
        host, port = address.split(":")
        with socket.socket() as other:
            other.bind((host, int(port)))

    with LocalServer(env={"PYTHONPATH": str(tmp_path)}) as server:
        address = server.address
        server.kill()
        with pytest.raises(OSError, match="in use"):
            take(address)
        server.restart()
        assert server.address == address
    take(address)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child's life to its parent's")
def test_a_server_does_not_outlive_its_parent(tmp_path: Path) -> None:
    put_server(
        tmp_path,
        "import time\nprint('stepwell: python front, listening on 127.0.0.1:1', flush=True)\ntime.sleep(60)\n",
    )
    code = (
        "import sys, threading\n"
        "from stepwell.testing import LocalServer\n"
        "server = LocalServer()\n"
        # Started by a thread that ends at once: the server must not end with it.
        "thread = threading.Thread(target=server.start)\n"
        "thread.start()\n"
        "thread.join()\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        waiting = os.pidfd_open(pid)
        os.kill(pid, 0)
        parent.send_signal(signal.SIGKILL)
        parent.wait(WAIT_S)
    with contextlib.closing(os.fdopen(waiting)):
        import select

        ended, _, _ = select.select([waiting], [], [], WAIT_S)
    assert ended


def test_an_interrupt_of_the_whole_process_group_leaves_the_server_alone(tmp_path: Path) -> None:
    """What a terminal does on Ctrl-C, and a notebook for its stop button."""
    put_server(
        tmp_path,
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(2))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))\n"
        "print('stepwell: python front, listening on 127.0.0.1:1', flush=True)\n"
        "time.sleep(60)\n",
    )
    code = (
        "import sys\n"
        "from stepwell.testing import LocalServer\n"
        "server = LocalServer()\n"
        "server.start()\n"
        "try:\n"
        "    print('started', flush=True)\n"
        "    sys.stdin.read()\n"
        "except KeyboardInterrupt:\n"
        # A server that had received the interrupt would heed it first: it has the lower number.
        "    print(server.stop(), flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stdout.readline() == "15\n"
