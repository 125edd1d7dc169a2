"""Plain steps on streams, many at a time: read by their byte layout, run together, answered from bytes.

One message of a stream costs little more than reading and writing it. What the lane does not know (a
layout it has not learnt, a session that is not there, anything that is not plain) it leaves to the stream,
which parses it with protobuf and sends it the general way. Both ways give the same answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.core.exactly_once import ANY_REVISION
from stepwell_server.engine.call import U64
from stepwell_server.engine.calls import Array, Members, Select, StepReply
from stepwell_server.engine.plain import PlainSteps
from stepwell_server.engine.port import PlainPort
from stepwell_server.errors import InvalidInput, ServerError
from stepwell_server.program import Program
from stepwell_server.rpc import convert
from stepwell_server.rpc.frames import from_answer
from stepwell_server.rpc.layout import U8, Layout, join, learn, read_varint
from stepwell_server.rpc.replyform import ReplyForm

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine

_LARGEST_MESSAGE = 16 * 1024
#: Outputs up to here need no exact look at the limit of a reply. See `sizes`.
_LARGEST_OUTPUTS = 64 * 1024
#: Bytes that a reply takes beside its outputs.
_REPLY_BYTES = 544
#: `timeout_ms` is a uint32: protobuf takes the low bits of a longer number.
_UINT32 = np.uint64(0xFFFFFFFF)
_MOST_LAYOUTS = 4096
_MOST_TRIES = 64
_FRAME_ID_TAG, _STEP_TAG, _SESSION_ID_TAG = 0x08, 0x12, 0x0A
_ANY = np.uint64(ANY_REVISION)
_INFINITY = float("inf")
#: Length of a message and where its session id stands: messages of one layout have the same.
_Key: TypeAlias = tuple[int, int, int]


class Stream(Protocol):
    """What the lane asks of a stream."""

    deadline: float
    """Of the whole stream, on the clock's monotonic time."""

    @property
    def is_over(self) -> bool:
        """Nobody reads its replies any more."""

    def begin_plain(self, frame_id: int, size: int) -> bool:
        """A plain step has come; False if its frame id is taken."""

    def reply_plain(self, frame_id: int, size: int, reply: bytes) -> None:
        """Send the reply to a plain step that has begun."""

    def fail_plain(self, frame_id: int, size: int, error: ServerError) -> None:
        """Say that a plain step that has begun failed."""

    def send_alone(self, frame_id: int, size: int, raw: bytes) -> None:
        """A step that has begun is not plain: take it the general way."""


class _Known:
    """A layout of one model's plain steps, and what it implies."""

    def __init__(
        self, layout: Layout, program: Program, select: Select, order: Sequence[int], *, with_time: bool
    ) -> None:
        self.layout = layout
        self._order = order
        self.select = select
        self.with_time = with_time
        self._inputs = [(np.dtype(spec.dtype), spec.shape) for spec in program.inputs]
        self._ones = [
            (at, dtype, math.prod(shape), (1, *shape))
            for at, (dtype, shape) in zip(order, self._inputs, strict=True)
        ]
        self.size = layout.length + _REPLY_BYTES + (0 if select is Select.NONE else _output_bytes(program))
        """Bytes that a message and its reply take at most."""
        self.form: ReplyForm | None = None
        """Made from the first outputs."""

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
            np.frombuffer(raw, dtype, count, self.layout.data[at].start).reshape(shape)
            for at, dtype, count, shape in self._ones
        ]


class _Item:
    """A plain step that waits for the next turn."""

    __slots__ = ("came", "frame_id", "handle", "known", "raw", "session_id", "stream")

    def __init__(
        self,
        stream: Stream,
        raw: bytes,
        frame_id: int,
        session_id: str,
        handle: int,
        known: _Known,
        came: float,
    ) -> None:
        self.stream = stream
        self.raw = raw
        self.frame_id = frame_id
        self.session_id = session_id
        self.handle = handle
        self.known = known
        self.came = came
        """On the clock's monotonic time; only if it has a time limit of its own."""


