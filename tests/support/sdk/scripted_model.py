"""The toy model of the scripted server: adds its input to its state, which is its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from stepwell._batching.frames import Frame
from stepwell._state.tensors import pack, to_messages
from stepwell._transport.retry import Deadline
from stepwell.v1 import sessions_pb2, tensors_pb2

FEATURES = 2


@dataclasses.dataclass
class Session:
    """A session, and the answer to its last change."""

    session_id: str
    batch_size: int
    state: Any
    revision: int = 0
    position: int = 0
    request_id: int = 0
    remembered: Any = None
    version: int = 1
    is_pinned: bool = False


def spec(name: str, temporal: bool = False) -> tensors_pb2.TensorSpec:
    return tensors_pb2.TensorSpec(
        name=name, dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=[FEATURES], temporal=temporal
    )


def step(session: Session, x: Any, anew: Sequence[bool] = ()) -> Any:
    """Adds the input to the state, which is the output; rows that begin `anew` are set to zero before."""
    if any(anew):
        session.state = np.where(np.array(anew)[:, None], np.float32(0), session.state)
        session.position = 0 if all(anew) else session.position
    steps = x[:, None] if x.ndim == 2 else x
    y = session.state[:, None] + np.cumsum(steps, 1)
    session.state = y[:, -1].astype(np.float32)
    session.position += steps.shape[1]
    return (y[:, 0] if x.ndim == 2 else y).astype(np.float32)


def reset(session: Session) -> None:
    session.state = np.zeros_like(session.state)
    session.position = 0


def tensor(name: str, array: Any) -> tensors_pb2.Tensor:
    return to_messages([pack(name, name, array)])[0]


def states_of(selection: int, y: Any) -> list[tensors_pb2.Tensor]:
    """The states that a step asked for; the output is the state after each time step."""
    if selection not in (sessions_pb2.STATE_SELECTION_ALL, sessions_pb2.STATE_SELECTION_LAST):
        return []
    is_last = selection == sessions_pb2.STATE_SELECTION_LAST and y.ndim == 3
    return [tensor(name, y[:, -1] if is_last else y) for name in ("sum", "count")]


def message_of(frame: Frame, frame_id: int, deadline: Deadline) -> sessions_pb2.StepStreamRequest:
    """The message that a frame sends; begins a round."""
    return sessions_pb2.StepStreamRequest.FromString(frame.encode(frame_id, deadline))


def in_full(request: Any) -> Any:
    """A frame with a number for each session where one stood for all."""
    encoded = request if isinstance(request, bytes) else request.SerializeToString()
    request = sessions_pb2.StepStreamRequest.FromString(encoded)
    frame = request.step if request.HasField("step") else request.reset
    count = len(frame.session_ids)
    if frame.request_id_base:
        assert not frame.request_ids
        frame.request_ids.extend(frame.request_id_base + i for i in range(count))
    if frame.batch_size:
        assert not frame.batch_sizes
        frame.batch_sizes.extend([frame.batch_size] * count)
    if frame.HasField("expected_revision"):
        assert not frame.expected_revisions
        frame.expected_revisions.extend([frame.expected_revision] * count)
    return request


def shorten(response: Any) -> None:
    """A part as it answers a frame that has one number for all sessions."""
    for many, one in (("revisions", "revision"), ("positions", "position")):
        if len(set(getattr(response, many))) == 1:
            setattr(response, one, getattr(response, many)[0])
            response.ClearField(many)
    members = list(response.members)
    if members and members == list(range(members[0], members[-1] + 1)):
        response.first_member, response.member_count = members[0], len(members)
        response.ClearField("members")
