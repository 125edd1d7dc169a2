"""The interface of a front, and of the calls that it hands to servicers: bytes, a caller, a deadline, ways to reply."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.core.callers import Caller, Credential
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.core.scheduler import Source
from stepwell_server.engine.api import StepBatch
from stepwell_server.engine.types import U64, Members
from stepwell_server.errors import ServerError
from stepwell_server.rpc.fronts.certificates import Certificates
from stepwell_server.rpc.fronts.shape import Shape
from stepwell_server.rpc.status import Status

F64 = npt.NDArray[np.float64]
#: Bounds of counted durations: from a step that runs alone to the longest time that callers wait.
SECONDS = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0
)  # fmt: skip
Durations: TypeAlias = tuple[Sequence[int], float]
"""Numbers of durations up to each of `SECONDS`, of longer ones, and the sum of all."""


class BindError(Exception):
    """A front cannot listen on the given address."""

    def __init__(self, message: str, option: str = "--listen") -> None:
        super().__init__(message)
        self.option = option
        """The option that gives the address."""


class OtherFront(ImportError):
    """The installed native front was built from other sources than this server."""


class CallEnded(Exception):
    """The call ends with this status, without a reply."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.code.name, status.message)
        self.status = status


class Call(Protocol):
    """A running call. A task serves it, which the front cancels when the client leaves or the deadline passes."""

    who: Caller
    """The authenticated caller. The boundary sets it before the call is served. Only then does a front accept the call's
    messages, and may pass those of a stream as columns. Until then it is `ANYBODY`."""
    request: bytes
    """The request of a unary call. Empty for streams, and after it was parsed."""
    refusal: ServerError | None
    """The error of a unary request that breaks a rule of the method's shape. `request` is then empty."""

    @property
    def caller(self) -> str:
        """The connection's identifier, the same for all its calls."""

    @property
    def certificate_names(self) -> Sequence[str]:
        """The alternative names in the client certificate, else its common name. Empty without client certificates.

        They are not part of `caller`, because scheduling is fair between connections, whoever uses them.
        """

    @property
    def deadline(self) -> float:
        """Deadline on the monotonic clock; infinity if there is none."""

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """The call's metadata by lower-case key, with the last value of each key."""

    @property
    def metadata_keys(self) -> Sequence[str]:
        """All keys of the metadata, with repetitions."""

    async def read(self) -> bytes | None:
        """Return the next request of a stream; None after the client's last one.

        Raises:
            InvalidInput: it breaks a rule of the method's shape.
        """

    def write(self, reply: bytes) -> Coroutine[Any, Any, None]:
        """Send a reply of a stream. The coroutine starts the write, and ends when the reply is on its way."""


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """One method of a service."""

    service: str
    """Full name, `stepwell.v1.SessionService`."""
    name: str
    serve: Callable[[Call], Awaitable[bytes]]
    """Serves a call. Returns the reply of a unary call, and an empty value for a stream.

    Raises `CallEnded`, or `asyncio.CancelledError` if the front cancelled the task; nothing else.
    """
    shape: Shape | None = None
    """Limits of a request, which a front checks before it hands over the bytes. None: no limits."""
    streams: bool = False
    """Whether it reads requests and writes replies as streams. False: one of each."""
    is_open: bool = False
    """Whether it needs no authentication and is always served, such as a health check."""
    judge: Callable[[Call], None] | None = None
    """Checks a call by its metadata, before a front that can wait accepts its message. None: `serve` checks it.

    Raises `CallEnded` if the call is refused, else sets `Call.who`.
    """

    @property
    def path(self) -> str:
        """Its path in a request."""
        return f"/{self.service}/{self.name}"


class OutputColumn(NamedTuple):
    """An output tensor of a reply, with the rows of the answered members in order."""

    name: str
    dtype: int
    """A `stepwell.v1.DataType`."""
    tail: Sequence[int]
    """The shape without the rows."""
    data: bytes


class InputColumn(NamedTuple):
    """An input tensor of steps, with their rows in order."""

    name: str
    dtype: int
    """A `stepwell.v1.DataType`, except bool."""
    tail: Sequence[int]
    """The shape without the rows."""
    data: bytes


class Ended(NamedTuple):
    """Arrival times, on the monotonic clock, of the messages that were just answered completely."""

    calls: F64
    """Arrival times of unary calls."""
    messages: F64
    """Arrival times of messages on streams."""


