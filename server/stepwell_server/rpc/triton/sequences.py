"""Sequences are sessions: START opens or resets one, a request steps it, END closes it.

A sequence's session is found by an id that is made of the model and the sequence id, so everything that
Stepwell does with sessions can be done with sequences: read, fork, save, list them.

START on a live sequence is one change of its session: its rows are reset, then stepped, or nothing changes. Sent again
with its request id it is that change, and is answered with the first answer. Where no session is there yet, one is
opened for it, and closed again if its step fails; one of another batch size is replaced.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from stepwell_server.core.exactly_once import Kind, digests, row_numbers, seed_of
from stepwell_server.engine.api import ChangeResult, SessionInfo
from stepwell_server.engine.change import Awaited, Change
from stepwell_server.engine.content import reused_request
from stepwell_server.engine.intake.validation import check_inputs, require_finite
from stepwell_server.engine.types import U64, Mask
from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelMismatch,
    Overloaded,
    RevisionConflict,
    ServerError,
    SessionGone,
    StateCorrupt,
    Stopping,
    Unavailable,
    VersionNotFound,
)
from stepwell_server.logs import Log
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.steps.messages import limit_reply
from stepwell_server.rpc.tracing import TRACES
from stepwell_server.rpc.triton.errors import SequenceId, not_started, on_another_version

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.engine.engine import Engine
    from stepwell_server.rpc.triton.request import Request
    from stepwell_server.rpc.triton.versions import Read

_log = Log("rpc.triton")
_UNUSABLE = (SessionGone, ModelMismatch, StateCorrupt)
"""Errors of a sequence that cannot continue, although it may have existed."""
MAX_WAITING = 1024
"""Limit of waiting requests of one sequence."""
_MAX_ANSWERS = 10_000
"""Limit of remembered answers to the last requests of sequences."""
_MAX_BYTES = 16 * 1024 * 1024
"""Limit of bytes of their outputs."""


def session_id_of(model: str, sequence_id: SequenceId) -> str:
    """Return the id of a sequence's session: `triton/<model>/5` for 5, `triton/<model>/"5"` for the text 5.

    A text that cannot be part of an id, because of its characters or its length, is replaced by its SHA-256:
    `triton/<model>/sha256:<hex>`. This is the external id; `tenancy.internal_id` converts it. The native front makes ids of
    the first two kinds, with the tenants' prefixes (triton/request.rs).
    """
    prefix = f"triton/{model}/"
    if isinstance(sequence_id, int):
        return f"{prefix}{sequence_id}"
    if sequence_id.isprintable() and len(prefix) + len(sequence_id) + 2 <= 256:
        return f'{prefix}"{sequence_id}"'
    return f"{prefix}sha256:{hashlib.sha256(sequence_id.encode()).hexdigest()}"


def sequence_of(model: str, session_id: str) -> SequenceId:
    """Return the sequence of a session id that is not a digest, in any namespace: the inverse of `session_id_of`."""
    name = tenancy.external_id(session_id).removeprefix(f"triton/{model}/")
    return name[1:-1] if name.startswith('"') else int(name)


class Sequences:
    """Steps sequences, one request of each at a time. Lives on the event loop."""

    def __init__(self, engine: Engine, clock: Clock, max_reply_bytes: int) -> None:
        self._engine = engine
        self._clock = clock
        self._max_reply_bytes = max_reply_bytes
        self._queues = SequenceQueues()
        self._ended = EndedReplies()

    def enter(self, session_id: str) -> QueuePosition:
        """Return a position at the end of a sequence's queue."""
        return self._queues.enter(session_id)

    def must_wait(self, session_ids: Sequence[str], request_ids: U64 | None) -> Mask | None:
        """Return which sequences have a running request, or have answered this request with END; None: none."""
        taken = self._queues.are_busy(session_ids)
        if request_ids is None:
            return taken
        known = self._ended.are_known(session_ids, request_ids.tolist())
        return known if taken is None else taken | known

    async def step(self, request: Request, position: QueuePosition) -> tuple[Read, ChangeResult]:
        """Serve a request when it is first in its queue. Also returns the request as it was read.

        Raises:
            InvalidInput: the sequence has not started, or the request does not fit the sequence or its version of the
                model; nothing changed.
            ModelNotFound: that version is not loaded; nothing changed.
            ServerError: see `Awaited.get`; nothing changed.
        """
        await position.wait()
        if self._clock.monotonic() >= request.deadline:
            raise DeadlineExceeded(
                "the request's deadline passed while it waited for its sequence; nothing changed"
            )
        given = request.parameters
        if given.request_id and (ended := self._ended.get(request.session_id, given.request_id)):
            read = request.read_answered(ended.reply.version)
            if ended.content != _content_of(request, read):
                raise reused_request(request.session_id, Kind.STEP, Kind.STEP)
            return read, ended.reply
        self._engine.require_accepting()
        try:
            read, reply = await (self._start(request) if given.start else self._continue(request))
        except Stopping as error:  # the sequence's session may have been closed or opened before that
            raise Unavailable(error.message) from error
        if given.end:
            if given.request_id:
                self._ended.put(request.session_id, given.request_id, reply, _content_of(request, read))
            await self._close_if_possible(request.session_id, given.request_id)
        return read, reply

    async def _start(self, request: Request) -> tuple[Read, ChangeResult]:
        info = await self._live_or_cleared(request)
        if info is not None:
            await self._refuse_if_ended(request)
        read = request.read()
        inputs, program = read.inputs, read.model.program
        checked = check_inputs(program, inputs.arrays, inputs.rows)
        require_finite("input", checked.arrays, [spec.name for spec in program.inputs], inputs.arrays)
        if info is not None:
            is_there = info.version == read.model.version and info.is_pinned == (request.asked is not None)
            if is_there and info.batch_size == inputs.rows:
                return read, await self._advance(request, read, None, resets=True)
            if known := await self._applied_before(request, read, info):
                return read, known
            if request.parameters.request_id and request.parameters.request_id == info.request_id:
                raise reused_request(request.session_id, Kind.STEP, Kind.STEP)
            await self._engine.close_session(request.session_id, deadline=request.deadline)
        revision, uid = await self._open(request, inputs.rows)
        try:
            # reset and step, as for a repeated request: the session exists by now
            return read, await self._advance(request, read, revision, resets=True)
        except BaseException:  # also if cancelled: no client knows of the sequence
            await self._close_if_possible(request.session_id, uid=uid)
            raise

    async def _open(self, request: Request, rows: int) -> tuple[int, int]:
        """Open the sequence's session, on the version that the request names. Returns its revision and uid."""
        ref = request.name if request.asked is None else f"{request.name}@{request.asked}"
        try:
            opened = await self._engine.open_session(
                ref, session_id=request.session_id, batch_size=rows, must_be_new=True, caller=request.who
            )
            return opened.session.revision, opened.session.uid
        except Overloaded:
            # Sessions with running changes use all rows. Triton's clients do not retry like our SDK, so the session starts
            # without rows, and its first step waits in the queue for them.
            many = await self._engine.open_sessions(
                ref, session_ids=[request.session_id], batch_size=rows, caller=request.who
            )
            return int(many.revisions[0]), int(many.uids[0])

    async def _continue(self, request: Request) -> tuple[Read, ChangeResult]:
        sequence_id, asked = request.parameters.sequence_id, request.asked
        try:
            info = await self._live(request)
        except _UNUSABLE as error:
            request.read()  # report errors of its tensors first, like Triton
            if isinstance(error, SessionGone):
                await self._refuse_if_ended(request)
            raise not_started(sequence_id, request.name, error) from error
        await self._refuse_if_ended(request)
        if asked is not None and info.version != asked:
            refusal = on_another_version(sequence_id, request.name, info.version, asked)
            if not request.parameters.request_id:
                raise refusal
            read = request.read(info.version)
            if known := await self._applied_before(request, read, info):
                return read, known
            raise refusal
        read = request.read(info.version)
        if info.position == 0:
            raise not_started(sequence_id, request.name)
        if info.batch_size != read.inputs.rows:
            raise InvalidInput(
                f"inference request for sequence {sequence_id} to model '{request.name}' must specify"
                f" batch-size {info.batch_size} as its first request did; got {read.inputs.rows}"
            )
        return read, await self._advance(request, read, request.parameters.revision)

    async def _applied_before(self, request: Request, read: Read, info: SessionInfo) -> ChangeResult | None:
        """Return the reply to a repeated request that was the session's last change before it moved to another version."""
        if not request.parameters.request_id or not info.revision:
            return None
        try:
            # the session is past this revision: the remembered reply is sent again, or the request is refused
            return await self._advance(request, read, info.revision - 1, resets=request.parameters.start)
        except (RevisionConflict, InvalidInput):
            return None

    async def _close_if_possible(self, session_id: str, request_id: int = 0, *, uid: int = 0) -> None:
        try:
            await self._engine.close_session(session_id, request_id=request_id, uid=uid)
        except SessionGone:
            return  # another call closed it
        except ServerError as error:
            # the caller has its reply or error; the session stays until it expires
            _log.warning("sequence not closed", session=session_id, error=error.message)

    async def _advance(
        self, request: Request, read: Read, expected: int | None, *, resets: bool = False
    ) -> ChangeResult:
        answer, given = Awaited(), request.parameters
        change = Change((request.session_id,), answer, read.inputs.arrays)
        change.deadline, change.connection, change.caller = request.deadline, request.caller, request.who
        change.traces = TRACES.get()
        limit_reply(change, self._max_reply_bytes)
        if resets:
            change.reset_rows = np.ones(read.inputs.rows, np.bool_)
        if expected is not None:
            change.expected = np.array([expected], np.uint64)
        if given.request_id:
            change.request_ids = np.array([given.request_id], np.uint64)
        self._engine.submit(change)
        return await answer.get()

    async def _live(self, request: Request) -> SessionInfo:
        info = await self._engine.session_info(request.session_id, usable=True)
        if info.model != request.name:
            raise InvalidInput(
                f"session {request.session_id!r} must be of model '{request.name}' to be its sequence"
                f" {request.parameters.sequence_id}; it is of '{info.model}'"
            )
        return info

    async def _live_or_cleared(self, request: Request) -> SessionInfo | None:
        """Return the open session of the sequence; None: none. A session that cannot be stepped is deleted."""
        try:
            return await self._live(request)
        except SessionGone:
            return None
        except (*_UNUSABLE, VersionNotFound):
            await self._engine.close_session(request.session_id, deadline=request.deadline)
            return None

    async def _refuse_if_ended(self, request: Request) -> None:
        """Refuse a repeated END whose answer is no longer remembered, because another sequence may have started.

        Raises:
            InvalidInput: it was applied.
        """
        given = request.parameters
        if not (given.end and given.request_id):
            return
        if await self._engine.was_closed_by(request.session_id, given.request_id):
            raise InvalidInput(
                f"{not_started(request.parameters.sequence_id, request.name).message}: the last one ended with this very"
                " request, and its answer was in the memory of the server process that gave it",
                cause="ALREADY_APPLIED",
            )


