"""Between the messages of a unary Step and the engine's single steps."""

from __future__ import annotations

from collections.abc import Callable

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.calls import Single, StepReply
from stepwell_server.errors import ServerError
from stepwell_server.rpc import convert


def to_single(request: pb.StepRequest, settle: Callable[[StepReply | ServerError], None]) -> Single:
    """The engine's step of a request.

    Raises:
        InvalidInput: it is none.
    """
    single = Single(request.session_id, convert.to_arrays(request.inputs, "inputs"), settle)
    single.select = convert.to_select(request.outputs)
    single.expected = request.expected_revision if request.HasField("expected_revision") else None
    single.request_id = request.request_id
    return single


def from_answer(answer: StepReply) -> bytes:
    """The reply to a unary Step."""
    response = pb.StepResponse(revision=answer.revision, position=answer.position, replayed=answer.replayed)
    convert.add_tensors(response.outputs, answer.outputs)
    return response.SerializeToString()
