"""Sequences of Triton's protocol on a real engine with a fake executor."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import ChangeResult
from stepwell_server.errors import (
    InvalidInput,
    Overloaded,
    RevisionConflict,
    ServerError,
    Unavailable,
    Unsupported,
)
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.request import read_parameters
from stepwell_server.rpc.triton.sequences import EndedReplies, session_id_of
from support.engine.fake_executor import BAD, PLAIN
from support.triton.triton_requests import Array, Client, inference, request

INITIAL = PLAIN.initial[0]


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def replay(*xs: Array) -> list[Array]:
    """Outputs of steps from the initial state, as `fake_executor.advance` says."""
    before = np.broadcast_to(INITIAL, xs[0].shape).astype(np.float32)
    outputs = []
    for x in xs:
        after = before * np.float32(0.5) + x
        outputs.append(after * np.float32(2) - before)
        before = after
    return outputs


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with inference() as found:
        yield found


async def refused(kind: type[ServerError], call: Any) -> str:
    with pytest.raises(kind) as caught:
        await call
    return caught.value.message


def must_start(sequence_id: object, model: str = "plain") -> str:
    return (
        f"inference request for sequence {sequence_id} to model '{model}' must specify the START flag on the"
        " first request of the sequence"
    )


def test_ids_of_sessions() -> None:
    assert session_id_of("m", 5) == "triton/m/5"
    assert session_id_of("m", "5") == 'triton/m/"5"'
    assert session_id_of("m", " a/b ") == 'triton/m/" a/b "'
    odd = [session_id_of("m", text) for text in ("\n", "\0", "x" * 240, "x" * 250)]
    assert all(one.startswith("triton/m/sha256:") and one.isprintable() for one in (odd[0], odd[1], odd[3]))
    assert len({session_id_of("m", one) for one in (5, "5", '"5"', "\n", "\0", "x" * 240, "x" * 250)}) == 7
    longest = [session_id_of("m" * 128, one) for one in (2**64 - 1, "x" * 128, "\n" * 128)]
    assert all(len(one) <= 256 for one in longest)


async def test_start_steps_end(client: Client) -> None:
    xs = [draw(i, 1, 2) for i in range(3)]
    for i, (x, right) in enumerate(zip(xs, replay(*xs), strict=True)):
        response = await client.infer(x, sequence_id=5, start=i == 0, end=i == 2, request_id=f"r{i}")
        assert (response.id, response.model_name, response.model_version) == (f"r{i}", "plain", "1")
        assert response.parameters["stepwell_position"].int64_param == i + 1
        assert response.raw_output_contents[0] == right.tobytes()
        assert client.sessions() == ([] if i == 2 else ["triton/plain/5"])
    assert await refused(InvalidInput, client.infer(xs[0], sequence_id=5)) == must_start(5)
    assert client.sessions() == []


async def test_start_on_a_live_sequence_restarts_it(client: Client) -> None:
    xs = [draw(i, 1, 2) for i in range(3)]
    await client.infer(xs[0], sequence_id="a", start=True)
    np.testing.assert_array_equal(await client.y(xs[1], sequence_id="a", start=True), replay(xs[1])[0])
    np.testing.assert_array_equal(await client.y(xs[2], sequence_id="a"), replay(*xs[1:])[1])
    wide = draw(9, 3, 2)  # the new sequence may have another batch size
    np.testing.assert_array_equal(await client.y(wide, sequence_id="a", start=True), replay(wide)[0])
    message = await refused(InvalidInput, client.infer(xs[0], sequence_id="a"))
    assert "must specify batch-size 3 as its first request did; got 1" in message


async def test_integers_and_texts_are_different_sequences(client: Client) -> None:
    x, z = draw(1, 1, 2), draw(2, 1, 2)
    await client.infer(x, sequence_id=5, start=True)
    assert await refused(InvalidInput, client.infer(x, sequence_id="5")) == must_start(5)
    await client.infer(z, sequence_id="5", start=True)
    np.testing.assert_array_equal(await client.y(x, sequence_id=5), replay(x, x)[1])
    await client.infer(x, sequence_id=-1, start=True)
    assert f"triton/plain/{2**64 - 1}" in client.sessions()


async def test_a_start_whose_step_fails_leaves_nothing(client: Client) -> None:
    bad = np.array([[BAD, 0]], np.float32)
    x = draw(1, 1, 2)
    await refused(InvalidInput, client.infer(bad, sequence_id=1, start=True))
    assert client.sessions() == []
    await client.infer(x, sequence_id=1, start=True)
    await refused(InvalidInput, client.infer(np.full((1, 2), np.nan, np.float32), sequence_id=1, start=True))
    np.testing.assert_array_equal(await client.y(x, sequence_id=1), replay(x, x)[1])
    # so does what only the model finds out: reset and step are one change
    await refused(InvalidInput, client.infer(bad, sequence_id=1, start=True))
    np.testing.assert_array_equal(await client.y(x, sequence_id=1), replay(x, x, x)[2])
    np.testing.assert_array_equal(await client.y(x, sequence_id=1, start=True), replay(x)[0])


async def test_a_failed_start_returns_the_error_of_its_step_even_if_closing_fails(
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, x = np.array([[BAD, 0]], np.float32), draw(1, 1, 2)

    async def close_session(*_: Any, **__: Any) -> bool:
        raise Overloaded("no more may wait", retry_after_s=1.0)

    with monkeypatch.context() as patch:
        patch.setattr(client.harness.engine, "close_session", close_session)
        await refused(InvalidInput, client.infer(bad, sequence_id=1, start=True))
    assert await refused(InvalidInput, client.infer(x, sequence_id=1)) == must_start(1)
    np.testing.assert_array_equal(await client.y(x, sequence_id=1, start=True), replay(x)[0])


async def test_a_cancelled_start_leaves_nothing() -> None:
    x = draw(1, 1, 2)
    async with inference(threads=True) as client:
        client.harness.hooks.close_gate()
        task = asyncio.create_task(client.infer(x, sequence_id=1, start=True))
        await client.harness.in_flight()
        task.cancel()
        client.harness.hooks.open_gate()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.sessions() == []
        np.testing.assert_array_equal(await client.y(x, sequence_id=1, start=True), replay(x)[0])


@pytest.mark.parametrize("seed", range(3))
async def test_concurrent_requests_are_served_in_order(client: Client, seed: int) -> None:
    """Several lives of several sequences, all sent at once in a random order that keeps each one's own."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    plans: dict[Any, list[tuple[Any, Array]]] = {}
    for one in (1, "1", 2, "two"):
        plan = plans[one] = []
        for _ in range(3):
            xs = [rng.standard_normal((1, 2)).astype(np.float32) for _ in range(chance.randint(1, 5))]
            last = len(xs) - 1
            for i, (x, right) in enumerate(zip(xs, replay(*xs), strict=True)):
                end = i == last and chance.random() < 0.5
                plan.append((request(x, sequence_id=one, start=i == 0, end=end), right))
    order = [one for one, plan in plans.items() for _ in plan]
    chance.shuffle(order)
    sent = [plans[one].pop(0) for one in order]
    responses = await asyncio.gather(*(client.send(message) for message, _ in sent))
    for response, (_, right) in zip(responses, sent, strict=True):
        assert response.raw_output_contents[0] == right.tobytes()


