"""What makes a step plain on the wire, and what is known of messages that carry one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from google.protobuf.message import DecodeError

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.engine.calls import Array, Select, StepReply
from stepwell_server.errors import InvalidInput
from stepwell_server.program import Program
from stepwell_server.rpc import convert, frames, steps
from stepwell_server.rpc.layout import U8, Layout, learn_call, learn_frame
from stepwell_server.rpc.replyform import Ends, ReplyForm, call_ends, frame_ends

#: Outputs up to here need no exact look at the limit of a reply. See `sizes`.
_LARGEST_OUTPUTS = 64 * 1024
#: Bytes that a reply takes beside its outputs.
_REPLY_BYTES = 544
_MOST_KEYS = 4096
_FREE_TRIES = 64
#: Length of a message and where its session id stands: messages of one layout have the same.
_Key: TypeAlias = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """A kind of message that may carry a plain step, and of the reply to it."""

    learn: Callable[[bytes], Layout | None]
    parse: Callable[[bytes], pb.StepFrame | pb.StepRequest]
    response: type[pb.StepStreamResponse | pb.StepResponse]
    ends: Ends
    reply: Callable[[int, StepReply], bytes]
    """The reply to a frame id, by protobuf."""


FRAME = Kind(
    learn_frame,
    lambda raw: pb.StepStreamRequest.FromString(raw).step,
    pb.StepStreamResponse,
    frame_ends,
    frames.from_answer,
)
CALL = Kind(
    learn_call,
    pb.StepRequest.FromString,
    pb.StepResponse,
    call_ends,
    lambda _frame_id, answer: steps.from_answer(answer),
)


class Known:
    """A layout of one model's plain steps, and what it implies."""

    def __init__(
        self,
        kind: Kind,
        layout: Layout,
        program: Program,
        select: Select,
        order: Sequence[int],
        *,
        with_time: bool,
    ) -> None:
        self.kind = kind
        self.layout = layout
        self.select = select
        self.with_time = with_time
        self._order = order
        self._inputs = [(np.dtype(spec.dtype), spec.shape) for spec in program.inputs]
        self._ones = [
            (dtype, math.prod(shape), layout.data[at].start, (1, *shape))
            for at, (dtype, shape) in zip(order, self._inputs, strict=True)
        ]
        self.size = layout.length + _REPLY_BYTES + (0 if select is Select.NONE else _output_bytes(program))
        """Bytes that a message and its reply take at most."""
        self._form: ReplyForm | None = None

    def arrays(self, messages: U8) -> tuple[Array, ...]:
        """The inputs in the program's order, `(n, ...)` each."""
        found = []
        for (dtype, shape), at in zip(self._inputs, self._order, strict=True):
            span = self.layout.data[at]
            part = np.ascontiguousarray(messages[:, span.start : span.stop])
            found.append(part.view(dtype).reshape(len(messages), *shape))
        return tuple(found)

    def arrays_of(self, raw: bytes) -> list[Array]:
        """As `arrays`, for one message."""
        return [
            np.frombuffer(raw, dtype, count, start).reshape(shape)
            for dtype, count, start, shape in self._ones
        ]

    def form(self, outputs: Mapping[str, Array]) -> ReplyForm:
        """How replies are written, learnt from the first outputs."""
        if self._form is None:
            one = {name: array[:1] for name, array in outputs.items()}
            self._form = ReplyForm(self.kind.response, self.kind.ends, one)
        return self._form


class Layouts:
    """What has been learnt of one kind of messages to one model.

    Learning from a message that turns out to be of no use costs more than sending it the general way. So
    messages of a key that are not known are looked at only now and then, once many have been.
    """

    def __init__(self, kind: Kind, program: Program) -> None:
        self._kind = kind
        self._program = program
        self._known: dict[_Key, Known] = {}
        self._unknown: dict[_Key, int] = {}
        """How many messages of a key came while nothing was known of it."""

    def of(self, key: _Key, raw: bytes) -> Known | None:
        """What is known of messages with this key, learnt from this one if need be; None: nothing."""
        return self._known.get(key) or self._learn(key, raw)

    def forget(self, known: Known) -> None:
        """A message with its key had another layout."""
        self._known = {key: kept for key, kept in self._known.items() if kept is not known}

    def _learn(self, key: _Key, raw: bytes) -> Known | None:
        count = self._unknown.get(key, 0) + 1
        if count == 1 and len(self._unknown) >= _MOST_KEYS:
            # all of them anew: those in use come back by themselves
            self._known.clear()
            self._unknown.clear()
        self._unknown[key] = count
        if count > _FREE_TRIES and count & (count - 1):
            return None
        known = _recognise(self._kind, raw, self._program)
        if known is not None:
            self._known[key] = known
        return known


def _recognise(kind: Kind, raw: bytes, program: Program) -> Known | None:
    """What a message tells of others like it; None if it is not a plain step."""
    layout = kind.learn(raw)
    if layout is None:
        return None
    try:
        body = kind.parse(raw)
        select = convert.to_select(body.outputs)
        given = convert.to_arrays(body.inputs, "inputs")
    except (DecodeError, InvalidInput):
        return None
    names = [spec.name for spec in program.inputs]
    if list(given) == [""] and len(names) == 1:
        given = {names[0]: given[""]}
    if sorted(given) != sorted(names):
        return None
    with_time = _time_of(given, program)
    if with_time is None or (select is not Select.NONE and _output_bytes(program) > _LARGEST_OUTPUTS):
        return None
    order = [list(given).index(name) for name in names]
    return Known(kind, layout, program, select, order, with_time=with_time)


def _output_bytes(program: Program) -> int:
    """Bytes of the outputs of one row at one time step."""
    return sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in program.outputs)


def _time_of(given: Mapping[str, Array], program: Program) -> bool | None:
    """Whether plain inputs come with a time axis; None if they are not plain."""
    found = set()
    for spec in program.inputs:
        array = given[spec.name]
        if array.dtype.name != spec.dtype or array.dtype.kind == "b":  # not every byte is a bool
            return None
        if array.shape == (1, *spec.shape):
            found.add(False) if spec.temporal else None
        elif spec.temporal and array.shape == (1, 1, *spec.shape):
            found.add(True)
        else:
            return None
    return found.pop() if len(found) == 1 else None
