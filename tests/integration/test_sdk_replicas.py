"""Both clients against several replicas that share their sessions: where calls go, and what becomes of them when one is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import stepwell
from stepwell import errors
from support.sdk.client_kinds import SHELLS, connect
from support.sdk.scripted_replicas import ScriptedReplicas
from support.sdk.scripted_server import MODEL, Fault

WAIT_S = 100.0
STOPPING = Fault(reason="UNAVAILABLE", message="the server is stopping")
RNG = np.random.default_rng(15)


@pytest.fixture
def replicas() -> Iterator[ScriptedReplicas]:
    with ScriptedReplicas() as replicas:
        yield replicas


@pytest.fixture(params=SHELLS)
async def client(request: pytest.FixtureRequest, replicas: ScriptedReplicas) -> AsyncIterator[Any]:
    async with connect(request.param, replicas.address, timeout_s=WAIT_S) as client:
        yield client


def random(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


async def until(is_so: Callable[[], Awaitable[bool] | bool]) -> None:
    """Wait for what a client or a replica does by itself."""
    async with asyncio.timeout(WAIT_S):
        while True:
            found = is_so()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.01)


def up(client: Any) -> list[bool]:
    return [replica.is_up for replica in client.replicas]


def bare(replicas: ScriptedReplicas) -> list[str]:
    return [address.rpartition("//")[2] for address in replicas.addresses]


async def given_up(call: Callable[..., Any], is_it: Callable[[str], bool]) -> errors.StepwellError:
    """Make a call that cannot succeed with more and more time, until it ends as it should; returns how."""
    ended: Any = None
    for limit_s in (0.5, 2.0, 20.0):
        with pytest.raises((errors.UnavailableError, errors.DeadlineExceededError)) as caught:
            await call(timeout_s=limit_s)
        ended = caught.value
        if is_it(str(ended)):
            break
    return ended  # type: ignore[no-any-return]


async def test_each_session_goes_to_its_replica(client: Any, replicas: ScriptedReplicas) -> None:
    ids = replicas.spread(30)
    sessions = [await client.open_session(MODEL, session_id=one) for one in ids]
    xs = random(30, 1, 2)
    ys = await asyncio.gather(*(session.step(x) for session, x in zip(sessions, xs, strict=True)))
    np.testing.assert_array_equal(np.array(ys), xs)
    for at in range(3):
        own = {one for one in ids if replicas.ranking(one)[0] == at}
        assert {request.session_id for request in replicas.requests(at, "OpenSession")} == own
        steps = {request.session_id for request in replicas.requests(at, "Step")}
        frames = [request.step.session_ids for request in replicas.requests(at, "StepStream")]
        assert steps.union(*frames) == own
    assert replicas.servers[0].sessions.keys() == set(ids)


async def test_groups_are_split_and_put_together_again(client: Any, replicas: ScriptedReplicas) -> None:
    n, rows = 40, 2
    group = await client.open_sessions(MODEL, n, batch_size=rows, session_ids=replicas.spread(n))
    total = np.zeros((n * rows, 2), np.float32)
    for _ in range(4):
        x = random(n * rows, 2)
        total += x
        np.testing.assert_array_equal(await group.step(x), total)
    some = RNG.permutation(n)[:17]
    at = (some[:, None] * rows + np.arange(rows)).reshape(-1)
    for _ in range(3):
        x = random(17 * rows, 2)
        total[at] += x
        np.testing.assert_array_equal(await group.step(x, members=some), total[at])
    state = await group.get_states()
    np.testing.assert_array_equal(state["sum"], total)
    np.testing.assert_array_equal((await group.get_states(members=some))["sum"], total[at])
    expected: Any = np.full(n, 4)
    expected[some] += 3
    assert group.revisions.tolist() == expected.tolist()
    frames = [[r.step for r in replicas.requests(replica, "StepStream")] for replica in range(3)]
    for replica, own in enumerate(frames):
        assert {one for frame in own for one in frame.session_ids} == {
            one for one in group.ids if replicas.ranking(one)[0] == replica
        }
        assert all(frame.request_id_base for frame in own[:4]), "one number stands for those of all"
    await group.reset_states()
    assert not (await group.get_state())["sum"].any()
    await group.close()
    assert not replicas.servers[0].sessions
    assert all(replicas.requests(at, "CloseSessions") for at in range(3))


async def test_a_replica_that_is_gone_fails_nobody(client: Any, replicas: ScriptedReplicas) -> None:
    n = 30
    group = await client.open_sessions(MODEL, n, session_ids=replicas.spread(n))
    session = await client.open_session(MODEL, session_id=replicas.ids_of(1, 1)[0])
    total, own = np.zeros((n, 2), np.float32), np.zeros((1, 2), np.float32)
    for round_ in range(6):
        if round_ == 2:
            replicas.stop(1)
        x, x1 = random(n, 2), random(1, 2)
        total += x
        own += x1
        ys = await asyncio.gather(group.step(x), session.step(x1))
        np.testing.assert_array_equal(ys[0], total)
        np.testing.assert_array_equal(ys[1], own)
    assert group.revisions.tolist() == [6] * n
    assert session.revision == 6
    assert up(client) == [True, False, True]
    (second,) = {replicas.ranking(session.id)[1]}
    requests = [r.session_id for r in replicas.requests(second, "Step")]
    frames = [r.step.session_ids for r in replicas.requests(second, "StepStream")]
    assert any(session.id in ids for ids in [requests, *frames])


async def test_steps_without_a_reply_are_sent_again_and_applied_once(
    client: Any, replicas: ScriptedReplicas
) -> None:
    group = await client.open_sessions(MODEL, 24, session_ids=replicas.spread(24))
    own = [one for one in group.ids if replicas.ranking(one)[0] == 2]
    assert own
    session = await client.open_session(MODEL, session_id=replicas.ids_of(2, 1)[0])
    x, x1 = random(24, 2), random(1, 2)
    first, first1 = await group.step(x), await session.step(x1)
    # the work is done, and the answers are lost with the replica
    for method in ("Step", "StepStream"):
        replicas.servers[2].fail(method, Fault(after_work=True), times=10)
    again, again1 = await asyncio.gather(group.step(x), session.step(x1))
    np.testing.assert_array_equal(again, first + x)
    np.testing.assert_array_equal(again1, first1 + x1)
    assert group.revisions.tolist() == [2] * 24
    assert session.revision == 2
    assert sum(server.applied for server in replicas.servers) == 2 * 25


async def test_one_that_hangs_ends_only_its_own_members(client: Any, replicas: ScriptedReplicas) -> None:
    group = await client.open_sessions(MODEL, 24, session_ids=replicas.spread(24))
    x = random(24, 2)
    total = await group.step(x)
    hung = [i for i, one in enumerate(group.ids) if replicas.ranking(one)[0] == 0]
    failures: Any = {}
    steps = 1
    for limit_s in (1.0, 10.0, 50.0):  # a busy machine gets more time
        gate, _ = replicas.servers[0].hold("StepStream")
        with pytest.raises(errors.DeadlineExceededError) as caught:
            await group.step(x, timeout_s=limit_s)
        failures = caught.value.failures
        gate.set()
        total, steps = total + x, steps + 1
        np.testing.assert_array_equal(await group.step(x), total)
        assert group.revisions.tolist() == [steps] * 24
        if sorted(failures) == hung:
            break
    assert sorted(failures) == hung
    assert {getattr(error, "outcome", "") for error in failures.values()} == {"unknown"}


async def test_a_member_that_is_asked_for_elsewhere(client: Any, replicas: ScriptedReplicas) -> None:
    group = await client.open_sessions(MODEL, 24, session_ids=replicas.spread(24))
    x = random(24, 2)
    total = await group.step(x)
    own = [one for one in group.ids if replicas.ranking(one)[0] == 1]
    replicas.servers[1].fail("StepStream", Fault(reason="UNAVAILABLE", message="not here", member=0))
    np.testing.assert_array_equal(await group.step(x), total + x)
    assert group.revisions.tolist() == [2] * 24
    (second,) = {replicas.ranking(own[0])[1]}
    assert [own[0]] in [list(r.step.session_ids) for r in replicas.requests(second, "StepStream")]
    # what is overloaded is waited for where it is
    replicas.servers[1].fail(
        "StepStream",
        Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED", retry_after_s=0.01, member=0),
    )
    np.testing.assert_array_equal(await group.step(x), total + x + x)
    assert list(replicas.requests(1, "StepStream")[-1].step.session_ids) == own[:1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "refusal", [STOPPING, Fault(reason="STARTING", message="the server is starting", retry_after_s=1000.0)]
)
async def test_a_drained_replica_and_its_return(
    client: Any, replicas: ScriptedReplicas, refusal: Fault
) -> None:
    """So is one that is being started: the delay that it asks for is for those who have no other replica."""
    ids = replicas.ids_of(0, 8)
    sessions = [await client.open_session(MODEL, session_id=one) for one in ids]
    group = await client.open_sessions(MODEL, 16, session_ids=replicas.spread(16))
    totals = np.zeros((8, 1, 2), np.float32)
    total = np.zeros((16, 2), np.float32)

    async def step_all() -> None:
        nonlocal totals, total
        xs, x = random(8, 1, 2), random(16, 2)
        totals, total = totals + xs, total + x
        steps = [session.step(one) for session, one in zip(sessions, xs, strict=True)]
        y, *ys = await asyncio.gather(group.step(x), *steps)
        np.testing.assert_array_equal(np.array(ys), totals)
        np.testing.assert_array_equal(y, total)

    await step_all()
    replicas.drain(0, refusal)
    await step_all()
    await until(lambda: up(client) == [False, True, True])
    before = [len(replicas.requests(0, method)) for method in ("Step", "StepStream")]
    await step_all()
    assert [len(replicas.requests(0, method)) for method in ("Step", "StepStream")] == before
    replicas.undrain(0)

    async def has_all_back() -> bool:
        steps, frames = (replicas.requests(0, method) for method in ("Step", "StepStream"))
        own = {one.session_id for one in steps[before[0] :]}
        await step_all()
        return own.union(*(one.step.session_ids for one in frames[before[1] :])) >= set(ids)

    await until(has_all_back)
    assert up(client) == [True] * 3


async def test_one_that_was_never_there(client: Any, replicas: ScriptedReplicas) -> None:
    replicas.stop(0)
    group = await client.open_sessions(MODEL, 16, session_ids=replicas.spread(16))
    x = random(16, 2)
    np.testing.assert_array_equal(await group.step(x), x)
    session = await client.open_session(MODEL, session_id=replicas.ids_of(0, 1)[0])
    np.testing.assert_array_equal(await session.step(x[:1]), x[:1])
    assert [model.name for model in await client.models()] == [MODEL]
    await until(lambda: up(client) == [False, True, True])
    replicas.start(0)
    await until(lambda: up(client) == [True] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["sync", "async"])
async def test_all_are_gone(shell: str, replicas: ScriptedReplicas) -> None:
    async with connect(shell, replicas.address, timeout_s=WAIT_S, connect_timeout_s=0.5) as client:
        session = await client.open_session(MODEL, session_id="one")
        group = await client.open_sessions(MODEL, 8, session_ids=replicas.spread(8))
        y = await group.step(np.ones((8, 2)))
        for at in range(3):
            replicas.stop(at)
        for call in (client.models, session.get_state, lambda **k: session.step(np.ones((1, 2)), **k)):
            told = await given_up(call, lambda error: all(f"{one}: " in error for one in bare(replicas)))
            assert f"the server at {client.address} cannot be reached: " in str(told)
        told = await given_up(
            lambda **k: group.step(np.ones((8, 2)), **k), lambda error: "cannot be" in error
        )
        assert sorted(told.failures) == list(range(8))
        waiting = asyncio.ensure_future(group.step(np.ones((8, 2))))
        for at in range(3):
            replicas.start(at)
        np.testing.assert_array_equal(await waiting, y + 1)
    async with connect(shell, "127.0.0.1:1,127.0.0.1:2", connect_timeout_s=0.2) as nobody:
        with pytest.raises(
            errors.UnavailableError, match=r"no server was reached at 127.0.0.1:1,127.0.0.1:2 within"
        ):
            await nobody.models()


@pytest.mark.parametrize("shell", ["sync", "async"])
async def test_hooks_are_called(shell: str, replicas: ScriptedReplicas) -> None:
    seen: list[Any] = []
    names = ("request", "response", "retry", "replica")
    hooks: Any = {name: [lambda event, name=name: seen.append((name, event))] for name in names}
    async with connect(shell, replicas.address, event_hooks=hooks, timeout_s=WAIT_S) as client:
        assert client.address == ",".join(one.rpartition("//")[2] for one in replicas.addresses)
        bare = client.address.split(",")
        group = await client.open_sessions(MODEL, 24, session_ids=replicas.spread(24))
        seen.clear()
        await group.step(np.ones((24, 2)))
        requests = [event for name, event in seen if name == "request"]
        assert sorted(event.address for event in requests) == sorted(bare)
        assert sum(event.sessions for event in requests) == 24
        responses = [event for name, event in seen if name == "response"]
        assert {id(event.request) for event in responses} == {id(event) for event in requests}
        session = await client.open_session(MODEL, session_id=replicas.ids_of(1, 1)[0])
        replicas.stop(1)
        seen.clear()
        await session.step(np.ones((1, 2)))
        assert next(event.address for name, event in seen if name == "request") == bare[1]
        assert [event.address for name, event in seen if name == "request"][-1] != bare[1]
        retries = [event for name, event in seen if name == "retry"]
        assert {(event.request.address, event.delay_s) for event in retries} == {(bare[1], 0.0)}
        await until(lambda: up(client) == [True, False, True])
        await client.models()
        gone = [event for name, event in seen if name == "replica"]
        assert [(event.address, event.is_up) for event in gone] == [(bare[1], False)]
        assert isinstance(gone[0].error, errors.UnavailableError)
        replicas.start(1)
        await until(lambda: up(client) == [True] * 3)
        seen.clear()
        await client.models()
        assert [event.is_up for name, event in seen if name == "replica"] == [True]


async def test_lists_and_closing(client: Any, replicas: ScriptedReplicas) -> None:
    ids = sorted(replicas.spread(12, "listed"))
    await client.open_sessions(MODEL, 12, session_ids=ids)
    listed = client.sessions(prefix="listed-")
    infos = list(await listed) if asyncio.isfuture(listed) or hasattr(listed, "__await__") else [*listed]
    assert [info.session_id for info in infos] == ids
    # one replica answers all pages
    assert sum(bool(replicas.requests(at, "ListSessions")) for at in range(3)) == 1
    closed = ids[:7]  # of two replicas
    assert {replicas.ranking(one)[0] for one in closed} == {0, 1}
    assert await client.close_sessions(closed) == 7
    asked = [r.session_ids for at in range(3) for r in replicas.requests(at, "CloseSessions")]
    assert sorted(one for own in asked for one in own) == closed
    assert len(asked) > 1


async def test_forks_and_predictions(client: Any, replicas: ScriptedReplicas) -> None:
    group = await client.open_sessions(MODEL, 10, session_ids=replicas.spread(10))
    x = random(10, 2)
    await group.step(x)
    twins = await group.fork()
    np.testing.assert_array_equal(await twins.step(x), x + x)
    np.testing.assert_array_equal(await group.step(x), x + x)
    y, _ = await client.predict(MODEL, x)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("shell", ["sync", "async"])
async def test_the_addresses_of_a_name(shell: str, replicas: ScriptedReplicas) -> None:
    """`localhost` may have an address where nobody listens, ::1, which is then a replica that is down."""
    scheme, _, address = replicas.addresses[0].rpartition("//")
    if scheme:
        pytest.skip("its certificate is for an address")
    port = address.rpartition(":")[2]
    async with connect(shell, f"dns:///localhost:{port}", timeout_s=WAIT_S) as client:
        assert client.replicas == ()
        group = await client.open_sessions(MODEL, 12, session_ids=replicas.spread(12))
        x = random(12, 2)
        np.testing.assert_array_equal(await group.step(x), x)
        assert f"127.0.0.1:{port}" in [replica.address for replica in client.replicas if replica.is_up]
    async with connect(shell, "dns:///no-such-host.invalid:1", timeout_s=WAIT_S) as nobody:
        for call in (nobody.models, lambda **k: nobody.open_session(MODEL, **k)):
            told = await given_up(call, lambda error: "its name cannot be resolved" in error)
            assert isinstance(told, errors.UnavailableError)
            assert "its name cannot be resolved" in str(told)


def test_a_client_that_nobody_closed_leaves_no_thread(replicas: ScriptedReplicas) -> None:
    import gc
    import threading

    before = set(threading.enumerate())  # other tests' clients may have theirs
    client = stepwell.connect(replicas.address, timeout_s=WAIT_S)
    replicas.stop(1)
    client.open_session(MODEL, session_id=replicas.ids_of(1, 1)[0]).step(np.ones((1, 2)))
    assert not client.replicas[1].is_up
    begun = set(threading.enumerate()) - before
    (thread,) = [one for one in begun if one.name == "stepwell-replicas"]
    del client
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()
