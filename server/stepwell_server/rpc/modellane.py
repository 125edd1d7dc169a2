"""The plain steps of one model that wait for the next turn of its loop, and who is answered."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from stepwell_server.core.exactly_once import ANY_REVISION
from stepwell_server.engine.call import U64
from stepwell_server.engine.calls import Array, Members, StepReply
from stepwell_server.engine.plain import PlainSteps
from stepwell_server.engine.port import PlainPort
from stepwell_server.engine.solo import Later
from stepwell_server.errors import ServerError
from stepwell_server.rpc.layout import U8, Layout, join
from stepwell_server.rpc.plain import CALL, FRAME, Known, Layouts
from stepwell_server.rpc.wire import read_varint

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine

#: `timeout_ms` is a uint32: protobuf takes the low bits of a longer number.
_UINT32 = np.uint64(0xFFFFFFFF)
_ANY = np.uint64(ANY_REVISION)
_INFINITY = float("inf")
#: What a pass takes beside its rows: the array work and the bookkeeping that it does once for all of them.
_PASS_S = 100e-6
#: So many steps at most are run one by one.
_FEW = 8


class Caller(Protocol):
    """Who sent a plain step: a stream, or a call with this step alone. The lane asks this of it."""

    deadline: float
    """Of the whole stream or call, on the clock's monotonic time."""

    @property
    def is_over(self) -> bool:
        """Nobody waits for its replies any more."""

    def begin_plain(self, frame_id: int, size: int) -> bool:
        """A plain step has come; False if its frame id is taken."""

    def reply_plain(self, frame_id: int, size: int, reply: bytes) -> None:
        """Send the reply to a plain step that has begun."""

    def fail_plain(self, frame_id: int, size: int, error: ServerError) -> None:
        """Say that a plain step that has begun failed."""

    def send_alone(self, frame_id: int, size: int, raw: bytes) -> None:
        """A step that has begun is not plain: take it the general way."""


class Item:
    """A plain step that has begun."""

    __slots__ = ("caller", "came", "frame_id", "handle", "known", "raw", "session_id")

    def __init__(
        self,
        caller: Caller,
        raw: bytes,
        frame_id: int,
        session_id: str,
        handle: int,
        known: Known,
        came: float,
    ) -> None:
        self.caller = caller
        self.raw = raw
        self.frame_id = frame_id
        self.session_id = session_id
        self.handle = handle
        self.known = known
        self.came = came
        """On the clock's monotonic time; only if it has a time limit of its own."""


class ModelLane:
    """Gathers plain steps of one model. Lives on the event loop."""

    def __init__(self, port: PlainPort, engine: Engine, clock: Clock) -> None:
        self._port = port
        self._engine = engine
        self._clock = clock
        self._waiting: list[Item] = []
        self._solo_s = 20e-6
        """What a step takes that runs alone, in the best of the last cases."""
        self.frames = Layouts(FRAME, port.program)
        self.calls = Layouts(CALL, port.program)
        port.feed(self.give_away, lambda: len(self._waiting))

    def take(
        self, caller: Caller, raw: bytes, frame_id: int, session_id: str, handle: int, known: Known
    ) -> bool:
        """Take a step: run it at once, or let it wait for the next turn. False: nothing was begun."""
        port = self._port
        port.take_in_others(self.give_away)
        may_run_now = not self._waiting and port.may_run_now
        # where nothing else is there, one has room
        if not (may_run_now or port.has_room) or not caller.begin_plain(frame_id, known.size):
            return False
        came = 0.0 if known.layout.timeout is None else self._clock.monotonic()
        item = Item(caller, raw, frame_id, session_id, handle, known, came)
        if not (may_run_now and self._run_solo(item)):
            self._waiting.append(item)
            port.wake()
        return True

    def give_away(self) -> None:
        """Run everything that waits one by one, if it is little, or admit it."""
        if not self._waiting:
            return
        items, self._waiting = self._waiting, []
        if len(items) <= _FEW and (len(items) - 1) * self._solo_s < _PASS_S:
            items = self._run_few(items)
        for group in _in_order(items):
            self._admit(group)

    def _run_few(self, items: list[Item]) -> list[Item]:
        """Run steps alone, one after the other, and return those that have to go another way."""
        started = self._clock.monotonic()
        for index, item in enumerate(items):
            if not (self._port.is_free and self._is_there(item) and self._run_solo(item)):
                return items[index:]
        # whatever else the machine does only makes it longer
        each = (self._clock.monotonic() - started) / len(items)
        self._solo_s = min(each, 1.1 * self._solo_s)
        return []

    def _admit(self, items: Sequence[Item]) -> None:
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

    def _is_there(self, item: Item) -> bool:
        """The session is where it was when the item came: by now its handle may be another's."""
        try:
            return self._engine.locate(item.session_id)[0] == item.handle
        except ServerError:
            return False

    def _run_solo(self, item: Item) -> bool:
        known, raw, caller = item.known, item.raw, item.caller
        layout = known.layout
        if caller.is_over or not layout.fits_one(raw):
            return False
        deadline = _deadline(item)
        if deadline != _INFINITY and self._clock.monotonic() >= deadline:
            return False
        request = layout.request_id
        reply = self._port.run_solo(
            item.handle,
            known.arrays_of(raw),
            expected=None if layout.expected is None else read_varint(raw, layout.expected.start)[0],
            request_id=0 if request is None else int.from_bytes(raw[request.start : request.stop], "little"),
            select=known.select,
            with_time=known.with_time,
        )
        if reply is None:
            return False
        if isinstance(reply, ServerError):
            caller.fail_plain(item.frame_id, known.size, reply)
        elif isinstance(reply, Later):
            self._answer_later(item, reply)
        else:
            caller.reply_plain(item.frame_id, known.size, _written(item, reply))
        return True

    def _answer_later(self, item: Item, later: Later) -> None:
        # now, while the store is at it
        caller, written = item.caller, _written(item, later.reply)

        def answer(error: ServerError | None) -> None:
            if error is None:
                caller.reply_plain(item.frame_id, item.known.size, written)
            else:
                caller.fail_plain(item.frame_id, item.known.size, error)

        later.tell(answer)

    def _forget(self, items: Sequence[Item]) -> None:
        known = items[0].known
        (self.frames if known.kind is FRAME else self.calls).forget(known)
        for item in items:
            item.caller.send_alone(item.frame_id, known.size, item.raw)
        # they wait among the single steps now, and must not be overtaken by the groups that follow
        self._port.take_in_others(self.give_away)

    def _deadlines(
        self, items: Sequence[Item], messages: U8, layout: Layout
    ) -> npt.NDArray[np.float64] | None:
        own = [item.caller.deadline for item in items]
        if layout.timeout is None:
            return None if min(own) == _INFINITY else np.array(own)
        timeouts = Layout.numbers(messages, layout.timeout) & _UINT32
        came = np.array([item.came for item in items])
        until: npt.NDArray[np.float64] = np.where(
            timeouts > 0, came + timeouts.astype(np.float64) / 1000, _INFINITY
        )
        return np.minimum(until, own)


