"""Converts steps and resets between messages and the engine's changes: unary calls, and frames of streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.core.callers import Caller
from stepwell_server.core.sessions import MAX_RESET_POSITION
from stepwell_server.engine.api import ChangeResult, Select
from stepwell_server.engine.change import Awaited, Change, Replies, Reply
from stepwell_server.engine.types import U64, Members
from stepwell_server.errors import InvalidInput, ServerError
from stepwell_server.rpc import convert, tenancy, tensors
from stepwell_server.rpc.status import to_proto
from stepwell_server.rpc.tracing import TRACES

if TYPE_CHECKING:
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.fronts.base import Call

FrameBody = pb.StepFrame | pb.ResetFrame
#: Bytes of a member in a reply without its outputs: index, revision, position, replayed index.
MEMBER_BYTES = 32
#: Bytes of a reply without members and elements: names and shapes of a typical model.
REPLY_BYTES = 512

_SELECTS: dict[int, Select] = {
    pb.OUTPUT_SELECTION_UNSPECIFIED: Select.ALL,
    pb.OUTPUT_SELECTION_ALL: Select.ALL,
    pb.OUTPUT_SELECTION_LAST: Select.LAST,
    pb.OUTPUT_SELECTION_NONE: Select.NONE,
}
_STATES: dict[int, Select] = {
    pb.STATE_SELECTION_UNSPECIFIED: Select.NONE,
    pb.STATE_SELECTION_NONE: Select.NONE,
    pb.STATE_SELECTION_LAST: Select.LAST,
    pb.STATE_SELECTION_ALL: Select.ALL,
}


class UnaryChanges:
    """Step and ResetStates. The servicer has the attributes below. Lives on the event loop."""

    _engine: Engine
    _max_reply_bytes: int

    async def step(self, request: pb.StepRequest, call: Call) -> pb.StepResponse:
        """Advance a session."""
        answer = Awaited()
        change = of_step(request, answer, call.who)
        as_values = tensors.wants_values(request.tensor_format, request.inputs)
        limit_reply(change, tensors.reply_limit(self._max_reply_bytes, as_values=as_values))
        return step_reply(await self._apply(change, answer, call), as_values=as_values)

    async def reset_states(self, request: pb.ResetStatesRequest, call: Call) -> pb.ResetStatesResponse:
        """Set the state of a session, or of some of its rows."""
        answer = Awaited()
        change = of_reset(request, answer, call.who)
        return reset_reply(await self._apply(change, answer, call))

    async def _apply(self, change: Change, answer: Awaited, call: Call) -> ChangeResult:
        change.deadline, change.connection = call.deadline, call.caller
        change.traces = TRACES.get()
        self._engine.submit(change)
        return await answer.get()


def of_step(request: pb.StepRequest, replies: Replies, who: Caller) -> Change:
    """Return the change of a unary Step.

    Raises:
        InvalidInput: the request is invalid.
    """
    change = Change((tenancy.internal_id(who, request.session_id),), replies, caller=who)
    change.inputs = tensors.to_arrays(request.inputs, "inputs")
    _set_step(change, request)
    change.rows = list(request.rows) or None
    change.state_rows = _some_states(change, "state_rows", request.state_rows)
    _set_request_id(change, request)
    return change


def of_reset(request: pb.ResetStatesRequest, replies: Replies, who: Caller) -> Change:
    """Return the change of a unary ResetStates.

    Raises:
        InvalidInput: the request is invalid.
    """
    change = Change((tenancy.internal_id(who, request.session_id),), replies, caller=who)
    change.reset = True
    change.state = tensors.to_optional_arrays(request.state, "state")
    change.rows = list(request.rows) or None
    if request.position and (change.rows or not request.state):
        raise InvalidInput(
            f"position must be 0 without a state or with rows, because it belongs to a whole state; got {request.position}"
        )
    if request.position > MAX_RESET_POSITION:
        raise InvalidInput(f"position must be at most 2**61, {MAX_RESET_POSITION}; got {request.position}")
    change.position = request.position
    _set_request_id(change, request)
    return change


def limit_reply(change: Change, limit: int) -> None:
    """Set the limit of the reply's bytes, and its bytes without outputs."""
    change.reply_limit = limit
    change.reply_bytes = limit - room_for_outputs(len(change.session_ids), limit)


def room_for_outputs(sessions: int, limit: int) -> int:
    """Return the bytes that are left for outputs in a reply of at most `limit` bytes to so many sessions."""
    return limit - sessions * MEMBER_BYTES - REPLY_BYTES


def _set_step(change: Change, message: pb.StepRequest | pb.StepFrame) -> None:
    change.select = to_select(message.outputs)
    change.output_names = tuple(message.output_names)
    change.states = to_states(message.states)
    change.reset_rows = tensors.to_mask(message.reset_mask)


def to_select(value: int) -> Select:
    """Return the selection of outputs.

    Raises:
        InvalidInput: the value is unknown.
    """
    select = _SELECTS.get(value)
    if select is None:
        raise InvalidInput(f"outputs must be one of stepwell.v1.OutputSelection; got {value}")
    return select


def to_states(value: int) -> Select:
    """Return the selection of states.

    Raises:
        InvalidInput: the value is unknown.
    """
    select = _STATES.get(value)
    if select is None:
        raise InvalidInput(f"states must be one of stepwell.v1.StateSelection; got {value}")
    return select


def _some_states(change: Change, name: str, some: Sequence[int]) -> Sequence[int] | None:
    """Return the rows or members whose states to return; None: all."""
    if some and change.states is Select.NONE:
        raise InvalidInput(f"{name} must be empty with states = STATE_SELECTION_NONE; got {len(some)}")
    return list(some) or None


