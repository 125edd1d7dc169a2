"""Both fronts answer Triton's requests alike: the native one reads those of sequences that go on by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import pytest

from stepwell.v1 import sessions_pb2
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.sequences import session_id_of
from support import secured
from support.peers import wire
from support.peers.wire import Wire
from support.samples import one_in
from support.servers import both_fronts
from support.servers.both_fronts import FRONTS, Outcome, called, damaged, needs_native
from support.triton.triton_requests import request

pytestmark = needs_native
SERVICE = "inference.GRPCInferenceService"
X = np.random.default_rng(5).standard_normal((4, 6, 3)).astype(np.float32)
Request = pb.ModelInferRequest
_Both = Mapping[str, Wire]


@pytest.fixture(scope="module")
def both() -> Iterator[_Both]:
    with both_fronts.serve("seq", "multi") as wires:
        yield wires
        assert same(wires, asked(sequence_id="that never began"))[0] != "OK", "one at least has failed"
        statistics = [_statistics(one) for one in wires.values()]
        assert statistics[0] == statistics[1]
        # a caller who is known, and no admin, is told no numbers
        assert (statistics[0]["seq", "fail"] > 0) is not secured.is_on()


def _statistics(one: Wire) -> Mapping[tuple[str, str], int]:
    """What was counted, whoever did it."""
    raw = called(one, "ModelStatistics", b"", service=SERVICE)[1]
    found = Counter[tuple[str, str]]()
    for model in pb.ModelStatisticsResponse.FromString(raw).model_stats:
        stats = model.inference_stats
        found[model.name, "rows"] = model.inference_count
        found[model.name, "success"], found[model.name, "fail"] = stats.success.count, stats.fail.count
        assert stats.queue.count == stats.compute_infer.count == stats.success.count
    return found


def asked(*arrays: Any, sequence_id: int | str | None = 1, model: str = "seq", **fields: Any) -> Request:
    """A step of a sequence of `seq`, unless it says otherwise."""
    return request(*(arrays or (X[:1, 0],)), model=model, sequence_id=sequence_id, **fields)


def same(both: _Both, message: Request | bytes) -> Outcome:
    """How both fronts answer a call. In which order a map's entries stand is no promise."""
    raw = message if isinstance(message, bytes) else message.SerializeToString()
    outcomes = [called(both[front], "ModelInfer", raw, service=SERVICE) for front in FRONTS]
    native, python = (_parsed(pb.ModelInferResponse, *outcome) for outcome in outcomes)
    assert native == python, message
    return native


def _parsed(kind: Any, code: str, *rest: Any) -> Outcome:
    return (code, kind.FromString(rest[0])) if code == "OK" else (code, *rest)


def streamed(one: Wire, messages: list[bytes]) -> list[Any]:
    """What a stream of these messages is answered, in that order, and how it ends."""
    call: Any = one.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
    answers: list[Any] = []
    try:
        answers.extend(map(pb.ModelStreamInferResponse.FromString, call(iter(messages), timeout=100)))
    except grpc.RpcError as error:
        return [*answers, wire.of_call(error)]
    return [*answers, "OK"]


def changed(message: Request, change: Callable[[Request], object]) -> Request:
    """The message, after something was done to it."""
    change(message)
    return message


def with_parameter(name: str, kind: str, value: Any, **fields: Any) -> Request:
    return changed(asked(**fields), lambda message: setattr(message.parameters[name], kind, value))


def typed() -> Request:
    message = asked()
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend(X[0, 0].tolist())
    return message


