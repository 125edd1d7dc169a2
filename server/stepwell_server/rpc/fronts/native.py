"""The front in Rust: the only module that knows the package `stepwell_front`, which is in `server/front`."""

from __future__ import annotations

import asyncio
import collections
import signal
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import stepwell_front

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.clock import Clock
from stepwell_server.core.callers import ANYBODY, Caller, Credential
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.core.namespaces import SEPARATOR, prefix_of
from stepwell_server.core.recent_values import RecentValues
from stepwell_server.engine.types import U64, Members
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.rpc.fronts.arrivals import Arrivals, Kind
from stepwell_server.rpc.fronts.base import (
    F64,
    BindError,
    CallEnded,
    Ended,
    FrontCounts,
    InputColumn,
    Method,
    OtherFront,
    OutputColumn,
    Rest,
    StepColumns,
    Steps,
)
from stepwell_server.rpc.fronts.certificates import Certificates, Option, Unusable
from stepwell_server.rpc.fronts.unix_socket import SocketFile, bind
from stepwell_server.rpc.status import Status

if TYPE_CHECKING:
    from stepwell_front import BatchHandle, CallHandle

VERSION = stepwell_front.__version__
#: What this module and the front say to each other: raised with every change of it, here and in `python/front.rs`.
_INTERFACE = 7
_installed = getattr(stepwell_front, "INTERFACE", 0)
if _installed != _INTERFACE:
    raise OtherFront(
        f"stepwell-front must have interface {_INTERFACE}; the installed one, {VERSION}, has {_installed}, as it was built"
        " from other sources"
    )
_log = Log("rpc.front")
#: Bytes of replies that a stream's writer may be ahead of what is on its way.
_AHEAD_BYTES = 64 << 10
_BACKLOG = 1024
#: The option of each part of the certificates.
_OPTIONS: Mapping[str, Option] = {
    "certificate": "--tls-cert",
    "key": "--tls-key",
    "client_ca": "--tls-client-ca",
}
#: So often the wire is asked for more in one turn of the event loop, while several connections are about.
_MAX_TAKES = 16
#: The source of what has come, among other large work.
_ARRIVALS = ("arrivals",)
#: Connections of which it is remembered who calls; of others the next call says it.
_CALLERS = 10_000
_FLUSH_LOOK_S = 0.005
#: Methods of which the wire reads plain messages, and how it knows them.
_PLAIN = {
    "/stepwell.v1.SessionService/Step": "step",
    "/stepwell.v1.SessionService/StepStream": "step_stream",
    "/inference.GRPCInferenceService/ModelInfer": "infer",
    "/inference.GRPCInferenceService/ModelStreamInfer": "infer_stream",
}
#: A status as the wire knows it: code, message, details, and whether the call may go elsewhere.
_WireStatus = tuple[int, str, bytes, bool]
_OK: _WireStatus = (0, "", b"", False)
# The numbers that tell what has come: see `tuple` in python/front.rs.
_BATCH, _CALL, _MESSAGE, _TOO_LARGE, _DUPLICATE, _HALF_CLOSED, _WRITTEN, _ENDED, _REFUSED, _JUDGE, _BREACH = (
    range(11)
)
#: What the log says of connections that cannot be taken, by the reason that the metric has.
_REFUSED_LOG = {
    "connections": "connections are refused: there are as many as may be (--max-connections)",
    "address_connections": "connections are refused: there are as many of an address as may be"
    " (--max-connections-per-address)",
    "evicted": "connections that do nothing are closed for new ones: there are as many as may be (--max-connections)",
    "open_files": "connections wait: no more files can be opened (ulimit -n)",
}
_NOBODY: Members = np.zeros(0, np.intp)
_NO_TIMES: F64 = np.zeros(0)
_ANYBODY = [ANYBODY]


