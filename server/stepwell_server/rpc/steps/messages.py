"""Between the messages of a stream and the engine's frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.api import Failure, Frame, Part, Single, Sink, StepReply
from stepwell_server.errors import InvalidInput, ServerError
from stepwell_server.rpc import convert
from stepwell_server.rpc.status import to_proto

Change = pb.StepFrame | pb.ResetFrame


def change_of(request: pb.StepStreamRequest) -> Change:
    """What the frame asks for.

    Raises:
        InvalidInput: nothing.
    """
    change = request.WhichOneof("change")
    if change is None:
        raise InvalidInput("change must be step or reset; got neither")
    return request.step if change == "step" else request.reset


def to_single(body: pb.StepFrame, settle: Callable[[StepReply | ServerError], None]) -> Single:
    """The engine's step of a frame of one session.

    Raises:
        InvalidInput: it is not a step.
    """
    single = Single(body.session_ids[0], convert.to_arrays(body.inputs, "inputs"), settle)
    single.expected = _only(body.expected_revisions, "expected_revisions")
    single.request_id = _only(body.request_ids, "request_ids") or 0
    single.batch_size = _only(body.batch_sizes, "batch_sizes")
    single.select = convert.to_select(body.outputs)
    return single


def to_frame(body: Change, sink: Sink) -> Frame:
    """The engine's frame of any change.

    Raises:
        InvalidInput: it is not a frame.
    """
    count = len(body.session_ids)
    frame = Frame(list(body.session_ids), sink)
    frame.expected = convert.to_numbers(body.expected_revisions, np.uint64, "expected_revisions", count)
    frame.request_ids = convert.to_numbers(body.request_ids, np.uint64, "request_ids", count)
    frame.batch_sizes = convert.to_numbers(body.batch_sizes, np.intp, "batch_sizes", count)
    if isinstance(body, pb.StepFrame):
        frame.select = convert.to_select(body.outputs)
        frame.inputs = convert.to_arrays(body.inputs, "inputs")
    else:
        frame.reset = True
        frame.state = convert.to_optional_arrays(body.state, "state")
    return frame


def _only(values: Sequence[int], argument: str) -> int | None:
    """The one number of a frame of one session; None if the field is empty."""
    if not values:
        return None
    if len(values) != 1:
        raise InvalidInput(f"{argument} must be empty or one per session (1); got {len(values)}")
    return values[0]


def from_answer(frame_id: int, answer: StepReply) -> bytes:
    """The reply to a frame of one session."""
    response = pb.StepStreamResponse(
        frame_id=frame_id,
        all_members=True,
        revisions=(answer.revision,),
        positions=(answer.position,),
        last=True,
    )
    convert.add_tensors(response.outputs, answer.outputs)
    if answer.replayed:
        response.replayed_members.append(0)
    return response.SerializeToString()


def from_part(frame_id: int, frame: Frame, part: Part) -> bytes:
    """A part of the reply to a frame."""
    response = pb.StepStreamResponse(frame_id=frame_id, last=part.last)
    if part.members is None:
        response.all_members = True
    else:
        response.members.extend(part.members.tolist())
    response.revisions.extend(part.revisions.tolist())
    response.positions.extend(part.positions.tolist())
    convert.add_tensors(response.outputs, part.outputs)
    if part.replayed:
        response.replayed_members.extend(response.members or range(len(frame.session_ids)))
    for failure in part.failures:
        _add_failure(response, failure)
    return response.SerializeToString()


def from_refusal(frame_id: int, error: ServerError) -> bytes:
    """The reply to a frame of which nothing was done."""
    errors = [pb.MemberError(error=to_proto(error))]
    return pb.StepStreamResponse(frame_id=frame_id, errors=errors, last=True).SerializeToString()


def _add_failure(response: pb.StepStreamResponse, failure: Failure) -> None:
    members = () if failure.members is None else failure.members.tolist()
    response.errors.add(members=members, error=to_proto(failure.error))