NOT_A_NUMBER = np.array([[1, np.nan, 1]], np.float32)
#: Requests to a sequence of one row that has begun, one after the other; each is sent to both.
REQUESTS: Mapping[str, Callable[[], Request]] = {
    "a step": asked,
    "with an id": lambda: asked(request_id="an id \u00e9"),
    "with a long id": lambda: asked(request_id="i" * 1000),
    "a time axis": lambda: asked(X[:1]),
    "a time axis of one": lambda: asked(X[:1, :1]),
    "of its version": lambda: changed(asked(), lambda m: setattr(m, "model_version", "1")),
    "of another version": lambda: changed(asked(), lambda m: setattr(m, "model_version", "7")),
    "of no model": lambda: asked(model="nothing"),
    "the output by name": lambda: changed(asked(), lambda m: m.outputs.add(name="y")),
    "an output twice": lambda: changed(asked(), lambda m: [m.outputs.add(name="y") for _ in range(2)]),
    "an output that is not there": lambda: changed(asked(), lambda m: m.outputs.add(name="q")),
    "a classified output": lambda: changed(
        asked(), lambda m: setattr(m.outputs.add(name="y").parameters["classification"], "int64_param", 1)
    ),
    "elements": typed,
    "elements and raw": lambda: changed(asked(), lambda m: m.inputs[0].contents.fp32_contents.append(1)),
    "no contents": lambda: changed(asked(), lambda m: m.ClearField("raw_input_contents")),
    "contents too short": lambda: changed(asked(), lambda m: m.raw_input_contents.__setitem__(0, b"123")),
    "contents of no input": lambda: changed(asked(), lambda m: m.raw_input_contents.append(b"1234")),
    "doubles": lambda: asked(X[:1, 0].astype(np.float64)),
    "booleans": lambda: asked(np.ones((1, 3), np.bool_)),
    "a type that nobody knows": lambda: changed(asked(), lambda m: setattr(m.inputs[0], "datatype", "FP7")),
    "another input": lambda: asked(("q", X[:1, 0])),
    "an input twice": lambda: asked(X[:1, 0], X[:1, 0]),
    "an input too many": lambda: asked(X[:1, 0], ("q", X[:1, 0])),
    "not a number": lambda: asked(NOT_A_NUMBER),
    "rows too many": lambda: asked(X[:2, 0]),
    "very many rows": lambda: asked(np.zeros((1025, 3), np.float32)),
    "features too many": lambda: asked(np.ones((1, 4), np.float32)),
    "axes too many": lambda: asked(np.ones((1, 1, 1, 3), np.float32)),
    "no time step": lambda: asked(np.ones((1, 0, 3), np.float32)),
    "a negative axis": lambda: changed(asked(), lambda m: m.inputs[0].shape.__setitem__(0, -1)),
    "no sequence": lambda: asked(sequence_id=None),
    "the sequence 0": lambda: asked(sequence_id=0),
    "a priority": lambda: with_parameter("priority", "uint64_param", 3),
    "a negative priority": lambda: with_parameter("priority", "int64_param", -3),
    "a time limit": lambda: with_parameter("timeout", "int64_param", 99_000_000),
    "a negative time limit": lambda: with_parameter("timeout", "int64_param", -1),
    "the final flag": lambda: with_parameter("triton_enable_empty_final_response", "bool_param", True),
    "no final flag": lambda: with_parameter("triton_enable_empty_final_response", "bool_param", False),
    "a reserved parameter": lambda: with_parameter("triton_other", "bool_param", False),
    "a parameter for a model": lambda: with_parameter("temperature", "double_param", 0.5),
    "no state": lambda: with_parameter("stepwell_stateless", "bool_param", True),
    "a wrong revision": lambda: asked(stepwell_revision=900, stepwell_request_id=5),
    "the largest revision": lambda: with_parameter("stepwell_revision", "uint64_param", 2**64 - 1),
    "a request id without a revision": lambda: asked(stepwell_request_id=5),
    "END as a number": lambda: with_parameter("sequence_end", "int64_param", 0),
    "a field of a later version": lambda: Request.FromString(asked().SerializeToString() + b"\xf8\x06\x01"),
    "another sequence": lambda: asked(sequence_id=999_999),
    "a text": lambda: asked(sequence_id="1"),
    "a text of other letters": lambda: asked(sequence_id="\u00e9"),
    "a long text": lambda: asked(sequence_id="x" * 128),
    "a text that is too long": lambda: asked(sequence_id="x" * 129),
    "the largest number": lambda: asked(sequence_id=-1),
    "END": lambda: asked(end=True),
    "a step after END": asked,
    "START and END": lambda: asked(start=True, end=True),
}  # fmt: skip


