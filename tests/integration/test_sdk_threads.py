"""Many threads that step their sessions with one sync client: what leaves together, and what each of them gets."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
import pytest

import stepwell
from support.sdk.scripted_server import MODEL, Fault, ScriptedServer
from support.sdk.sender_queue import SenderQueue
from support.servers.served import Served, local_server

THREADS = 64
STEPS = 12
WAIT_S = 100.0
X = np.ones((1, 2), np.float32)


def at_once(use: Callable[[int], Any], count: int) -> list[Any]:
    """What each use came to, a result or an error; all run at the same time, each in a thread of its own."""
    start = threading.Barrier(count)

    def run(i: int) -> Any:
        start.wait(WAIT_S)
        try:
            return use(i)
        except stepwell.StepwellError as error:
            return error

    with futures.ThreadPoolExecutor(count) as threads:
        return [one.result(WAIT_S) for one in [threads.submit(run, i) for i in range(count)]]


class Held:
    """A client with a call and a frame under way that are not answered before `release`: who steps, waits."""

    def __init__(self, server: ScriptedServer, **kwargs: Any) -> None:
        self.others = set(threading.enumerate())  # of other tests' clients, some of which they never close
        self.client = stepwell.connect(server.address, **kwargs)
        self.line = SenderQueue.of_client(self.client)
        self.threads = futures.ThreadPoolExecutor(40)
        gates = [server.hold(method) for method in ("Step", "StepStream")]
        self._gates = [gate for gate, _ in gates]
        self.under_way = []
        for _, arrived in gates:
            self.under_way.append(self.threads.submit(self.client.open_session(MODEL).step, X))
            assert arrived.acquire(timeout=WAIT_S)
        assert self.line.arrived.acquire(timeout=WAIT_S)

    def stand(self, session: stepwell.Session, x: Any = X) -> futures.Future[Any]:
        step = self.threads.submit(session.step, x)
        assert self.line.arrived.acquire(timeout=WAIT_S)
        return step

    def release(self) -> None:
        for gate in self._gates:
            gate.set()

    def close(self) -> None:
        self.release()
        self.client.close()
        self.threads.shutdown()


@pytest.fixture
def held(server: ScriptedServer) -> Iterator[Held]:
    held = Held(server)
    yield held
    held.close()


def test_steps_of_many_threads_leave_together(held: Held, server: ScriptedServer) -> None:
    sessions = [held.client.open_session(MODEL, batch_size=1 + i % 3) for i in range(30)]
    x = [np.random.default_rng(i).random((1 + i % 3, 2), np.float32) for i in range(30)]
    steps = [held.stand(session, x[i]) for i, session in enumerate(sessions)]
    held.release()
    outputs = [one.result(WAIT_S) for one in steps]
    assert all(np.array_equal(y, x[i]) for i, y in enumerate(outputs))
    assert [len(request.step.session_ids) for request in server.requests("StepStream")] == [1, 30]
    assert len(server.requests("Step")) == 1
    assert [session.revision for session in sessions] == [1] * 30


def test_without_frames_each_step_is_a_call(server: ScriptedServer) -> None:
    with stepwell.connect(server.address, coalesce=False) as client:
        sessions = [client.open_session(MODEL) for _ in range(8)]
        outcomes = at_once(lambda i: [sessions[i].step(X) for _ in range(3)], 8)
    assert all(np.array_equal(y[-1], 3 * X) for y in outcomes)
    assert (len(server.requests("Step")), server.requests("StepStream")) == (24, [])


def test_a_stream_that_breaks_is_made_up_for(server: ScriptedServer) -> None:
    server.fail("StepStream", Fault(after_work=True), 3)
    server.fail("Step", Fault(after_work=True), 3)
    with stepwell.connect(server.address) as client:
        sessions = [client.open_session(MODEL) for _ in range(16)]
        outcomes = at_once(lambda i: [sessions[i].step(X) for _ in range(STEPS)], 16)
    assert all(np.array_equal(y, (i + 1) * X) for ys in outcomes for i, y in enumerate(ys))
    assert server.applied == 16 * STEPS


def test_closing_ends_waiting_and_running_calls(held: Held, server: ScriptedServer) -> None:
    steps = [held.stand(held.client.open_session(MODEL)) for _ in range(5)]
    mine = {
        t for t in threading.enumerate() if t.name in ("stepwell-sender", "stepwell-stream")
    } - held.others
    assert mine
    held.client.close()
    ends = [type(one.exception(WAIT_S)) for one in (*steps, *held.under_way)]
    assert ends == [stepwell.ClosedError] * 7
    assert len(server.requests("StepStream")) == 1
    assert not [t for t in mine if t.is_alive()]


@pytest.mark.slow
def test_ctrl_c_ends_one_callers_wait_and_costs_the_others_a_retry(
    held: Held, server: ScriptedServer
) -> None:
    session, other = held.client.open_session(MODEL), held.client.open_session(MODEL)
    waiting = held.stand(other)
    main = threading.main_thread().ident
    assert main is not None

    interrupted = threading.Event()

    def interrupt() -> None:
        assert held.line.arrived.acquire(timeout=WAIT_S)
        # Python misses a signal that comes just before a thread falls asleep: then once more.
        for _ in range(10):
            signal.pthread_kill(main, signal.SIGINT)
            if interrupted.wait(3.0):
                return

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        session.step(X)
    interrupted.set()
    interrupting.join(WAIT_S)
    held.release()
    assert np.array_equal(waiting.result(WAIT_S), X)
    assert np.array_equal(session.step(X), X), "the same call finishes the change, whether it was sent or not"
    assert np.array_equal(session.step(2 * X), 3 * X)
    assert (other.revision, session.revision) == (1, 2)


def test_threads_that_share_a_session_lose_no_step(server: ScriptedServer) -> None:
    x = np.random.default_rng(5).integers(1, 100, (16, STEPS, 1, 2)).astype(np.float32)
    with stepwell.connect(server.address) as client:
        shared = [client.open_session(MODEL) for _ in range(4)]

        def use(i: int) -> list[Any]:
            return [shared[i % 4].step(x[i, k]) for k in range(STEPS)]

        outcomes = at_once(use, 16)
        for j, session in enumerate(shared):
            assert session.revision == session.position == 4 * STEPS
            # In whatever order: the outputs are the sums on the way, each step is one of the differences.
            sums = np.sort(np.concatenate([np.stack(outcomes[i])[:, 0, 0] for i in range(j, 16, 4)]))
            assert sorted(np.diff(sums, prepend=0)) == sorted(x[j::4, :, 0, 0].ravel())


def test_each_of_many_threads_gets_its_own_sequence(served: Served) -> None:
    x = np.random.default_rng().standard_normal((THREADS, STEPS, 3)).astype(np.float32)
    whole, _ = served.client.predict("seq", x)
    with stepwell.connect(served.address) as client:
        sessions = [client.open_session("seq") for _ in range(THREADS)]

        def use(i: int) -> Any:
            outputs = []
            for k in range(STEPS):
                outputs.append(sessions[i].step(x[i : i + 1, k]))
                assert sessions[i].revision == sessions[i].position == k + 1
            return np.concatenate(outputs)

        outcomes = at_once(use, THREADS)
        for session in sessions:
            session.close()
    assert np.stack(outcomes).tobytes() == whole.tobytes()


def test_bad_input_among_many_threads(served: Served) -> None:
    with stepwell.connect(served.address) as client:
        sessions = [client.open_session("seq") for _ in range(16)]
        x = [np.random.default_rng(i).standard_normal((1, 3)).astype(np.float32) for i in range(16)]
        x[5][0, 1] = np.nan
        outcomes = at_once(lambda i: [sessions[i].step(x[i]) for _ in range(5)], 16)
        assert isinstance(outcomes.pop(5), stepwell.InvalidInputError)
        assert all(isinstance(ys, list) for ys in outcomes)
        for session in sessions:
            session.close()


@pytest.mark.slow
def test_a_server_that_is_killed_under_many_threads() -> None:
    with (
        local_server("seq") as server,
        stepwell.connect(server.address, timeout_s=WAIT_S) as client,
    ):
        sessions = [client.open_session("seq") for _ in range(16)]
        stepped = threading.Semaphore(0)
        x = np.ones((1, 3), np.float32)

        def use(i: int) -> None:
            while True:
                sessions[i].step(x)
                stepped.release()

        def kill() -> None:
            for _ in range(50):
                assert stepped.acquire(timeout=WAIT_S)
            server.kill()
            server.restart()

        outcomes = at_once(lambda i: use(i) if i < 16 else kill(), 17)[:16]
        # Its sessions were in memory only: each thread is told, and none waits for ever.
        assert all(isinstance(end, stepwell.SessionGoneError) for end in outcomes), outcomes
        outcomes = at_once(lambda _: client.open_session("seq").step(x), 8)
        assert all(isinstance(y, np.ndarray) for y in outcomes)