def _written(item: Item, reply: StepReply) -> bytes:
    form = item.known.form(reply.outputs)
    return form.write_one(item.frame_id, reply.revision, reply.position, tuple(reply.outputs.values()))


def _deadline(item: Item) -> float:
    """On the clock's monotonic time."""
    span = item.known.layout.timeout
    timeout = 0 if span is None else read_varint(item.raw, span.start)[0] & int(_UINT32)
    return min(item.caller.deadline, item.came + timeout / 1000) if timeout else item.caller.deadline


def _in_order(items: list[Item]) -> Iterable[Sequence[Item]]:
    """Items by layout; those of one session stay in the order in which they came."""
    if not items:
        return []
    first = items[0].known
    if all(item.known is first for item in items):
        return [items]
    if len({item.handle for item in items}) != len(items):
        return [list(run) for _, run in itertools.groupby(items, key=_known_of)]
    groups: dict[Known, list[Item]] = {}
    for item in items:
        groups.setdefault(item.known, []).append(item)
    return groups.values()


def _known_of(item: Item) -> Known:
    return item.known


class _Receiver:
    """Answers some plain steps of one layout. See `plain.Receiver` of the engine."""

    def __init__(self, items: Sequence[Item], known: Known) -> None:
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
        write = self._replayed if replayed else self._applied
        replies = write(items, revisions.tolist(), positions.tolist(), outputs)
        size = self._known.size
        for item, reply in zip(items, replies, strict=True):
            item.caller.reply_plain(item.frame_id, size, reply)

    def _applied(
        self,
        items: Sequence[Item],
        revisions: Sequence[int],
        positions: Sequence[int],
        outputs: Mapping[str, Array],
    ) -> Sequence[bytes]:
        frame_ids = [item.frame_id for item in items]
        return self._known.form(outputs).write(frame_ids, revisions, positions, tuple(outputs.values()))

    def _replayed(
        self,
        items: Sequence[Item],
        revisions: Sequence[int],
        positions: Sequence[int],
        outputs: Mapping[str, Array],
    ) -> Sequence[bytes]:
        """A remembered reply may have any shape."""
        reply = self._known.kind.reply
        own = [{name: array[i : i + 1] for name, array in outputs.items()} for i in range(len(items))]
        return [
            reply(item.frame_id, StepReply(revision, position, rows, replayed=True))
            for item, revision, position, rows in zip(items, revisions, positions, own, strict=True)
        ]

    def fail(self, members: Members, error: ServerError) -> None:
        for member in members.tolist():
            item = self._items[member]
            item.caller.fail_plain(item.frame_id, item.known.size, error)

    def cancelled(self, members: Members) -> Sequence[int]:
        return [member for member in members.tolist() if self._items[member].caller.is_over]

    def send_alone(self, members: Members) -> None:
        for member in members.tolist():
            item = self._items[member]
            item.caller.send_alone(item.frame_id, item.known.size, item.raw)