async def test_each_request_counts_once(client: Client) -> None:
    x = draw(1, 1, 2)
    rights = replay(x, x, x)
    for i, right in enumerate(rights):
        known: dict[str, Any] = {"stepwell_revision": i} if i else {}
        said = request(x, sequence_id=3, start=i == 0, end=i == 2, stepwell_request_id=100 + i, **known)
        for attempt in range(3):
            response = await client.send(said)
            assert response.raw_output_contents[0] == right.tobytes()
            assert response.parameters["stepwell_revision"].int64_param == i + 1
            assert ("stepwell_replayed" in response.parameters) is (attempt > 0)
    assert client.sessions() == []
    # another START is another sequence
    again = request(x, sequence_id=3, start=True, stepwell_request_id=7)
    assert (await client.send(again)).raw_output_contents[0] == rights[0].tobytes()
    other = request(x, sequence_id=3, start=True, stepwell_request_id=8)
    response = await client.send(other)
    assert response.raw_output_contents[0] == rights[0].tobytes()
    assert "stepwell_replayed" not in response.parameters
    late = client.infer(x, sequence_id=3, stepwell_revision=0, stepwell_request_id=9)
    await refused(RevisionConflict, late)


async def test_a_repeated_end_without_a_stored_answer_is_refused_with_the_reason(client: Client) -> None:
    x = draw(1, 1, 2)
    await client.infer(x, sequence_id=3, start=True)
    last = request(x, sequence_id=3, end=True, stepwell_revision=1, stepwell_request_id=5)
    await client.send(last)
    # as after a restart, which would end the engine too
    client.inference.sequences._ended = EndedReplies()
    message = await refused(InvalidInput, client.send(last))
    assert message.startswith(must_start(3))
    assert "ended with this very request, and its answer was in the memory of the server process" in message