def _content_of(request: Request, read: Read) -> int:
    """Return a digest of a request's content, which must be the same if the request is repeated after its END."""
    inputs, names = read.inputs, sorted(read.inputs.arrays)
    shapes = [inputs.arrays[name].shape for name in names]
    rows = row_numbers([inputs.arrays[name] for name in names], inputs.rows)
    seed = seed_of(request.parameters.start, names, shapes)
    return int(digests(np.uint64(0), seed, rows, np.array([inputs.rows], np.intp))[0])


@dataclasses.dataclass(frozen=True, slots=True)
class EndedReply:
    """The reply to a request with END."""

    reply: ChangeResult
    """Marked as replayed."""
    content: int
    """A digest of the request's content."""


class EndedReplies:
    """The latest replies to requests with END and a request id. They are in memory only, so a restart forgets them."""

    def __init__(self) -> None:
        self._replies: OrderedDict[tuple[str, int], EndedReply] = OrderedDict()
        self._bytes = 0

    def get(self, session_id: str, request_id: int) -> EndedReply | None:
        """Return the reply to a request; None if it is not remembered."""
        return self._replies.get((session_id, request_id))

    def are_known(self, session_ids: Sequence[str], request_ids: Sequence[int]) -> Mask:
        """Return which requests have a remembered reply."""
        pairs = zip(session_ids, request_ids, strict=True)
        return np.fromiter((pair in self._replies for pair in pairs), np.bool_, len(session_ids))

    def put(self, session_id: str, request_id: int, reply: ChangeResult, content: int) -> None:
        """Remember a reply, and forget the oldest ones if there are too many or they are too large."""
        kept = dataclasses.replace(
            reply, outputs={name: array.copy() for name, array in reply.outputs.items()}, replayed=True
        )
        old = self._replies.pop((session_id, request_id), None)
        self._bytes += _size(kept) - (0 if old is None else _size(old.reply))
        self._replies[session_id, request_id] = EndedReply(kept, content)
        while len(self._replies) > _MAX_ANSWERS or self._bytes > _MAX_BYTES:
            self._bytes -= _size(self._replies.popitem(last=False)[1].reply)