class _Call:
    """A call as the wire hands it over. `base.Call`."""

    def __init__(
        self, handle: CallHandle, request: bytes | None, identified: Callable[[str, Caller], None]
    ) -> None:
        self._handle = handle
        self._who = ANYBODY
        self._identified = identified
        """Is told who calls over the connection."""
        self.caller = handle.peer
        self.certificate_names = handle.certificate_names
        self.deadline = handle.deadline
        self.request = request or b""
        self.refusal: ServerError | None = None
        self.task: asyncio.Task[None] | None = None
        self._messages: collections.deque[bytes | ServerError | None] = collections.deque()
        self._numbers: collections.deque[int] = collections.deque()
        """Of messages that have no reply yet, where replies leave in their order."""
        self._taken = 0
        """Messages that were read, of which the wire does not know."""
        self._reader: asyncio.Future[None] | None = None
        self._ahead = 0
        self._room: asyncio.Future[None] | None = None

    @property
    def who(self) -> Caller:
        return self._who

    @who.setter
    def who(self, who: Caller) -> None:
        self._who = who
        self._handle.identified(
            _identity(who)
        )  # its messages are taken in, and those of a stream may be plain
        self._identified(self.caller, who)

    @property
    def is_late(self) -> bool:
        return self._handle.is_late

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        return dict(self._handle.metadata)

    @property
    def metadata_keys(self) -> Sequence[str]:
        return self._handle.metadata_keys

    async def read(self) -> bytes | None:
        while not self._messages:
            if self._taken:
                # from now on plain messages need not wait behind those that were read here
                self._handle.read(self._taken)
                self._taken = 0
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        message = self._messages.popleft()
        self._taken += 1
        if isinstance(message, ServerError):
            raise message
        return message

    async def write(self, reply: bytes) -> None:
        self._handle.write(reply, self._numbers.popleft() if self._numbers else None)
        self._ahead += len(reply)
        while self._ahead > _AHEAD_BYTES:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def came(self, message: bytes | ServerError | None, number: int | None = None) -> None:
        """A message of the client, and the number of its reply where those leave in order; None: there are no more.

        An error stands for one that breaks a rule.
        """
        self._messages.append(message)
        if number is not None:
            self._numbers.append(number)
        _wake(self._reader)

    def written(self, count: int) -> None:
        """So many bytes of replies are on their way."""
        self._ahead -= count
        _wake(self._room)


class _Replies:
    """`base.ColumnReplies` of a batch that the wire has handed over."""

    def __init__(self, batch: BatchHandle) -> None:
        self._batch = batch

    def applied(
        self,
        members: Members | None,
        revisions: U64,
        positions: U64,
        outputs: Sequence[OutputColumn],
        *,
        replayed: bool,
        model_version: int,
    ) -> Ended:
        """See `base.ColumnReplies`."""
        some = None if members is None else members.astype(np.uint32).tobytes()
        columns = (revisions.tobytes(), positions.tobytes(), outputs)
        return Ended(*map(_times, self._batch.applied(some, *columns, replayed, model_version)))

    def failed(self, members: Members | None, status: Status, error: bytes) -> Ended:
        """See `base.ColumnReplies`."""
        some = None if members is None else members.astype(np.uint32).tobytes()
        return Ended(*map(_times, self._batch.failed(some, _wire_status(status), error)))

    def request(self, member: int) -> bytes:
        """See `base.ColumnReplies`."""
        return self._batch.request(member)

    def untraced(self) -> Sequence[int]:
        """See `base.ColumnReplies`."""
        return self._batch.untraced()

    def gone(self) -> Members:
        """See `base.ColumnReplies`."""
        gone = self._batch.gone()
        return np.array(gone, np.intp) if gone else _NOBODY