class FastLane:
    """Gathers the plain steps of all streams. Lives on the event loop."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._lanes = [_ModelLane(port, engine, clock) for port in engine.ports]

    def take(self, stream: Stream, raw: bytes) -> bool:
        """Take a message of a stream, if it may be a plain step; False leaves it to the stream."""
        found = _locate_id(raw)
        if found is None:
            return False
        frame_id, start, stop = found
        try:
            session_id = raw[start:stop].decode()
            handle, model = self._engine.locate(session_id)
        except (UnicodeDecodeError, ServerError):
            return False
        lane = self._lanes[model]
        key = (len(raw), start, stop)
        known = lane.known(key, raw)
        if known is None or not lane.has_room or not stream.begin_plain(frame_id, known.size):
            return False
        came = 0.0 if known.layout.timeout is None else self._clock.monotonic()
        lane.add(_Item(stream, raw, frame_id, session_id, handle, known, came))
        return True


def _locate_id(raw: bytes) -> tuple[int, int, int] | None:
    """Frame id, and where the session id stands; None if the message cannot be a plain step."""
    if not 8 <= len(raw) <= _LARGEST_MESSAGE:
        return None
    try:
        frame_id, at = read_varint(raw, 1) if raw[0] == _FRAME_ID_TAG else (0, 0)
        if raw[at] != _STEP_TAG:
            return None
        _, at = read_varint(raw, at + 1)
        if raw[at] != _SESSION_ID_TAG or raw[at + 1] & 0x80:
            return None
    except IndexError:  # it ends in the middle of these
        return None
    start = at + 2
    stop = start + raw[at + 1]
    return (frame_id, start, stop) if stop <= len(raw) and frame_id < 1 << 64 else None


class _ModelLane:
    """The plain steps of one model that wait for the next turn of its loop."""

    def __init__(self, port: PlainPort, engine: Engine, clock: Clock) -> None:
        self._port = port
        self._engine = engine
        self._clock = clock
        self._known: dict[_Key, _Known] = {}
        self._tries: dict[_Key, int] = {}
        self._waiting: list[_Item] = []
        port.feed(self.give_away, lambda: len(self._waiting))

    def add(self, item: _Item) -> None:
        self._port.take_in_others(self.give_away)
        if not self._waiting and self._port.may_run_now and self._run_solo(item):
            return
        self._waiting.append(item)
        self._port.wake()

    @property
    def has_room(self) -> bool:
        """One more may wait; else the general way refuses it, with a delay."""
        return self._port.has_room

    def known(self, key: _Key, raw: bytes) -> _Known | None:
        """What is known of messages with this key, learnt from this one if need be; None: nothing."""
        return self._known.get(key) or self._learn(key, raw)

    def give_away(self) -> None:
        """Admit everything that waits."""
        if not self._waiting:
            return
        items, self._waiting = self._waiting, []
        if len(items) == 1 and self._port.is_free and self._is_there(items[0]) and self._run_solo(items[0]):
            return
        for group in _in_order(items):
            self._admit(group)

    def _admit(self, items: Sequence[_Item]) -> None:
        known = items[0].known
        layout = known.layout
        messages = join([item.raw for item in items], layout.length)
        expected = None if layout.expected is None else Layout.numbers(messages, layout.expected)
        if not layout.fits(messages).all() or (expected is not None and (expected == _ANY).any()):
            # Another layout of the same key, or no plain step. They go one by one, in their order.
            self._forget(items)
            return
        self._port.admit(
            PlainSteps(
                session_ids=[item.session_id for item in items],
                handles=np.array([item.handle for item in items], np.intp),
                arrays=known.arrays(messages),
                with_time=known.with_time,
                select=known.select,
                receiver=_Receiver(items, known),
                expected=expected,
                requests=None if layout.request_id is None else Layout.fixed64s(messages, layout.request_id),
                deadlines=self._deadlines(items, messages, layout),
            )
        )

    def _is_there(self, item: _Item) -> bool:
        """The session is where it was when the item came: by now its handle may be another's."""
        try:
            return self._engine.locate(item.session_id)[0] == item.handle
        except ServerError:
            return False

    def _run_solo(self, item: _Item) -> bool:
        known, raw, stream = item.known, item.raw, item.stream
        layout = known.layout
        if stream.is_over or not layout.fits_one(raw):
            return False
        if self._clock.monotonic() >= _deadline(item):
            return False
        expected = None if layout.expected is None else read_varint(raw, layout.expected.start)[0]
        request = layout.request_id
        reply = self._port.run_solo(
            item.handle,
            known.arrays_of(raw),
            expected=expected,
            request_id=0 if request is None else int.from_bytes(raw[request.start : request.stop], "little"),
            select=known.select,
            with_time=known.with_time,
        )
        if reply is None:
            return False
        if known.form is None:
            known.form = ReplyForm(reply.outputs)
        written = known.form.write_one(
            item.frame_id, reply.revision, reply.position, list(reply.outputs.values())
        )
        stream.reply_plain(item.frame_id, known.size, written)
        return True

    def _forget(self, items: Sequence[_Item]) -> None:
        self._known = {key: known for key, known in self._known.items() if known is not items[0].known}
        for item in items:
            item.stream.send_alone(item.frame_id, item.known.size, item.raw)
        # they wait among the single steps now, and must not be overtaken by the groups that follow
        self._port.take_in_others(self.give_away)

    def _deadlines(
        self, items: Sequence[_Item], messages: U8, layout: Layout
    ) -> npt.NDArray[np.float64] | None:
        own = [item.stream.deadline for item in items]
        if layout.timeout is None:
            return None if min(own) == _INFINITY else np.array(own)
        timeouts = Layout.numbers(messages, layout.timeout) & _UINT32
        came = np.array([item.came for item in items])
        until: npt.NDArray[np.float64] = np.where(
            timeouts > 0, came + timeouts.astype(np.float64) / 1000, _INFINITY
        )
        return np.minimum(until, own)

    def _learn(self, key: _Key, raw: bytes) -> _Known | None:
        tries = self._tries.get(key, 0)
        if tries >= _MOST_TRIES or len(self._tries) >= _MOST_LAYOUTS:
            return None
        self._tries[key] = tries + 1
        known = _recognise(raw, self._port.program)
        if known is not None:
            self._known[key] = known
        return known