@pytest.mark.parametrize("has_begun", [True, False])
def test_requests_are_answered_alike(both: _Both, has_begun: bool) -> None:
    """As calls, and as messages of one stream."""
    start = asked(start=True)
    outcomes: list[Outcome] = []
    if has_begun:
        outcomes.append(same(both, start))
    outcomes += [same(both, make()) for make in REQUESTS.values()]
    assert len({outcome[0] for outcome in outcomes}) > 3
    made = [make() for make in REQUESTS.values()]
    messages = [message.SerializeToString() for message in ([start, *made] if has_begun else made)]
    native, python = (streamed(both[front], messages) for front in FRONTS)
    for one, other in zip(native, python, strict=True):
        assert one == other
    assert len(native) == len(messages) + 1
    # a stream says what a call says, but for the flag that only streams have
    for unary, answer in zip(outcomes, native, strict=False):
        assert (unary[0] == "OK") == (not answer.error_message)


def test_a_retry_is_answered_alike(both: _Both) -> None:
    same(both, asked(sequence_id=20, start=True))
    once = asked(X[:1], sequence_id=20, stepwell_revision=1, stepwell_request_id=77)
    first = same(both, once)[1]
    again = same(both, once)[1]
    assert again.parameters.pop("stepwell_replayed").bool_param
    assert again == first
    assert (
        same(both, asked(X[:1], sequence_id=20, stepwell_revision=1, stepwell_request_id=78))[0] == "ABORTED"
    )
    for revision in (1, 2):
        other = asked(X[1:2], sequence_id=20, stepwell_revision=revision, stepwell_request_id=77)
        assert same(both, other)[0] == "INVALID_ARGUMENT"
    begun = asked(X[:1], sequence_id=20, start=True, stepwell_request_id=77)
    assert same(both, begun)[0] == "INVALID_ARGUMENT"
    last = asked(sequence_id=20, end=True, stepwell_revision=2, stepwell_request_id=79)
    assert same(both, last)[0] == "OK"
    same(both, asked(sequence_id=20, start=True))
    # the answer to the END of a sequence that is gone is remembered, and its id is not used for another step
    last.parameters["sequence_end"].bool_param = False
    assert same(both, last)[1].parameters["stepwell_replayed"].bool_param


def test_several_rows_inputs_and_outputs_are_answered_alike(both: _Both) -> None:
    raw = called(both["python"], "ModelMetadata", b"\x0a\x05multi", service=SERVICE)[1]
    described = pb.ModelMetadataResponse.FromString(raw)
    rng = np.random.default_rng(3)
    for rows in (3, 1):
        for start, steps in ((True, 0), (False, 0), (False, 4), (False, 1)):
            inputs = []
            for given in described.inputs:
                times = (steps,) if steps and given.name != "profile" else ()
                shape = (rows, *times, *given.shape[1:])
                drawn = rng.integers(0, 9, shape) if given.datatype == "INT32" else rng.standard_normal(shape)
                inputs.append(
                    (given.name, drawn.astype(np.int32 if given.datatype == "INT32" else np.float32))
                )
            message = asked(*inputs, model="multi", sequence_id="rows", start=start)
            assert same(both, message)[0] == "OK"
            if not start:
                for name in (described.outputs[-1].name, described.outputs[0].name):
                    message.outputs.add(name=name)
                    assert same(both, message)[0] == "OK"
                del message.inputs[0], message.raw_input_contents[0]
                same(both, message)


@pytest.mark.parametrize("seed", one_in(2, range(4)))
def test_damaged_requests_are_answered_alike(both: _Both, seed: int) -> None:
    """Bytes changed, left out and added."""
    rng = np.random.default_rng(seed)
    same(both, asked(sequence_id=100 + seed, start=True))
    good = asked(X[:1, :2], sequence_id=100 + seed, stepwell_revision=1).SerializeToString()
    messages = [damaged(good, rng) for _ in range(60)]
    for message in messages:
        same(both, message)
    native, python = (streamed(both[front], messages) for front in FRONTS)
    assert native == python


