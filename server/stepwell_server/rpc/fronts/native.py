"""The native front: the only module that imports the package `stepwell_front`, whose sources are in `server/front`."""

from __future__ import annotations

import asyncio
import collections
import functools
import signal
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import stepwell_front

from stepwell.v1.tensors_pb2 import DataType
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.clock import Clock
from stepwell_server.core.callers import ANYBODY, Caller, Credential
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.core.namespaces import SEPARATOR, prefix_of
from stepwell_server.core.recent_values import RecentValues
from stepwell_server.engine.api import Select, StepBatch, StepKernel, StepRules
from stepwell_server.engine.types import U64, Array, Members
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.program import TensorSpec, dtype_of
from stepwell_server.rpc.fronts.arrivals import Arrivals, Kind
from stepwell_server.rpc.fronts.base import (
    F64,
    SECONDS,
    BindError,
    CallEnded,
    Durations,
    Ended,
    FrontCounts,
    HttpAnswer,
    HttpDoor,
    HttpListener,
    InputColumn,
    JsonCodec,
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
#: Version of the interface between this module and the crate. Raise it with every change, here and in `python/front.rs`.
_INTERFACE = 18
_installed = getattr(stepwell_front, "INTERFACE", 0)
if _installed != _INTERFACE:
    raise OtherFront(
        f"stepwell-front must have interface {_INTERFACE}; the installed one, {VERSION}, has {_installed}, because it was"
        " built from other sources"
    )
_log = Log("rpc.front")
#: Bytes of unwritten replies from which a stream's writer waits.
_MAX_UNWRITTEN_BYTES = 64 << 10
_BACKLOG = 1024
#: The option for each part of the certificates.
_OPTIONS: Mapping[str, Option] = {
    "certificate": "--tls-cert",
    "key": "--tls-key",
    "client_ca": "--tls-client-ca",
}
#: How often to ask the crate for more arrivals in one iteration of the event loop, while several connections are active.
_MAX_TAKES = 16
#: The same in seconds: steps may run as soon as they are taken.
_MAX_TAKE_S = 200e-6
#: The source of arrivals, for the scheduling of large work.
_ARRIVALS = ("arrivals",)
#: Number of connections whose callers are remembered.
_CALLERS = 10_000
_FLUSH_LOOK_S = 0.005
#: Methods whose messages the crate parses itself, with its names for them.
_PLAIN = {
    "/stepwell.v1.SessionService/Step": "step",
    "/stepwell.v1.SessionService/StepStream": "step_stream",
    "/inference.GRPCInferenceService/ModelInfer": "infer",
    "/inference.GRPCInferenceService/ModelStreamInfer": "infer_stream",
}
#: A status for the crate: code, message, details, and whether another replica may serve the call.
_WireStatus = tuple[int, str, bytes, bool]
_OK: _WireStatus = (0, "", b"", False)
# Kinds of arrivals: see `tuple` in python/front.rs.
_BATCH, _CALL, _MESSAGE, _TOO_LARGE, _DUPLICATE, _HALF_CLOSED, _WRITTEN, _ENDED, _REFUSED, _JUDGE, _BREACH = (
    range(11)
)
#: Log messages about connections, by the reason in the metric.
_REFUSED_LOG = {
    "connections": "connections are refused: the limit is reached (--max-connections)",
    "address_connections": "connections are refused: the limit for one address is reached (--max-connections-per-address)",
    "evicted": "idle connections are closed for new ones: the limit is reached (--max-connections)",
    "open_files": "connections wait: the limit of open files is reached (ulimit -n)",
}
#: The bits of a float that are all set if it is not finite.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80 << 16, "float64": 0x7FF0 << 48}
#: The selections of outputs, by their numbers in the protocol.
_SELECTIONS = (Select.ALL, Select.ALL, Select.LAST, Select.NONE)
_NOBODY: Members = np.zeros(0, np.intp)
_NO_TIMES: F64 = np.zeros(0)
_ANYBODY = [ANYBODY]


class _Call:
    """A call from the crate. Implements `base.Call`."""

    def __init__(
        self, handle: CallHandle, request: bytes | None, identified: Callable[[str, Caller], None]
    ) -> None:
        self._handle = handle
        self._who = ANYBODY
        self._identified = identified
        """Called with the connection and its caller."""
        self.caller = handle.peer
        self.certificate_names = handle.certificate_names
        self.deadline = handle.deadline
        self.request = request or b""
        self.refusal: ServerError | None = None
        self.task: asyncio.Task[None] | None = None
        self._messages: collections.deque[bytes | ServerError | None] = collections.deque()
        self._numbers: collections.deque[int] = collections.deque()
        """Numbers of unanswered messages, if replies are sent in order."""
        self._taken = 0
        """Messages that were read and not yet reported to the crate."""
        self._reader: asyncio.Future[None] | None = None
        self._unwritten = 0
        self._room: asyncio.Future[None] | None = None

    @property
    def who(self) -> Caller:
        return self._who

    @who.setter
    def who(self, who: Caller) -> None:
        self._who = who
        self._handle.identified(
            _identity(who)
        )  # the crate then accepts its messages, and may pass those of a stream as columns
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
                # from now on, messages as columns need not wait for those that were read here
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
        await self._await_room(len(reply))

    async def _await_room(self, size: int) -> None:
        """Return when few bytes are unwritten, of which these have just been sent."""
        self._unwritten += size
        while self._unwritten > _MAX_UNWRITTEN_BYTES:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def came(self, message: bytes | ServerError | None, number: int | None = None) -> None:
        """A message arrived, with the number of its reply if replies are sent in order. None: the client has ended.

        An error stands for a message that breaks a rule.
        """
        self._messages.append(message)
        if number is not None:
            self._numbers.append(number)
        _wake(self._reader)

    def written(self, count: int) -> None:
        """This many bytes of replies were written."""
        self._unwritten -= count
        _wake(self._room)


class _HttpCall(_Call):
    """An HTTP request from the crate. Implements `base.HttpCall`."""

    def begin(self, answer: HttpAnswer) -> None:
        self._handle.respond(answer, has_more=True)
        self._unwritten += len(answer.body)

    async def write(self, reply: bytes) -> None:
        self._handle.send(reply)
        await self._await_room(len(reply))


class _Replies:
    """The replies to a batch from the crate. Implements `base.ColumnReplies`."""

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


class _Json:
    """The crate's JSON. Implements `base.JsonCodec`."""

    def read(self, body: bytes, max_fields: int) -> Any:
        """See `base.JsonCodec`."""
        return stepwell_front.read_json(body, max_fields)

    def numbers(self, doubles: bytes) -> str:
        """See `base.JsonCodec`."""
        return stepwell_front.numbers_as_json(doubles)


class NativeFront:
    """Serves methods with the crate in Rust, which passes steps as columns. Implements `base.Front`."""

    name = "native"
    json: JsonCodec | None = _Json()

    def __init__(self, clock: Clock, limits: FrontLimits) -> None:
        self.limits = limits
        self._clock = clock
        self._file: SocketFile | None = None
        self._front: stepwell_front.Front | None = None
        self.http_address: Address | None = None
        self._methods: Sequence[Method] = ()
        self._door: HttpDoor | None = None
        """Serves the calls whose method is the one behind `_methods`."""
        self._steps: Steps
        self._calls: dict[int, _Call] = {}
        self._loop = asyncio.get_running_loop()
        self._known: stepwell_front.KnownCallers | None = None
        """None: callers are not authenticated."""
        self._arrivals = Arrivals(self._do, self._defer, clock.monotonic)
        self._callers: RecentValues[str, Caller] = RecentValues(_CALLERS)
        """The latest caller on each connection."""
        self._peers: dict[int, str] = {}
        """Connections of the received calls."""
        self._has_new = False
        """Something arrived that a pass may be needed for."""

    async def start(
        self,
        address: Address | UnixAddress,
        methods: Sequence[Method],
        steps: Steps,
        certificates: Certificates | None,
        http: HttpListener | None = None,
    ) -> Address | UnixAddress:
        """See `base.Front`."""
        self._methods, self._steps = methods, steps
        self._door = None if http is None else http.door
        overloaded = steps.overloaded()
        front = self._front = stepwell_front.Front(
            [
                (method.path, method.streams, _PLAIN.get(method.path, ""), method.is_open)
                for method in methods
            ],
            [[] if method.shape is None else method.shape.table for method in methods],
            self.limits.values,
            now=self._clock.monotonic,
            seconds=SECONDS,
            overloaded=_wire_status(overloaded),
            headers_too_large=_wire_status(steps.headers_too_large(self.limits.header_bytes)),
            callers=self._known,
            door=None if self._door is None else _wire_door(self._door, self.limits, overloaded),
        )
        if certificates is not None:
            self.secure(certificates)
        listeners, bound = await self._listen(address)
        kind = "unix" if isinstance(address, UnixAddress) else "tcp"
        given = [(one, kind) for one in listeners]
        if http is not None:
            listeners = await self._listen_on_port(http.address, "--http-listen")
            self.http_address = http.address._replace(port=listeners[0].getsockname()[1])
            given += [(one, "http") for one in listeners]
        front.set_traces(steps.traces)
        front.set_general(True)
        self._loop.add_reader(front.fd(), self._run, functools.partial(self._take_all, front))
        front.start([(one.detach(), kind) for one, kind in given])
        return bound

    def set_fast_path(self, *, enabled: bool) -> None:
        """See `base.Front`."""
        if self._front is not None:
            # if every message is logged, every message must be a call
            self._front.set_general(not enabled or _log.is_debug)

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

    def take_durations(self) -> tuple[Durations, Durations] | None:
        """See `base.Front`."""
        if self._front is None:
            return None
        calls, messages = self._front.take_durations()
        return calls, messages

    async def flush(self) -> None:
        """See `base.Front`."""
        while self._front is not None and self._front.unwritten():  # noqa: ASYNC110 - the crate's thread counts
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

    async def _listen_on_port(self, address: Address, option: str = "--listen") -> list[socket.socket]:
        """Listen on each address of the host name, on the same port."""
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
                f"cannot listen on {address}: it is in use or not an address of this machine", option
            ) from problem
        return listeners

    def _take_all(self, front: stepwell_front.Front) -> None:
        """Process all arrivals in order. Those behind messages for tasks wait for the tasks."""
        until = self._clock.monotonic() + _MAX_TAKE_S
        takes_left = _MAX_TAKES
        while takes_left:
            try:
                taken = front.take()
            except RuntimeError as error:
                self._end(front, error)
                break
            if not taken:
                break
            self._steps.settle()
            for arrival in taken:
                self._add(arrival, is_all=len(taken) == 1)
            # a busy connection must not hide the others; for a single active one, passes run in between
            is_over = not self._arrivals.is_contended or self._clock.monotonic() > until
            takes_left = 0 if is_over else takes_left - 1

    def _run(self, work: Callable[[], None], *, is_large: bool = False) -> None:
        """Do some work, then process the arrivals that are due, then run a pass unless the work was large.

        If every arrival was answered at once, passes that wait have their own part of the loop's next iteration. They do
        not run here too: steps that arrive meanwhile would wait for both.
        """
        try:
            work()
            if self._arrivals.due:
                self._arrivals.run_due()
        finally:
            has_new, self._has_new = self._has_new, False
            if has_new and not is_large:
                self._steps.go()
            if self._arrivals.due:  # an exception was raised: later arrivals must not wait for ever
                self._run_due_soon()

    def _run_due_soon(self) -> None:
        self._steps.add_part((*_ARRIVALS, "", "", ""), lambda: self._run(lambda: None))

    def _defer(self, kind: Kind, peers: Collection[str], work: Callable[[], None]) -> None:
        """Schedule a part of the large work of some connections."""
        peer = (
            next(iter(peers)) if len(peers) == 1 else ""
        )  # batches of several connections have their own share
        who = self._callers.get(peer)
        owner = ("", "") if who is None else (who.tenant, who.name)
        self._steps.add_part((*_ARRIVALS, *owner, peer), lambda: self._run(work, is_large=kind is Kind.BATCH))

    def _end(self, front: stepwell_front.Front, error: RuntimeError) -> None:
        # a server that looks ready but answers nobody is worse than none
        self._loop.remove_reader(front.fd())
        _log.defect("the native front has failed, the server ends", error)
        signal.raise_signal(signal.SIGTERM)

    def _add(self, arrival: tuple[Any, ...], *, is_all: bool = False) -> None:
        tag = arrival[0]
        if tag == _BATCH:
            _, _, size, _, _, peers, whos, _ = arrival
            if whos is not None:
                self._remember(peers, whos)
            self._arrivals.add(Kind.BATCH, peers, arrival, size, is_all=is_all)
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

    def _remember(self, peers: Sequence[str], whos: Sequence[Caller]) -> None:
        """Remember the callers of a batch's connections."""
        for peer, who in zip(peers, whos, strict=True):
            if self._callers.get(peer) is None:
                self._callers.put(peer, who)

    def _peer_of(self, key: int) -> str:
        """Return the connection of a call; empty if the call has not started yet."""
        return self._peers.get(key, "")

    def _do(self, arrival: tuple[Any, ...]) -> None:
        tag = arrival[0]
        if tag == _BATCH:
            _, handle, size, _, first_id, peers, whos, has_one_caller = arrival
            caller = (ANYBODY if whos is None else whos[0]) if has_one_caller else None
            batch = StepBatch(handle, size, first_id, peers, caller, _new_kernel)
            if self._steps.run(batch, lambda: _columns_of(handle, *handle.columns())):
                return
            self._has_new = True
            rest = self._steps.take(_columns_of(handle, *handle.columns()))
            if rest is not None:
                self._do_rest(rest, peers)
            return
        self._has_new = True
        if tag == _JUDGE:
            self._judge(arrival[1])
            return
        self._notify(*arrival)
        if tag in {_CALL, _MESSAGE, _BREACH}:
            peer = self._peer_of(arrival[1])
            self._arrivals.task_started(peer)
            self._loop.call_soon(self._task_ended, peer)  # after the notified task has run

    def _task_ended(self, peer: str) -> None:
        self._arrivals.task_ended(peer)
        if self._arrivals.due:
            self._run(lambda: None)

    def _do_rest(self, rest: Rest, peers: Collection[str]) -> None:
        """Process the rest of a batch in later iterations. Later arrivals on its connections wait."""
        self._arrivals.hold(peers)

        def run_rest() -> None:
            if rest():
                self._defer(Kind.EVENT, peers, run_rest)
            else:
                self._arrivals.release(peers)

        self._defer(Kind.EVENT, peers, run_rest)

    def _judge(self, handle: CallHandle) -> None:
        """Decide whether the message of a call is accepted."""
        if self._is_http(handle):
            self._judge_request(handle)
            return
        judge = self._methods[handle.method].judge
        try:
            if judge is not None:
                judge(_Call(handle, None, self._callers.put))
        except CallEnded as ended:
            handle.end(_wire_status(ended.status))
        else:
            handle.admit()

    def _judge_request(self, handle: CallHandle) -> None:
        """Decide whether the body of an HTTP request is accepted."""
        assert self._door is not None
        answer = self._door.judge(_HttpCall(handle, None, self._callers.put))
        if answer is None:
            handle.admit()
        else:
            handle.respond(answer)

    def _is_http(self, handle: CallHandle) -> bool:
        return handle.method == len(self._methods)

    def _notify(self, tag: int, key: int, *rest: Any) -> None:
        """Pass an arrival to the task of its call."""
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
        if call is None:  # the call has ended meanwhile
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
        call: _Call
        if self._is_http(handle):
            call = _HttpCall(handle, request, self._callers.put)
            serving = self._serve_http(call, handle)
        else:
            call = _Call(handle, request, self._callers.put)
            serving = self._serve(call, handle)
        self._calls[key] = call
        call.task = self._loop.create_task(serving)
        # not in the task itself, because a task that is cancelled before it starts runs no code
        call.task.add_done_callback(lambda _: self._forget(key))

    def _refuse(self, key: int, handle: CallHandle, rule: int, size: int) -> None:
        """A message of a call or of a stream breaks a rule of its method's shape."""
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
        self._calls.pop(
            key
        ).task = None  # breaks a cycle: a cancelled task keeps its frames, which refer to the call

    async def _serve_http(self, call: _HttpCall, handle: CallHandle) -> None:
        assert self._door is not None
        answer = await self._door.serve(call)
        if answer is None:
            handle.end(_OK)
        else:
            handle.respond(answer)

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