def _size(reply: ChangeResult) -> int:
    return sum(array.nbytes for array in reply.outputs.values())


class SequenceQueues:
    """Queues of requests, one for each sequence with a running request. On one event loop."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[QueuePosition]] = {}

    def are_busy(self, keys: Sequence[str]) -> Mask | None:
        """Return which sequences have a running request; None: none."""
        if not self._queues or self._queues.keys().isdisjoint(keys):
            return None
        return np.fromiter((key in self._queues for key in keys), np.bool_, len(keys))

    def enter(self, key: str) -> QueuePosition:
        """Return a position at the end of a queue. If the queue is full, `QueuePosition.wait` refuses it."""
        line = self._queues.setdefault(key, deque())
        position = QueuePosition(key, self._queues, is_refused=len(line) > MAX_WAITING)
        if not position.is_refused:
            line.append(position)
        return position


class QueuePosition:
    """A request's position in the queue of its sequence. Its holder must leave it, even if the request fails."""

    def __init__(self, key: str, queues: dict[str, deque[QueuePosition]], *, is_refused: bool) -> None:
        self.key = key
        self.is_refused = is_refused
        self._queues = queues
        self._waiting: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Return when all earlier requests have left.

        Raises:
            Overloaded: the queue is full.
        """
        if self.is_refused:
            raise Overloaded(
                f"at most {MAX_WAITING} requests of a sequence may wait; this one would be one more", 0.1
            )
        if self._queues[self.key][0] is not self:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting

    def leave(self, _task: object = None) -> None:
        """Admit the next request. Leaving twice has no further effect."""
        line = self._queues.get(self.key)
        if line is None or self not in line:
            return
        line.remove(self)
        if not line:
            del self._queues[self.key]
        elif (waiting := line[0]._waiting) is not None and not waiting.done():
            waiting.set_result(None)
