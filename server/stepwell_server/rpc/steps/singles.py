"""Between the messages of a unary Step and the engine's single steps."""

from __future__ import annotations

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.api import Single, StepReply
from stepwell_server.rpc import convert


def to_single(request: pb.StepRequest) -> Single:
    """The engine's step of a request.

    Raises:
        InvalidInput: it is none.
    """
    single = Single(request.session_id, convert.to_arrays(request.inputs, "inputs"), _no_one)
    single.select = convert.to_select(request.outputs)
    single.expected = request.expected_revision if request.HasField("expected_revision") else None
    single.request_id = request.request_id
    return single


def from_answer(answer: StepReply) -> pb.StepResponse:
    """The reply to a unary Step."""
    response = pb.StepResponse(revision=answer.revision, position=answer.position, replayed=answer.replayed)
    convert.add_tensors(response.outputs, answer.outputs)
    return response


def _no_one(_answer: object) -> None:
    raise AssertionError("Engine.step sets who is told")