def _new_kernel(rules: StepRules) -> StepKernel:
    """See `NewKernel`."""

    def spec(tensor: TensorSpec) -> tuple[str, int, list[int], bool, int, int, int]:
        bits = _EXPONENTS.get(tensor.dtype, 0)
        size = dtype_of(tensor.dtype).itemsize
        number = DataType.Value(f"DATA_TYPE_{tensor.dtype.upper()}")
        return tensor.name, number, list(tensor.shape), tensor.temporal, tensor.row_bytes, size, bits

    def rows(arrays: Sequence[Array], gaps: Sequence[int]) -> list[tuple[Array, int, int, int]]:
        return [
            (array, array.nbytes // len(array), array.shape[1] if gap else 0, gap)
            for array, gap in zip(arrays, gaps, strict=True)
        ]

    kernel: StepKernel = stepwell_front.StepKernel(
        rules.handles,
        rules.model,
        [spec(tensor) for tensor in rules.inputs],
        [spec(tensor) for tensor in rules.outputs],
        rows(rules.states, rules.gaps),
        rows(rules.kept, [0] * len(rules.kept)),
        rules.steps,
        rules.digest_weights,
        rules.digest_prefix,
        [rules.digest_seeds[select] for select in _SELECTIONS],
        rules.texts,
        rules.fields,
        rules.fields_of,
    )
    return kernel


def _columns_of(
    batch: BatchHandle,
    session_ids: tuple[str, ...],
    callers: list[str],
    whos: list[Caller] | None,
    numbers: tuple[bytes, bytes, bytes, bytes, bytes],
    asked: tuple[int, list[str], bool, tuple[str, str] | None],
    tensors: list[tuple[str, int, list[int], bytes]],
) -> StepColumns:
    """Return a batch for `base.Steps`. The arguments are what `columns` in `python/batch.rs` returns."""
    counts, sizes, expected, request_ids, deadlines = numbers
    select, output_names, has_sizes, model = asked
    return StepColumns(
        session_ids,
        callers,
        _ANYBODY if whos is None else whos,
        np.frombuffer(sizes, np.uint32),
        has_sizes,
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
    """Return a status for the crate."""
    details = next((value for _, value in status.trailers), b"")
    return int(status.code), status.message, details, status.may_go_elsewhere


def _wire_door(door: HttpDoor, limits: FrontLimits, overloaded: Status) -> tuple[int, dict[str, HttpAnswer]]:
    """Return the settings of HTTP for the crate."""
    return door.max_body_bytes, dict(door.refusals(limits, overloaded))


def _times(raw: bytes) -> F64:
    return np.frombuffer(raw, np.float64) if raw else _NO_TIMES


def _identity(caller: Caller) -> str:
    """Return a unique identifier of a caller."""
    return SEPARATOR.join((caller.tenant, caller.name, caller.role.value))


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