async def test_a_request_id_with_another_request_is_refused(client: Client) -> None:
    """In the middle of a sequence, with START on it, and after its END. Nothing changes."""
    x = draw(1, 1, 2)
    begun = request(x, sequence_id=3, start=True, stepwell_request_id=5)
    first = await client.send(begun)
    others = [
        request(x, sequence_id=3, stepwell_revision=1, stepwell_request_id=5),
        request(x, sequence_id=3, stepwell_revision=0, stepwell_request_id=5),
        request(2 * x, sequence_id=3, start=True, stepwell_request_id=5),
        request(draw(1, 2, 2), sequence_id=3, start=True, stepwell_request_id=5),
    ]
    for other in others:
        message = await refused(InvalidInput, client.send(other))
        assert "it belongs to a step with other content" in message
    again = await client.send(begun)
    assert again.parameters["stepwell_replayed"].bool_param
    assert again.raw_output_contents == first.raw_output_contents
    last = request(x, sequence_id=3, end=True, stepwell_revision=1, stepwell_request_id=6)
    ended = await client.send(last)
    for other in (
        request(2 * x, sequence_id=3, end=True, stepwell_revision=1, stepwell_request_id=6),
        request(x[:, None], sequence_id=3, end=True, stepwell_revision=1, stepwell_request_id=6),
        request(x, sequence_id=3, start=True, stepwell_request_id=6),
        request(x, sequence_id=3, start=True, end=True, stepwell_request_id=6),
    ):
        message = await refused(InvalidInput, client.send(other))
        assert "it belongs to a step with other content" in message
    again = await client.send(last)
    assert again.parameters["stepwell_replayed"].bool_param
    assert again.raw_output_contents == ended.raw_output_contents


@pytest.mark.parametrize("start", [False, True])
async def test_a_repeated_end_does_not_end_a_later_sequence(client: Client, start: bool) -> None:
    x = draw(1, 1, 2)
    if not start:
        await client.infer(x, sequence_id=3, start=True)
    said: dict[str, Any] = {} if start else {"stepwell_revision": 1}
    last = request(x, sequence_id=3, start=start, end=True, stepwell_request_id=5, **said)
    await client.send(last)
    client.inference.sequences._ended = EndedReplies()  # as after a restart, or on another replica
    begun = await client.infer(x, sequence_id=3, start=True)
    message = await refused(InvalidInput, client.send(last))
    assert "ended with this very request" in message
    following = await client.infer(x, sequence_id=3)
    revisions = [each.parameters["stepwell_revision"].int64_param for each in (begun, following)]
    assert revisions[1] == revisions[0] + 1


async def test_an_expired_sequence_must_start_again() -> None:
    x = draw(1, 1, 2)
    async with inference(max_session_idle_s=10) as client:
        await client.infer(x, sequence_id=3, start=True)
        client.harness.clock.advance(11)
        with pytest.raises(InvalidInput) as caught:
            await client.infer(x, sequence_id=3)
        assert caught.value.message == must_start(3)
        assert caught.value.metadata["cause"] == "SESSION_EXPIRED"


async def test_a_timeout_that_passes_while_waiting_changes_nothing() -> None:
    x = draw(1, 1, 2)
    async with inference(threads=True) as client:
        await client.infer(x, sequence_id=3, start=True)
        client.harness.hooks.close_gate()
        running = asyncio.create_task(client.infer(x, sequence_id=3))
        await client.harness.in_flight()
        late = asyncio.create_task(client.infer(x, sequence_id=3, timeout=1_000_000))
        await asyncio.sleep(0)
        client.harness.clock.advance(2)
        client.harness.hooks.open_gate()
        await running
        assert (await refused(Unavailable, late)).startswith("Request timeout expired")
        np.testing.assert_array_equal(await client.y(x, sequence_id=3), replay(x, x, x)[2])