class ColumnReplies(Protocol):
    """Sends the replies to a batch of steps. Each session of the batch is answered once, in any order."""

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
        """Answer sessions that were stepped, all on one version of their model.

        Args:
            members: Ascending indexes of the sessions; None: all.
            revisions: One per session.
            positions: One per session.
            outputs: Outputs, with the sessions' rows in order.
            replayed: Whether these are remembered replies.
            model_version: Number of the version; 0: leave it out of replies in Stepwell's own protocol.
        """

    def failed(self, members: Members | None, status: Status, error: bytes) -> Ended:
        """Answer sessions that were not stepped. `members` as for `applied`.

        Calls end with the status. Streams get `error`: a serialized `stepwell.v1.Error`, or Triton's message.
        """

    def request(self, member: int) -> bytes:
        """Return the bytes of a Triton request that is not answered yet."""

    def untraced(self) -> Sequence[int]:
        """Return the indexes of unary calls whose metadata asks not to be traced."""

    def gone(self) -> Members:
        """Return the sessions whose callers no longer wait."""


@dataclasses.dataclass(slots=True)
class StepColumns:
    """Steps of one protocol that arrived at the same time, as columns.

    A session may occur more than once. Its steps are then applied in that order.
    """

    session_ids: Sequence[str]
    """Internal ids, with the tenants' prefixes."""
    callers: list[str]
    """`Call.caller` per session, or a single one for a single message."""
    whos: Sequence[Caller]
    """`Call.who` per session, or a single one for all."""
    sizes: npt.NDArray[np.uint32]
    """Number of rows of each session in the tensors."""
    has_sizes: bool
    """Whether the messages contain the sizes. False: they follow from the tensors."""
    expected: U64 | None
    request_ids: U64 | None
    deadlines: F64
    """One per session, on the monotonic clock."""
    select: int
    """A `stepwell.v1.OutputSelection`."""
    output_names: Sequence[str]
    inputs: Sequence[InputColumn]
    counts: npt.NDArray[np.uint32]
    """Number of sessions in each message, in order."""
    replies: ColumnReplies
    model: tuple[str, str] | None = None
    """Name and version of the model, for Triton's requests that continue sequences. `session_ids` are then the ids of the
    sequences, one per message. None: Stepwell's own protocol."""


class HttpAnswer(NamedTuple):
    """An answer to an HTTP request, whole unless it was said to have more."""

    status: int
    headers: Sequence[tuple[str, str]]
    """Names in lower case."""
    body: bytes


class HttpCall(Call, Protocol):
    """An HTTP request. Its body is `request`.

    The metadata are the headers, without those of gRPC, and `:method`, `:path` (with the query) and `:authority`.
    """

    def begin(self, answer: HttpAnswer) -> None:
        """Send an answer whose body has more. `write` sends a further part of the body."""


class HttpDoor(Protocol):
    """Serves HTTP requests, from a front that receives them."""

    max_body_bytes: int
    """Limit of a body."""

    def refusals(self, limits: FrontLimits, overloaded: Status) -> Mapping[str, HttpAnswer]:
        """Return the answers to requests that the front refuses itself, `overloaded` with that status.

        They are `overloaded`, `headers_too_large`, `body_too_large`, `malformed` (the body breaks the rules of HTTP),
        `two_lengths` (the body has two), `slow` (it takes too long), `bad_timeout` (the header `grpc-timeout` cannot be
        read), `late` (the deadline has passed) and `failed` (the server has a defect).
        """

    def judge(self, call: HttpCall) -> HttpAnswer | None:
        """Check a request of an unknown caller by its headers, before its body is read. None: it is accepted."""

    async def serve(self, call: HttpCall) -> HttpAnswer | None:
        """Serve a request. None: the answer was begun, and has ended.

        It raises only `asyncio.CancelledError`, if the front cancelled the task.
        """


class JsonCodec(Protocol):
    """Reads and writes JSON without Python's lock. Any thread may call it."""

    def read(self, body: bytes, max_fields: int) -> Any:
        """Return a document whose objects have at most `max_fields` fields. A list of many numbers is `bytes` of doubles.

        Raises:
            ValueError: it is refused, with the kind of problem (syntax, fields, twice or number), and a text.
        """

    def numbers(self, doubles: bytes) -> str:
        """Return `bytes` of doubles as the entries of a list."""


@dataclasses.dataclass(frozen=True, slots=True)
class HttpListener:
    """Where and how to serve HTTP."""

    address: Address
    door: HttpDoor


Rest = Callable[[], bool]
"""Does a part of the remaining work, and returns whether more remains. It never raises."""