@pytest.mark.parametrize("seed", one_in(2, range(6)))
def test_a_stream_of_all_kinds_of_requests_is_answered_alike(both: _Both, seed: int) -> None:
    """Sent without waiting: each sequence has its order, and so has the stream, whoever reads which request."""
    rng = np.random.default_rng(200 + seed)
    ids = [f"{seed} {index}" if index % 2 else 1000 * seed + index + 1 for index in range(4)]
    messages = [_drawn(rng, number, ids).SerializeToString() for number in range(150)]
    native, python = (streamed(both[front], messages) for front in FRONTS)
    for number, (one, other) in enumerate(zip(native, python, strict=True)):
        assert one == other, Request.FromString(messages[number])
    assert [answer.infer_response.id for answer in native[:-1]] == [str(number) for number in range(150)]
    for sequence_id in ids:
        session_id = session_id_of("seq", sequence_id)
        asked_for = sessions_pb2.GetStateRequest(session_id=session_id).SerializeToString()
        outcomes = [
            _parsed(sessions_pb2.GetStateResponse, *called(one, "GetState", asked_for))
            for one in both.values()
        ]
        states = [wire.data(o[1].state) if o[0] == "OK" else o for o in outcomes]
        assert states[0] == states[1]


def _drawn(rng: np.random.Generator, number: int, ids: list[Any]) -> Request:
    sequence_id = ids[int(rng.integers(len(ids)))]
    kind = int(rng.integers(24)) if number >= len(ids) else 0
    x = rng.standard_normal((1, int(rng.integers(1, 4)), 3)).astype(np.float32)
    fields: dict[str, Any] = {"sequence_id": sequence_id, "request_id": str(number)}
    if number < len(ids):
        fields["sequence_id"] = ids[number]
    if kind == 0:
        return asked(x, start=True, **fields)
    if kind == 1:
        return asked(x, end=True, **fields)
    if kind == 2:
        return asked(np.concatenate([x, x]), start=True, **fields)  # another batch size
    if kind == 3:
        x[0, 0, 0] = np.nan
    if kind == 4:
        return asked(x, stepwell_revision=int(rng.integers(0, 6)), stepwell_request_id=7, **fields)
    if kind == 5:
        return with_parameter("temperature", "double_param", 1.0, **fields)
    if kind == 6:
        return with_parameter("triton_enable_empty_final_response", "bool_param", True, **fields)
    if kind == 7:
        return asked(x[:, :, :2], **fields)
    if kind == 8:
        return asked(x, sequence_id=5_000_000, request_id=str(number))
    return asked(x if kind < 16 else x[:, 0], **fields)


@pytest.mark.slow
def test_a_life_that_is_sent_at_once_keeps_its_order(both: _Both) -> None:
    """START and END are not plain, and what is between them is: on very many streams that have just begun."""
    for front in FRONTS:
        call: Any = both[front].channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        lives = []
        for sequence_id in range(2001, 2101):
            life = [
                asked(X[:1, step % 6], sequence_id=sequence_id, start=step in (0, 6), end=step in (5, 11))
                for step in range(12)
            ]
            lives.append(call(iter([message.SerializeToString() for message in life]), timeout=100))
        for life in lives:
            answers = [pb.ModelStreamInferResponse.FromString(raw) for raw in life]
            assert not any(answer.error_message for answer in answers), answers
            positions = [
                answer.infer_response.parameters["stepwell_position"].int64_param for answer in answers
            ]
            assert positions == [1, 2, 3, 4, 5, 6] * 2


def test_a_message_over_the_limit_ends_a_stream_alike(both: _Both) -> None:
    same(both, asked(sequence_id=4000, start=True))
    large = asked(np.zeros((1, (64 << 20) // 12, 3), np.float32), sequence_id=4000).SerializeToString()
    small = asked(sequence_id=4000).SerializeToString()
    for front in FRONTS:
        end = streamed(both[front], [small, large])[-1]
        assert isinstance(end, wire.Refusal)
        assert end.code == "RESOURCE_EXHAUSTED"
