"""What a front is, and what a servicer gets of a call: bytes, a caller, a deadline, ways to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.core.callers import Caller, Credential
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.core.scheduler import Source
from stepwell_server.engine.types import U64, Members
from stepwell_server.errors import ServerError
from stepwell_server.rpc.fronts.certificates import Certificates
from stepwell_server.rpc.fronts.shape import Shape
from stepwell_server.rpc.status import Status

F64 = npt.NDArray[np.float64]


class BindError(Exception):
    """A front cannot listen where it was told to."""


class OtherFront(ImportError):
    """The native front that is installed was built from other sources than this server's."""


class CallEnded(Exception):
    """A call ends with this status, and without a reply."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.code.name, status.message)
        self.status = status


class Call(Protocol):
    """A call on its way. It is served by a task, which the front cancels when its client is gone or its time is over."""

    who: Caller
    """Who calls. The boundary finds that out before the call is served: then a front takes in its messages, and those of a
    stream may become plain. Until then it is `ANYBODY`."""
    request: bytes
    """The one request; empty where requests are read, and once it was parsed and is not needed any more."""
    refusal: ServerError | None
    """The error of the one request if it breaks a rule of the method's shape; its bytes are then not here."""

    @property
    def caller(self) -> str:
        """Where it comes from: the same for all calls of one connection. The one place that says so."""

    @property
    def certificate_names(self) -> Sequence[str]:
        """Who calls by the certificate that was shown, if callers need one: its alternative names, else its common name.

        Not part of `caller`: connections take turns, whoever is behind them.
        """

    @property
    def deadline(self) -> float:
        """On the clock's monotonic time; infinity if it has none."""

    @property
    def is_late(self) -> bool:
        """Its deadline has passed."""

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """What the client sent beside its messages, by lower-case key; the last value of each."""

    @property
    def metadata_keys(self) -> Sequence[str]:
        """The keys of the metadata, as often as they came."""

    async def read(self) -> bytes | None:
        """The next request of a stream; None when the client has sent its last one.

        Raises:
            InvalidInput: it breaks a rule of the method's shape.
        """

    def write(self, reply: bytes) -> Coroutine[Any, Any, None]:
        """Send a reply of a stream. It is begun when the coroutine is, and ends when the reply is on its way."""


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """One method of a service."""

    service: str
    """Full name, `stepwell.v1.SessionService`."""
    name: str
    serve: Callable[[Call], Awaitable[bytes]]
    """Answers a call; what it returns is the reply of one that does not stream, and else empty.

    Raises `CallEnded`, and `asyncio.CancelledError` where the front cancelled its task; nothing else.
    """
    shape: Shape | None = None
    """What a request may hold: a front checks it before it hands over the bytes. None: anything."""
    streams: bool = False
    """Its requests are read and its replies written; else there is one of each."""
    is_open: bool = False
    """Anybody may call it, and it is served when nothing else is: it says how the server is."""
    judge: Callable[[Call], None] | None = None
    """Judges a call by its metadata, before a front that can wait takes in its message. None: `serve` alone judges it.

    Raises `CallEnded`: its caller is not known, or may not make it; else `Call.who` is set.
    """

    @property
    def path(self) -> str:
        """As it stands in a request."""
        return f"/{self.service}/{self.name}"


class OutputColumn(NamedTuple):
    """An output on its way: rows of the answered members, one after the other."""

    name: str
    dtype: int
    """A `stepwell.v1.DataType`."""
    tail: Sequence[int]
    """The shape without the rows."""
    data: bytes


class InputColumn(NamedTuple):
    """A tensor of plain steps: their rows, one after the other."""

    name: str
    dtype: int
    """A `stepwell.v1.DataType`, none of them bool."""
    tail: Sequence[int]
    """The shape without the rows."""
    data: bytes


class Ended(NamedTuple):
    """When messages came, on the clock's monotonic time, whose last sessions were answered just now."""

    calls: F64
    """Those that are calls."""
    messages: F64
    """Those of streams."""


class ColumnReplies(Protocol):
    """Who is answered for plain steps. Each session of the batch is answered once, in any order."""

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
        """Sessions were stepped: ascending indexes, None for all. All of them ran on one version of their model.

        Args:
            members: See above.
            revisions: One per session.
            positions: One per session.
            outputs: Their rows, one after the other.
            replayed: They were answered with a remembered reply.
            model_version: The number of the version; 0: answers of Stepwell's own protocol do not say it.
        """

    def failed(self, members: Members | None, status: Status, error: bytes) -> Ended:
        """Sessions were not stepped: the status of calls, and what streams are told. As `applied`.

        That is a serialized `stepwell.v1.Error`, or Triton's message.
        """

    def request(self, member: int) -> bytes:
        """One of Triton's requests as it came. Only while it has no answer."""

    def untraced(self) -> Sequence[int]:
        """Messages that are calls of which the metadata says that they are not traced."""

    def gone(self) -> Members:
        """Sessions whose callers do not wait any more."""