async def test_a_session_of_another_model_is_no_sequence() -> None:
    x = draw(1, 1, 2)
    async with inference({"plain": PLAIN, "other": PLAIN}) as client:
        await client.harness.engine.open_session("other", session_id="triton/plain/4")
        message = await refused(InvalidInput, client.infer(x, sequence_id=4, start=True))
        assert "must be of model 'plain'" in message


def test_answers_to_ends_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.rpc.triton.sequences._MAX_BYTES", 100)
    ended = EndedReplies()
    for i in range(5):
        ended.put("s", i + 1, ChangeResult(i, i, {"y": np.zeros(10, np.float32)}, replayed=False), 7)
    kept = [i for i in range(6) if ended.get("s", i) is not None]
    assert kept == [4, 5]
    ended.put("s", 5, ChangeResult(0, 0, {"y": np.zeros(1, np.float32)}, replayed=False), 7)
    assert [i for i in range(6) if ended.get("s", i) is not None] == [4, 5]
    reply = ended.get("s", 5)
    assert reply is not None
    assert reply.reply.replayed
    assert reply.content == 7


@pytest.mark.parametrize(
    ("field", "kind", "value", "message"),
    [
        ("sequence_id", "bool_param", True, "invalid value type for 'sequence_id' parameter, expected int64_param or string_param."),
        ("sequence_start", "int64_param", 1, "invalid value type for 'sequence_start' parameter, expected bool_param."),
        ("sequence_end", "string_param", "x", "invalid value type for 'sequence_end' parameter, expected bool_param."),
        ("priority", "int64_param", -1, "invalid value for 'priority', expected value >= 0."),
        ("timeout", "uint64_param", 1, "invalid value type for 'timeout' parameter, expected int64_param."),
        ("triton_x", "bool_param", True, "parameter keys starting with 'triton_' are reserved"),
        ("stepwell_revison", "int64_param", 1, "parameter keys starting with 'stepwell_' must be of"),
        ("stepwell_request_id", "int64_param", 0, "must be a random number from 1 on"),
        ("stepwell_revision", "string_param", "1", "invalid value type for 'stepwell_revision'"),
    ],
)  # fmt: skip
async def test_bad_parameters(client: Client, field: str, kind: str, value: Any, message: str) -> None:
    x = draw(1, 1, 2)
    await client.infer(x, sequence_id=3, start=True)
    bad = request(x, sequence_id=3)
    setattr(bad.parameters[field], kind, value)
    assert message in await refused(InvalidInput, client.send(bad))
    np.testing.assert_array_equal(await client.y(x, sequence_id=3), replay(x, x)[1])


async def test_parameters_that_exclude_each_other(client: Client) -> None:
    x = draw(1, 1, 2)
    for fields, message in (
        ({"stepwell_revision": 1}, "need a 'sequence_id'"),
        (
            {"sequence_id": 1, "start": True, "stepwell_revision": 1},
            "must not come with 'sequence_start'",
        ),
        ({"sequence_id": 1, "stepwell_request_id": 1}, "needs a 'stepwell_revision'"),
    ):
        assert message in await refused(InvalidInput, client.infer(x, **fields))
    too_long = client.infer(x, sequence_id="x" * 129, start=True)
    assert "cannot be longer than 128 characters" in await refused(Unsupported, too_long)
    own = request(x)
    own.parameters["temperature"].double_param = 0.5
    await client.send(own)


async def test_too_many_waiting_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell_server.rpc.triton.sequences.MAX_WAITING", 2)
    x = draw(1, 1, 2)
    async with inference(threads=True) as client:
        client.harness.hooks.close_gate()
        tasks = [asyncio.create_task(client.infer(x, sequence_id=1, start=i == 0)) for i in range(4)]
        await client.harness.in_flight()
        message = await refused(Unavailable, tasks.pop())
        assert message.startswith("Exceeds maximum queue size")
        tasks[1].cancel()
        client.harness.hooks.open_gate()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[1], asyncio.CancelledError)
        assert not isinstance(done[0], BaseException)
        assert not isinstance(done[2], BaseException)
        assert done[2].raw_output_contents[0] == replay(x, x)[1].tobytes()