def _deadline(item: _Item) -> float:
    """On the clock's monotonic time."""
    span = item.known.layout.timeout
    timeout = 0 if span is None else read_varint(item.raw, span.start)[0] & int(_UINT32)
    return min(item.stream.deadline, item.came + timeout / 1000) if timeout else item.stream.deadline


def _in_order(items: list[_Item]) -> Iterable[Sequence[_Item]]:
    """Items by layout; those of one session stay in the order in which they came."""
    first = items[0].known
    if all(item.known is first for item in items):
        return [items]
    if len({item.handle for item in items}) != len(items):
        return [list(run) for _, run in itertools.groupby(items, key=_known_of)]
    groups: dict[_Known, list[_Item]] = {}
    for item in items:
        groups.setdefault(item.known, []).append(item)
    return groups.values()


def _known_of(item: _Item) -> _Known:
    return item.known


def _recognise(raw: bytes, program: Program) -> _Known | None:
    """What a message tells of others like it; None if it is not a plain step."""
    layout = learn(raw)
    if layout is None:
        return None
    try:
        body = pb.StepStreamRequest.FromString(raw).step
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
    return _Known(layout, program, select, order, with_time=with_time)


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


class _Receiver:
    """Answers some plain steps on their streams. See `plain.Receiver`."""

    def __init__(self, items: Sequence[_Item], known: _Known) -> None:
        self._items = items
        self._known = known

    def settle(
        self,
        members: Members,
        revisions: U64,
        positions: U64,
        outputs: Mapping[str, Array],
        *,
        replayed: bool,
    ) -> None:
        items = [self._items[member] for member in members.tolist()]
        if not replayed:
            _send(self._known, items, revisions.tolist(), positions.tolist(), outputs)
            return
        # a remembered reply may have any shape
        for i, (item, revision, position) in enumerate(
            zip(items, revisions.tolist(), positions.tolist(), strict=True)
        ):
            own = {name: array[i : i + 1] for name, array in outputs.items()}
            reply = from_answer(item.frame_id, StepReply(revision, position, own, replayed=True))
            item.stream.reply_plain(item.frame_id, item.known.size, reply)

    def fail(self, members: Members, error: ServerError) -> None:
        for member in members.tolist():
            item = self._items[member]
            item.stream.fail_plain(item.frame_id, item.known.size, error)

    def cancelled(self, members: Members) -> Sequence[int]:
        return [member for member in members.tolist() if self._items[member].stream.is_over]

    def send_alone(self, members: Members) -> None:
        for member in members.tolist():
            item = self._items[member]
            item.stream.send_alone(item.frame_id, item.known.size, item.raw)


def _send(
    known: _Known,
    items: Sequence[_Item],
    revisions: Sequence[int],
    positions: Sequence[int],
    outputs: Mapping[str, Array],
) -> None:
    if known.form is None:
        known.form = ReplyForm({name: array[:1] for name, array in outputs.items()})
    replies = known.form.write(
        [item.frame_id for item in items], revisions, positions, list(outputs.values())
    )
    for item, reply in zip(items, replies, strict=True):
        item.stream.reply_plain(item.frame_id, item.known.size, reply)