@dataclasses.dataclass(slots=True)
class StepColumns:
    """Plain steps that came at the same time, as columns. All are of one kind.

    A session may be in it more than once, to be stepped in that order.
    """

    session_ids: list[str]
    callers: list[str]
    """As `Call.caller`, one per session, or one where there is one message."""
    whos: Sequence[Caller]
    """As `Call.who`, one per session, or one where it is the same for all. `session_ids` are in the tenants' namespaces."""
    sizes: npt.NDArray[np.uint32]
    """Rows of each session in the tensors."""
    says_sizes: bool
    """The messages themselves say so; else there was nothing else that they could be."""
    expected: U64 | None
    request_ids: U64 | None
    deadlines: F64
    """One per session, on the clock's monotonic time."""
    select: int
    """A `stepwell.v1.OutputSelection`."""
    output_names: Sequence[str]
    inputs: Sequence[InputColumn]
    counts: npt.NDArray[np.uint32]
    """Sessions of each message, one message after the other."""
    replies: ColumnReplies
    model: tuple[str, str] | None = None
    """Name and version, where the messages are Triton's and say them: requests of sequences that neither begin nor end
    them. `session_ids` are then those of the sequences, and each is a message of its own."""


Rest = Callable[[], bool]
"""Does a part of what is left; whether more is left. It never raises."""


class Steps(Protocol):
    """Takes plain steps, for fronts that read them. On the event loop."""

    traces: bool
    """There are traces: a call of which the metadata says that it is traced is none of plain steps."""

    def take(self, columns: StepColumns) -> Rest | None:
        """Do them, in their order; what is left of them for later turns of the event loop, None if nothing is.

        Nothing that comes behind them over the same connections may be done before that.
        """

    def go(self) -> None:
        """Run what was taken now, rather than in another iteration of the event loop."""

    def add_part(self, source: Source, part: Callable[[], None], /) -> object:
        """Do a part of large work of a source in an iteration of the event loop that has no other part."""

    def too_large(self, size: int, limit: int | None = None) -> Status:
        """What a call ends with whose request has so many bytes; `limit`: of its method, where that is not the server's."""

    def overloaded(self) -> Status:
        """What calls end with that hold much while all of them together hold too much."""

    def headers_too_large(self, limit: int) -> Status:
        """What a call ends with whose headers have more bytes than that."""

    def duplicate(self, frame_id: int) -> bytes:
        """The reply to a frame whose id is that of an unanswered one."""


@dataclasses.dataclass(frozen=True, slots=True)
class FrontCounts:
    """What a front has to do, for metrics."""

    now: Mapping[str, int]
    """How much there is now: `connections`, `calls`, `held_bytes` and so on. What a front cannot tell is missing."""
    refused: Mapping[str, int]
    """How often something was refused until now, by reason."""
    taken: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """How often the event loop took what had come until now, by who drove the connections meanwhile. Empty where it always
    does."""


class Front(Protocol):
    """Serves methods on one address. Lives on the event loop; started and stopped once."""

    name: str
    """As `--front` has it."""
    limits: FrontLimits

    async def start(
        self,
        address: Address | UnixAddress,
        methods: Sequence[Method],
        steps: Steps,
        certificates: Certificates | None,
    ) -> Address | UnixAddress:
        """Listen and serve. Returns the address with the port, which the system chooses if it is 0.

        Args:
            address: Where to listen. The file of a Unix socket is for its user alone, and is removed at the end.
            methods: What is served.
            steps: Takes plain steps; a front may hand on each as a call instead.
            certificates: None: no TLS.

        Raises:
            BindError: the address is taken, or not one of this machine's.
            Unusable: certificate or key is of a kind that it does not know.
        """

    def set_plain(self, *, are_taken: bool) -> None:
        """Say whether plain steps are taken as such, in any order of calls and from the next message on.

        Else every message is handed on as one of a call, as it is from the start on until this is called.
        """

    def ask_callers(self) -> None:
        """Take messages as plain steps only of callers whose credential is known; hand on all others as calls. Before `start`.

        A call shows the credential of kind "token" if it has one header `authorization`, which is `Bearer`, one space and
        the token; one of kind "names" if it has no such header and a certificate (`Call.certificate_names`). What has
        more than one such header, another one, or metadata `stepwell-tenant` is never plain. The credential of a stream
        is that of its call, looked up for each message; they are plain only while it is known as that of `Call.who`.
        """

    def know(self, credential: Credential, caller: Caller, until: float) -> None:
        """Take the plain steps of those who show this credential, as those of this caller, in its tenant's namespace.

        It may be forgotten at any time, and its calls be handed on, each of which makes it known again. No stream is
        ended by that.

        Args:
            credential: What calls show.
            caller: Whose they are then, if its role may step. `namespaces.prefix_of` its tenant stands before the ids.
            until: On the clock's monotonic time; infinity if it does not end by itself.
        """

    def forget(self, credentials: Collection[Credential]) -> None:
        """Take no message any more as a plain step of those who show one of these. Others are passed over.

        What was taken before, and is on its way to `Steps`, may still be done.
        """

    def secure(self, certificates: Certificates) -> None:
        """Give new connections these. Only if it was started with some.

        Raises:
            Unusable: as `start`; nothing has changed.
        """

    def counts(self) -> FrontCounts:
        """What there is to do, and what was refused."""

    async def flush(self) -> None:
        """Return when all that was answered is on its way."""

    async def stop(self, grace_s: float) -> None:
        """Stop listening; cut off calls that still run after the time given."""