def _set_request_id(change: Change, request: pb.StepRequest | pb.ResetStatesRequest) -> None:
    if request.HasField("expected_revision"):
        change.expected = np.array([request.expected_revision], np.uint64)
    if request.request_id:
        change.request_ids = np.array([request.request_id], np.uint64)


def body_of(request: pb.StepStreamRequest) -> FrameBody:
    """Return the change in a frame.

    Raises:
        InvalidInput: the frame has none.
    """
    kind = request.WhichOneof("change")
    if kind is None:
        raise InvalidInput("change must be step or reset; got neither")
    return request.step if kind == "step" else request.reset


def of_frame(body: FrameBody, replies: Replies, who: Caller) -> Change:
    """Return the change of a frame.

    Raises:
        InvalidInput: the frame is invalid.
    """
    change = Change(tenancy.internal_ids(who, body.session_ids), replies, caller=who)
    if body.batch_size:
        _require_left_out("batch_size", body, "batch_sizes")
        change.batch_sizes = np.full(change.size, body.batch_size, np.intp)
    else:
        change.batch_sizes = convert.to_numbers(body.batch_sizes, np.intp, "batch_sizes", change.size)
    _set_request_ids(change, body)
    if isinstance(body, pb.StepFrame):
        change.inputs = tensors.to_arrays(body.inputs, "inputs")
        _set_step(change, body)
        change.state_members = _some_states(change, "state_members", body.state_members)
    else:
        change.reset = True
        change.state = tensors.to_optional_arrays(body.state, "state")
    return change


def _set_request_ids(change: Change, body: FrameBody) -> None:
    count = change.size
    if body.HasField("expected_revision"):
        _require_left_out("expected_revision", body, "expected_revisions")
        change.expected = np.full(count, body.expected_revision, np.uint64)
    else:
        change.expected = convert.to_numbers(body.expected_revisions, np.uint64, "expected_revisions", count)
    if body.request_id_base:
        _require_left_out("request_id_base", body, "request_ids")
        change.request_ids = _request_ids_from(body.request_id_base, count)
    else:
        change.request_ids = convert.to_numbers(body.request_ids, np.uint64, "request_ids", count)


def _require_left_out(given: str, body: FrameBody, other: str) -> None:
    if count := len(getattr(body, other)):
        raise InvalidInput(f"{other} must be left out with {given}; got {count} of them")


def _request_ids_from(base: int, count: int) -> U64:
    if base + count - 1 >= 1 << 64:
        raise InvalidInput(
            f"request_id_base must be at most 2**64 - {count}, to give {count} sessions an id each; got {base}"
        )
    return np.arange(count, dtype=np.uint64) + np.uint64(base)


def has_short_reply(body: FrameBody) -> bool:
    """Whether its sender accepts a single number for all sessions."""
    return body.HasField("expected_revision") or bool(body.request_id_base)


def same_frame_id(frame_id: int) -> InvalidInput:
    """Return the error of a frame whose id is in use."""
    return InvalidInput(f"frame_id must differ from those of unanswered frames; got {frame_id}")


def step_reply(answer: ChangeResult, *, as_values: bool = False) -> pb.StepResponse:
    """Return the reply to a unary Step, with its tensors as data or as values."""
    response = pb.StepResponse(
        revision=answer.revision,
        position=answer.position,
        replayed=answer.replayed,
        model_version=answer.version,
    )
    tensors.add_tensors(response.outputs, answer.outputs, as_values=as_values)
    tensors.add_tensors(response.states, answer.states, as_values=as_values)
    return response


def reset_reply(answer: ChangeResult) -> pb.ResetStatesResponse:
    """Return the reply to a unary ResetStates."""
    return pb.ResetStatesResponse(
        revision=answer.revision,
        position=answer.position,
        replayed=answer.replayed,
        model_version=answer.version,
    )


def applied_part(
    frame_id: int,
    members: Members | None,
    reply: Reply,
    *,
    last: bool,
    is_short: bool = False,
) -> bytes:
    """Return the part of a frame's reply for applied members; None: all members."""
    response = pb.StepStreamResponse(
        frame_id=frame_id,
        all_members=members is None,
        last=last,
        model_version=reply.version,
    )
    revisions, positions = reply.revisions, reply.positions
    if is_short and _are_alike(revisions):
        response.revision = int(revisions[0])
    else:
        response.revisions.extend(revisions.tolist())
    if is_short and _are_alike(positions):
        response.position = int(positions[0])
    else:
        response.positions.extend(positions.tolist())
    if members is not None and is_short and members[-1] - members[0] == len(members) - 1:
        response.first_member, response.member_count = int(members[0]), len(members)
    elif members is not None:
        response.members.extend(members.tolist())
    tensors.add_tensors(response.outputs, reply.outputs)
    tensors.add_tensors(response.states, reply.states)
    if reply.replayed:
        response.replayed_members.extend(range(len(revisions)) if members is None else members.tolist())
    return response.SerializeToString()


def failed_part(frame_id: int, members: Members | None, error: ServerError, *, last: bool) -> bytes:
    """Return the part of a frame's reply for members with the same error; None: all members."""
    indexes = () if members is None else members.tolist()
    errors = [pb.MemberError(members=indexes, error=to_proto(error))]
    return pb.StepStreamResponse(frame_id=frame_id, errors=errors, last=last).SerializeToString()


def _are_alike(numbers: U64) -> bool:
    return bool(numbers[0] == numbers[-1]) and bool((numbers == numbers[0]).all())
