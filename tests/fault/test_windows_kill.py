"""Sessions of a model with large windows, of which the store keeps changes, while the server is killed again and again."""

from __future__ import annotations

import functools
import random
import resource
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from support.load.replica_faults import pass_s
from support.models import programs
from support.servers.fork_server import ForkedServer
from support.servers.valkey_servers import Cluster, Sentinels, Valkey, migrate

KILLS, SESSIONS = 6, 5
# Keras calls numpy in a way that numpy 2 deprecates, when it saves a model.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def saved(folder: Path) -> Any:
    """A model whose window has 16 KiB, in `model.keras` of a folder."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    inputs = keras.Input((None, 32))
    model: Any = keras.Model(inputs, keras.layers.Conv1D(8, 3, dilation_rate=64, padding="causal")(inputs))
    model.save(folder / "model.keras")
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "paged", "valkey"])
def test_every_output_is_right_whenever_the_server_is_killed(tmp_path: Path, kind: str) -> None:
    """A step that the kill interrupts is sent again. The windows reach back over many kills.

    `paged` has room for fewer rows than there are. `valkey` has two servers, and kills one of them.
    """
    model = saved(tmp_path)
    chance, rng = random.Random(33), np.random.default_rng(33)
    x = rng.standard_normal((SESSIONS, 4000, 32)).astype(np.float32)
    whole, at = np.asarray(model(x)), [0] * SESSIONS
    with ExitStack() as stack:
        extra = {"sync": ["--durability", "sync"], "paged": ["--resident-rows", "3"]}.get(kind)
        if extra is None:
            extra = ["--store", stack.enter_context(Valkey(append="always")).url()]
        servers = [
            stack.enter_context(
                ForkedServer(
                    {"m": tmp_path / "model.keras"},
                    data_dir=None if kind == "valkey" else tmp_path / "data",
                    cache_dir=programs.cache_dir(),
                    extra_args=extra,
                    start_timeout_s=100,
                )
            )
            for _ in range(1 + (kind == "valkey"))
        ]
        server = servers[0]
        client = stack.enter_context(stepwell.connect(",".join(each.address for each in servers)))
        sessions = [client.open_session("m", session_id=f"s{number}") for number in range(SESSIONS)]
        for _ in range(KILLS):
            is_killed = threading.Event()

            def kill(is_killed: threading.Event = is_killed) -> None:
                server.kill()
                is_killed.set()
                server.restart()

            killer = threading.Timer(chance.uniform(0.05, 0.5), kill)
            killer.start()
            steps_after = 0
            while steps_after < 30:
                steps_after += is_killed.is_set()
                number, steps = chance.randrange(SESSIONS), chance.choice([1, 1, 1, 1, 3, 40])
                if at[number] + steps > x.shape[1]:
                    break
                now = slice(at[number], at[number] + steps)
                answer = sessions[number].step(x[number : number + 1, now])
                np.testing.assert_allclose(answer, whole[number : number + 1, now], rtol=0, atol=2e-5)
                at[number] += steps
            killer.join()
        for number, session in enumerate(sessions):
            assert session.position == at[number]
    assert min(at) > 200


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["sync", "async"])
@pytest.mark.parametrize("kind", ["sentinel", "cluster"])
def test_outputs_have_the_same_bits_as_in_memory_while_nodes_of_valkey_change(
    tmp_path: Path, kind: str, durability: str
) -> None:
    """With `async` a fail-over may take steps back: the session is then where it was after an earlier step."""
    saved(tmp_path)
    chance, rng = random.Random(f"{kind} {durability}"), np.random.default_rng(33)
    x, at, taken_back = rng.standard_normal((SESSIONS, 3000, 32)).astype(np.float32), [0] * SESSIONS, 0
    server = functools.partial(
        ForkedServer, {"m": tmp_path / "model.keras"}, cache_dir=programs.cache_dir(), start_timeout_s=100
    )
    with server() as memory, stepwell.connect(memory.address) as client:
        whole = np.stack([client.open_session("m").step(each[None])[0] for each in x])
    with ExitStack() as stack:
        nodes: Sentinels | Cluster = Sentinels() if kind == "sentinel" else Cluster()
        stack.enter_context(nodes)
        waits = "&replicas=1" if (kind, durability) == ("sentinel", "sync") else ""
        url = nodes.url(waits or "&partitions=9")
        extra = ["--store", url, "--durability", durability]
        servers = [stack.enter_context(server(extra_args=extra)) for _ in range(2)]
        client = stack.enter_context(stepwell.connect(",".join(each.address for each in servers)))
        sessions = [client.open_session("m", session_id=f"s{number}") for number in range(SESSIONS)]
        pool = stack.enter_context(ThreadPoolExecutor(1))
        for _ in range(1 + (kind == "cluster")):
            steps_left, before, ended = 5, sum(at), list[Future[None]]()
            while steps_left:
                if not ended and sum(at) > before + 100:
                    ended.append(pool.submit(disturb, nodes, chance))
                steps_left -= bool(ended) and ended[0].done()
                number, steps = chance.randrange(SESSIONS), chance.choice([1, 1, 3, 40])
                if at[number] + steps > x.shape[1]:
                    break
                now, session = slice(at[number], at[number] + steps), sessions[number]
                try:
                    answer = session.step(x[number : number + 1, now])
                except (stepwell.RevisionConflictError, stepwell.UnavailableError):
                    session.refresh()
                    taken_back += session.position < at[number]
                    at[number] = session.position
                    continue
                np.testing.assert_array_equal(answer[0], whole[number, now])
                at[number] += steps
            ended[0].result()
        for number, session in enumerate(sessions):
            session.refresh()
            taken_back += session.position < at[number]
            next_one = slice(session.position, session.position + 1)
            np.testing.assert_array_equal(
                session.step(x[number : number + 1, next_one])[0], whole[number, next_one]
            )
    assert sum(at) > 100 or durability == "async"
    assert taken_back == 0 or durability == "async"


def disturb(nodes: Sentinels | Cluster, chance: random.Random) -> None:
    """Replace the primary; or kill a node, and move all sessions that it has to another one, a key at a time."""
    if isinstance(nodes, Sentinels):
        nodes.fail_over()
        nodes.wait_ready(1)
    else:
        kill_and_move(nodes, chance)


def kill_and_move(cluster: Cluster, chance: random.Random) -> None:
    source, target, *_ = chance.sample(cluster.primaries, 3)
    source.restart()
    cluster.wait_ok()
    for name in [f"{{{partition}}}" for partition in range(9)]:
        if cluster.primary_of(name) is source:
            slot = cluster.begin_move(source, target, name)
            for key in source.ask("CLUSTER", "GETKEYSINSLOT", slot, 99):
                pass_s(chance.uniform(0, 0.1))
                migrate(source, target, key)
            cluster.end_move(source, target, slot)


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["sync", "async"])
def test_what_a_full_disk_refuses_changes_nothing(tmp_path: Path, durability: str) -> None:
    """Here a limit on the size of the server's files is reached. It ends with the process."""
    saved(tmp_path)
    chance, rng, at = random.Random(durability), np.random.default_rng(33), [0] * 40
    x = rng.standard_normal((len(at), 400, 32)).astype(np.float32)
    server = functools.partial(
        ForkedServer, {"m": tmp_path / "model.keras"}, cache_dir=programs.cache_dir(), start_timeout_s=100
    )
    with server() as memory, stepwell.connect(memory.address) as client:
        whole = client.open_sessions("m", len(at)).step(x)
    data = tmp_path / "data"
    with (
        server(data_dir=data, extra_args=["--durability", durability]) as full,
        stepwell.connect(full.address, timeout_s=20) as client,
    ):
        sessions = [client.open_session("m", session_id=f"s{number}") for number in range(len(at))]

        def steps(count: int, limit_s: float = 20) -> list[stepwell.StepwellError]:
            """Step sessions; return why some were refused. A short limit ends the retries of those that must be."""
            refused = list[stepwell.StepwellError]()
            for _ in range(count):
                number, time_steps = chance.randrange(len(at)), chance.choice([1, 1, 1, 5])
                now = slice(at[number], at[number] + time_steps)
                try:
                    answer = sessions[number].step(x[number : number + 1, now], timeout_s=limit_s)
                except (stepwell.UnavailableError, stepwell.DeadlineExceededError) as error:
                    refused.append(error)
                    sessions[number].refresh()
                    assert sessions[number].position == at[number]
                    continue
                np.testing.assert_array_equal(answer[0], whole[number, now])
                at[number] += time_steps
            return refused

        assert steps(100) == []
        limit_files(full, max(512 * path.stat().st_blocks for path in data.rglob("data.mdb")) + 2**17)
        error = stepwell.StepwellError("")
        for limit_s in (0.5, 20):  # a busy machine gets more time
            with pytest.raises((stepwell.UnavailableError, stepwell.DeadlineExceededError)) as caught:
                client.open_sessions("m", 300, timeout_s=limit_s)
            error = caught.value
            if isinstance(error, stepwell.UnavailableError):
                break
        assert "No space left on device: new sessions must leave" in str(error)
        assert steps(60) == [], "the log has its room"
        limit_files(full, 2**16)
        refused = steps(8, limit_s=0.2)
        assert any("the store must be able to keep the change; got no room" in str(each) for each in refused)
        limit_files(full, resource.RLIM_INFINITY)
        assert steps(30) == []
        limit_files(full, 2**16)
        assert len(steps(4, limit_s=0.2)) == 4
        full.kill()
        full.restart()
        assert steps(200) == []


def limit_files(server: ForkedServer, size: int) -> None:
    assert server.pid is not None
    _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, hard))