class NativeFront:
    """Serves methods by the wire in Rust, and hands on plain steps as columns. `base.Front`."""

    name = "native"

    def __init__(self, clock: Clock, limits: FrontLimits) -> None:
        self.limits = limits
        self._clock = clock
        self._file: SocketFile | None = None
        self._front: stepwell_front.Front | None = None
        self._methods: Sequence[Method] = ()
        self._steps: Steps
        self._calls: dict[int, _Call] = {}
        self._loop = asyncio.get_running_loop()
        self._known: stepwell_front.KnownCallers | None = None
        """None: nobody is asked."""
        self._arrivals = Arrivals(self._do, self._do_later, clock.monotonic)
        self._callers: RecentValues[str, Caller] = RecentValues(_CALLERS)
        """Who called last over each connection."""
        self._peers: dict[int, str] = {}
        """Connections of the calls that have come."""

    async def start(
        self,
        address: Address | UnixAddress,
        methods: Sequence[Method],
        steps: Steps,
        certificates: Certificates | None,
    ) -> Address | UnixAddress:
        """See `base.Front`."""
        self._methods, self._steps = methods, steps
        front = self._front = stepwell_front.Front(
            [
                (method.path, method.streams, _PLAIN.get(method.path, ""), method.is_open)
                for method in methods
            ],
            [[] if method.shape is None else method.shape.table for method in methods],
            self.limits.values,
            now=self._clock.monotonic,
            overloaded=_wire_status(steps.overloaded()),
            headers_too_large=_wire_status(steps.headers_too_large(self.limits.header_bytes)),
            callers=self._known,
        )
        if certificates is not None:
            self.secure(certificates)
        listeners, bound = await self._listen(address)
        front.set_traces(steps.traces)
        front.set_general(True)
        self._loop.add_reader(front.fd(), self._take, front)
        front.start([(one.detach(), isinstance(address, UnixAddress)) for one in listeners])
        return bound

    def set_plain(self, *, are_taken: bool) -> None:
        """See `base.Front`."""
        if self._front is not None:
            # where each message has a line in the log, none is plain
            self._front.set_general(not are_taken or _log.is_debug)

    def ask_callers(self) -> None:
        """See `base.Front`."""
        self._known = stepwell_front.KnownCallers()

    def know(self, credential: Credential, caller: Caller, until: float) -> None:
        """See `base.Front`."""
        if self._known is not None:
            prefix, identity = prefix_of(caller.tenant), _identity(caller)
            shown = (credential.digest, credential.names)
            self._known.know(*shown, prefix, identity, caller.may_step, caller, until)

    def forget(self, credentials: Collection[Credential]) -> None:
        """See `base.Front`."""
        if self._known is not None:
            for credential in credentials:
                self._known.forget(credential.digest, credential.names)

    def secure(self, certificates: Certificates) -> None:
        """See `base.Front`."""
        assert self._front is not None
        try:
            self._front.secure(certificates.chain, certificates.key, certificates.client_ca)
        except ValueError as error:
            which, reason = error.args
            raise Unusable(_OPTIONS[which], reason) from None

    def counts(self) -> FrontCounts:
        """See `base.Front`."""
        if self._front is None:
            return FrontCounts({}, {})
        now, refused, taken = self._front.counts()
        return FrontCounts(now, dict(refused), dict(taken))

    async def flush(self) -> None:
        """See `base.Front`."""
        while self._front is not None and self._front.unwritten():  # noqa: ASYNC110 - the wire's thread counts
            await asyncio.sleep(_FLUSH_LOOK_S)

    async def stop(self, grace_s: float) -> None:
        """See `base.Front`."""
        front = self._front
        if front is None:
            return
        front.drain()
        if self._file is not None:
            self._file.remove()
        await asyncio.to_thread(front.wait, grace_s)
        self._loop.remove_reader(front.fd())
        await asyncio.to_thread(front.close)
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(
        self, address: Address | UnixAddress
    ) -> tuple[list[socket.socket], Address | UnixAddress]:
        if isinstance(address, Address):
            sockets = await self._listen_on_port(address)
            return sockets, address._replace(port=sockets[0].getsockname()[1])
        try:
            listener = bind(address.path, _BACKLOG)
        except OSError as error:
            raise BindError(f"cannot listen on {address}: {error.strerror}") from error
        self._file = SocketFile(address.path)
        return [listener], address

    async def _listen_on_port(self, address: Address) -> list[socket.socket]:
        """Listen on each address that the name stands for, on the same port."""
        listeners: list[socket.socket] = []
        problem: OSError | None = None
        for family, _, _, _, where in await self._loop.getaddrinfo(*address, type=socket.SOCK_STREAM):
            place = (where[0], listeners[0].getsockname()[1], *where[2:]) if listeners else where
            try:
                listener = socket.create_server(place, family=family, backlog=_BACKLOG)
            except OSError as error:
                problem = error
                continue
            listener.setblocking(False)
            listeners.append(listener)
        if not listeners:
            raise BindError(
                f"cannot listen on {address}: it is in use or not an address of this machine"
            ) from problem
        return listeners

    def _take(self, front: stepwell_front.Front) -> None:
        """Do what has come, in its order. What came behind messages that tasks have to look at waits for that."""
        self._run(lambda: self._take_all(front))

    def _take_all(self, front: stepwell_front.Front) -> None:
        most = _MAX_TAKES
        while most:
            try:
                taken = front.take()
            except RuntimeError as error:
                self._end(front, error)
                break
            if not taken:
                break
            for arrival in taken:
                self._add(arrival, is_all=len(taken) == 1)
            # a connection that sends much must not hide the others; one that is alone has passes run in between
            most = most - 1 if self._arrivals.is_contended else 0

    def _run(self, work: Callable[[], None], *, is_large: bool = False) -> None:
        """Do something, then what may be done after it, then a pass: in another iteration if it was large."""
        try:
            work()
            self._arrivals.go_on()
        finally:
            if not is_large:
                self._steps.go()
            if self._arrivals.has_due:  # something raised: what came behind it must not wait for ever
                self._go_on_soon()

    def _go_on_soon(self) -> None:
        self._steps.add_part((*_ARRIVALS, "", "", ""), lambda: self._run(lambda: None))

    def _do_later(self, kind: Kind, peers: Collection[str], work: Callable[[], None]) -> None:
        """Do a part of the large work of some connections."""
        peer = next(iter(peers)) if len(peers) == 1 else ""  # batches of several have a share of their own
        who = self._callers.get(peer)
        whose = ("", "") if who is None else (who.tenant, who.name)
        self._steps.add_part((*_ARRIVALS, *whose, peer), lambda: self._run(work, is_large=kind is Kind.BATCH))

    def _end(self, front: stepwell_front.Front, error: RuntimeError) -> None:
        # better no server than one that looks ready and answers nobody
        self._loop.remove_reader(front.fd())
        _log.defect("the front has ended, and so does the server", error)
        signal.raise_signal(signal.SIGTERM)

    def _add(self, arrival: tuple[Any, ...], *, is_all: bool = False) -> None:
        tag = arrival[0]
        if tag == _BATCH:
            callers = arrival[3]
            peers: Collection[str] = callers if len(callers) == 1 else set(callers)
            if arrival[4] is not None:
                self._callers_of(peers, callers, arrival[4])
            self._arrivals.add(Kind.BATCH, peers, arrival, len(arrival[2]), is_all=is_all)
        elif tag == _CALL or (tag == _BREACH and not arrival[2].streams):
            peer = self._peers[arrival[1]] = arrival[2].peer
            self._arrivals.add(Kind.TASK, (peer,), arrival)
        elif tag == _JUDGE:
            self._arrivals.add(Kind.TASK, (arrival[1].peer,), arrival)
        elif tag == _REFUSED:
            _log.warning(_REFUSED_LOG[arrival[1]], **self.counts().now)
        else:
            kind = Kind.TASK if tag in {_MESSAGE, _BREACH} else Kind.EVENT
            self._arrivals.add(kind, (self._peer_of(arrival[1]),), arrival)

    def _callers_of(self, peers: Collection[str], callers: list[str], whos: list[Caller]) -> None:
        """Learn who calls, of a batch."""
        for peer in peers:
            if self._callers.get(peer) is None:
                self._callers.put(peer, whos[callers.index(peer) if len(whos) > 1 else 0])

    def _peer_of(self, key: int) -> str:
        """The connection of a call, which may not have begun yet."""
        return self._peers.get(key, "")

    def _do(self, arrival: tuple[Any, ...]) -> None:
        tag = arrival[0]
        if tag == _BATCH:
            rest = self._steps.take(_columns_of(*arrival[1:]))
            if rest is not None:
                self._do_rest(rest, set(arrival[3]))
            return
        if tag == _JUDGE:
            self._judge(arrival[1])
            return
        self._tell(*arrival)
        if tag in {_CALL, _MESSAGE, _BREACH}:
            peer = self._peer_of(arrival[1])
            self._arrivals.looking(peer)
            self._loop.call_soon(self._looked, peer)  # when the task that was notified has run

    def _looked(self, peer: str) -> None:
        self._arrivals.looked(peer)
        if self._arrivals.has_due:
            self._run(lambda: None)

    def _do_rest(self, rest: Rest, peers: Collection[str]) -> None:
        """Do what is left of a batch in other iterations. What came behind it over its connections waits."""
        self._arrivals.hold(peers)

        def go_on() -> None:
            if rest():
                self._do_later(Kind.EVENT, peers, go_on)
            else:
                self._arrivals.release(peers)

        self._do_later(Kind.EVENT, peers, go_on)

    def _judge(self, handle: CallHandle) -> None:
        """Say whether the message of a call is taken in."""
        judge = self._methods[handle.method].judge
        try:
            if judge is not None:
                judge(_Call(handle, None, self._callers.put))
        except CallEnded as ended:
            handle.end(_wire_status(ended.status))
        else:
            handle.admit()

    def _tell(self, tag: int, key: int, *rest: Any) -> None:
        """Let the task of a call know."""
        if tag == _CALL:
            self._begin(key, *rest)
            return
        if tag == _BREACH:
            self._refuse(key, *rest)
            return
        if tag == _DUPLICATE:
            handle, frame_id = rest
            handle.write(self._steps.duplicate(frame_id))
            return
        if tag == _TOO_LARGE:
            handle, size = rest
            is_open = self._methods[handle.method].is_open
            limit = min(self.limits.message_bytes, self.limits.open_message_bytes) if is_open else None
            handle.end(_wire_status(self._steps.too_large(size, limit)))
        call = self._calls.get(key)
        if call is None:  # it has had its end meanwhile
            return
        if tag == _MESSAGE:
            call.came(*rest)
        elif tag == _HALF_CLOSED:
            call.came(None)
        elif tag == _WRITTEN:
            call.written(rest[0])
        elif call.task is not None:
            call.task.cancel()

    def _begin(self, key: int, handle: CallHandle, request: bytes | None) -> None:
        call = self._calls[key] = _Call(handle, request, self._callers.put)
        call.task = self._loop.create_task(self._serve(call, handle))
        # not in the task: one that is cancelled before it begins runs nothing of its own
        call.task.add_done_callback(lambda _: self._forget(key))

    def _refuse(self, key: int, handle: CallHandle, rule: int, size: int) -> None:
        """A message breaks a rule of its method's shape: the only one of a call, or one of a stream."""
        shape = self._methods[handle.method].shape
        assert shape is not None
        error = shape.error(rule, size)
        call = self._calls.get(key)
        if handle.streams:
            if call is not None:
                call.came(error)
            return
        self._begin(key, handle, None)
        self._calls[key].refusal = error

    def _forget(self, key: int) -> None:
        del self._peers[key]
        self._calls.pop(key).task = None  # a task that was cancelled holds its frames, and they the call

    async def _serve(self, call: _Call, handle: CallHandle) -> None:
        try:
            method = self._methods[handle.method]
            reply = await method.serve(call)
            if method.streams:
                handle.end(_OK)
            else:
                handle.finish(reply)
        except CallEnded as ended:
            handle.end(_wire_status(ended.status))