class Steps(Protocol):
    """Accepts steps as columns, from fronts that parse them. On the event loop."""

    traces: bool
    """Whether tracing is on. A front then hands over traced calls as calls, not as columns."""

    def take(self, columns: StepColumns) -> Rest | None:
        """Apply steps in their order. Returns the remaining work for later iterations of the event loop; None: none.

        Until it is done, nothing that arrives later on the same connections may be applied.
        """

    def run(self, batch: StepBatch, columns: Callable[[], StepColumns]) -> bool:
        """Run a batch of single steps now, and answer it when the store has it. `columns` returns it as columns.

        False: nothing changed; it must be passed to `take`.
        """

    def settle(self) -> None:
        """Apply what the store has. Call it before arrivals are processed: their senders may have been answered already."""

    def go(self) -> None:
        """Run a pass for the accepted steps now, not in the next iteration of the event loop."""

    def add_part(self, source: Source, part: Callable[[], None], /) -> object:
        """Schedule a part of large work of a source. Each iteration of the event loop runs one part."""

    def too_large(self, size: int, limit: int | None = None) -> Status:
        """Return the status of a call with a request of `size` bytes. `limit`: of its method, if it differs."""

    def overloaded(self) -> Status:
        """Return the status of calls that are refused because all calls together hold too much memory."""

    def headers_too_large(self, limit: int) -> Status:
        """Return the status of a call whose headers exceed `limit` bytes."""

    def duplicate(self, frame_id: int) -> bytes:
        """Return the reply to a frame whose id belongs to an unanswered frame."""


@dataclasses.dataclass(frozen=True, slots=True)
class FrontCounts:
    """The load of a front, for metrics."""

    now: Mapping[str, int]
    """Current values: `connections`, `calls`, `held_bytes` and so on. A front leaves out the values that it cannot know."""
    refused: Mapping[str, int]
    """Number of refusals so far, by reason."""
    taken: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How often the event loop took received messages so far, by driver of the sockets. Empty if it is always the same."""


class Front(Protocol):
    """Serves methods on one address. Lives on the event loop; started and stopped once."""

    name: str
    """Its name for `--front`."""
    limits: FrontLimits
    http_address: Address | None
    """The address that it serves HTTP on, once it is started; None: none."""
    json: JsonCodec | None
    """For the door of HTTP; None: the front does not serve HTTP."""

    async def start(
        self,
        address: Address | UnixAddress,
        methods: Sequence[Method],
        steps: Steps,
        certificates: Certificates | None,
        http: HttpListener | None = None,
    ) -> Address | UnixAddress:
        """Listen and serve. Returns the address with the port, which the system chooses if it is 0.

        Args:
            address: Address to listen on. The file of a Unix socket is accessible to its user only, and removed at the end.
            methods: The methods to serve.
            steps: Accepts steps as columns. A front may hand over each step as a call instead.
            certificates: Certificates for TLS; None: no TLS.
            http: Where to serve HTTP; None: nowhere. Only for the native front.

        Raises:
            BindError: the address is in use, or not an address of this machine.
            Unusable: the front does not support this kind of certificate or key.
        """

    def set_fast_path(self, *, enabled: bool) -> None:
        """Choose whether steps are handed over as columns, from the next message on.

        Otherwise, and until the first call of this method, the front hands over every message as part of a call.
        """

    def ask_callers(self) -> None:
        """Hand over steps as columns only for callers with a known credential. Call it before `start`.

        A call has a credential of kind "token" if it has one header `authorization` with `Bearer`, one space and the token.
        It has one of kind "names" if it has no such header and a client certificate (`Call.certificate_names`). Calls with
        several such headers, another value, or metadata `stepwell-tenant` are always handed over as calls. The credential
        of a stream is looked up again for each message, and must belong to `Call.who`.
        """

    def know(self, credential: Credential, caller: Caller, until: float) -> None:
        """Hand over steps with this credential as columns of this caller, in its tenant's namespace.

        The front may forget the credential at any time. It then hands over the calls, each of which makes the credential
        known again. Streams stay open.

        Args:
            credential: Credential of the calls.
            caller: The caller, whose role decides whether it may step. The ids get `namespaces.prefix_of` its tenant.
            until: Expiry on the monotonic clock; infinity if it does not expire.
        """

    def forget(self, credentials: Collection[Credential]) -> None:
        """Stop handing over steps with these credentials as columns. Unknown credentials are ignored.

        Steps that are already on their way to `Steps` may still be applied.
        """

    def secure(self, certificates: Certificates) -> None:
        """Use these certificates for new connections. Only for a front that was started with certificates.

        Raises:
            Unusable: see `start`. Nothing has changed.
        """

    def counts(self) -> FrontCounts:
        """Return the load and the refusals."""

    def take_durations(self) -> tuple[Durations, Durations] | None:
        """Return the durations of calls, and of messages on streams, that compiled code answered since the last call.

        None: this front has no compiled code. All other durations are counted by `Steps` and by the calls' servicers.
        """

    async def flush(self) -> None:
        """Return when all replies are on their way."""

    async def stop(self, grace_s: float) -> None:
        """Stop listening, and cut off the calls that still run after the given time."""