@pytest.mark.parametrize("sequence_id", [None, 0, ""])
@pytest.mark.parametrize("start", [True, False])
async def test_a_model_with_state_needs_a_sequence(
    client: Client, sequence_id: int | str | None, start: bool
) -> None:
    """A client that forgets the id must not get numbers of a state that nobody keeps."""
    bad = client.infer(draw(1, 1, 2), sequence_id=sequence_id, start=start, stateless=False)
    message = await refused(InvalidInput, bad)
    assert message.startswith(
        "inference request to model 'plain' must specify a non-zero or non-empty correlation ID: "
        "the model keeps state, and sequence_id is missing, 0 or empty."
    )
    for said in ("sequence_id", "sequence_start", "stepwell_stateless"):
        assert said in message
    assert client.sessions() == []


def test_a_model_without_state_needs_no_sequence() -> None:
    assert read_parameters("plain", {}, keeps_state=False).sequence_id == 0


def test_the_same_one_of_two_errors_is_reported_in_any_order() -> None:
    """A map of a message has another order in each process."""
    faults = {
        "timeout": pb.InferParameter(string_param="soon"),
        "sequence_id": pb.InferParameter(string_param="s" * 129),
    }
    for names in (("timeout", "sequence_id"), ("sequence_id", "timeout")):
        with pytest.raises(Unsupported, match="correlation ID cannot be longer"):
            read_parameters("plain", {name: faults[name] for name in names}, keeps_state=True)


async def test_a_stateless_prediction_must_be_requested(client: Client) -> None:
    for rows in (1, 3):
        x = draw(rows, rows, 4, 2)
        right = np.stack(replay(*x.swapaxes(0, 1)), 1)
        for given in (x, x[:, 0]):
            response = await client.infer(given, stateless=True)
            assert response.raw_output_contents[0] == (right if given is x else right[:, 0]).tobytes()
            assert not response.parameters
    assert client.sessions() == []
    x = draw(1, 1, 2)
    for value in (True, False):
        both = request(x, sequence_id=1, start=True)
        both.parameters["stepwell_stateless"].bool_param = value
        if value:
            message = await refused(InvalidInput, client.send(both))
            assert "'stepwell_stateless' must not come with a 'sequence_id'" in message
        else:
            await client.send(both)
    number = request(x)
    number.parameters["stepwell_stateless"].int64_param = 1
    assert "expected bool_param" in await refused(InvalidInput, client.send(number))


async def test_sequences_wait_for_rows_as_sessions_do() -> None:
    """More of them at the same moment than rows: each waits, and none is refused."""
    x = draw(1, 1, 2)
    async with inference(threads=True, resident_rows=2) as client:
        client.harness.hooks.close_gate()
        busy = [asyncio.create_task(client.y(x, sequence_id=i, start=True)) for i in (1, 2)]
        await client.harness.in_flight()
        waiting = [asyncio.create_task(client.y(x, sequence_id=i, start=True)) for i in range(3, 9)]
        await asyncio.sleep(0)
        client.harness.hooks.open_gate()
        for answer in await asyncio.gather(*busy, *waiting):
            np.testing.assert_array_equal(answer, replay(x)[0])
        again = [client.y(x, sequence_id=i, end=True) for i in range(1, 9)]
        for answer in await asyncio.gather(*again):
            np.testing.assert_array_equal(answer, replay(x, x)[1])
        assert client.sessions() == []


async def test_a_sequence_that_times_out_waiting_for_rows_leaves_nothing() -> None:
    x = draw(1, 1, 2)
    async with inference(threads=True, resident_rows=1) as client:
        client.harness.hooks.close_gate()
        busy = asyncio.create_task(client.y(x, sequence_id=1, start=True))
        await client.harness.in_flight()
        late = asyncio.create_task(
            client.send(request(x, sequence_id=2, start=True), client.harness.clock.monotonic() + 1)
        )
        await asyncio.sleep(0)
        client.harness.clock.advance(2)
        client.harness.hooks.open_gate()
        await busy
        assert "Request timeout expired" in await refused(Unavailable, late)
        assert client.sessions() == ["triton/plain/1"]