def _columns_of(
    batch: BatchHandle,
    session_ids: list[str],
    callers: list[str],
    whos: list[Caller] | None,
    numbers: tuple[bytes, bytes, bytes, bytes, bytes],
    asked: tuple[int, list[str], bool, tuple[str, str] | None],
    tensors: list[tuple[str, int, list[int], bytes]],
) -> StepColumns:
    """A batch as `base.Steps` takes it. The arguments are those of the tuple of `python/front.rs`."""
    counts, sizes, expected, request_ids, deadlines = numbers
    select, output_names, says_sizes, model = asked
    return StepColumns(
        session_ids,
        callers,
        _ANYBODY if whos is None else whos,
        np.frombuffer(sizes, np.uint32),
        says_sizes,
        np.frombuffer(expected, np.uint64) if expected else None,
        np.frombuffer(request_ids, np.uint64) if request_ids else None,
        np.frombuffer(deadlines, np.float64),
        select,
        output_names,
        [InputColumn(*tensor) for tensor in tensors],
        np.frombuffer(counts, np.uint32),
        _Replies(batch),
        model,
    )


def _wire_status(status: Status) -> _WireStatus:
    """A status as the wire takes it."""
    details = next((value for _, value in status.trailers), b"")
    return int(status.code), status.message, details, status.may_go_elsewhere


def _times(raw: bytes) -> F64:
    return np.frombuffer(raw, np.float64) if raw else _NO_TIMES


def _identity(caller: Caller) -> str:
    """Tells a caller from all others, on the wire's thread too."""
    return SEPARATOR.join((caller.tenant, caller.name, caller.role.value))


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
