"""Malformed messages to both servers: those of `support.peers.malformed_messages`, one after the other, and the whole answer to each.

What cannot be compared is not sent: calls whose answer depends on time (`depends_on_time`), and streams of several
messages, where a malformed one may or may not overtake the answers to those before it. Good frames that follow one
another are in the programs.
"""

from __future__ import annotations

import base64
import functools
import gzip
import random
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence

import hpack
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from against import answers
from against.answers import Answer
from against.differences import Exchange
from against.pair import Pair
from stepwell.v1 import models_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.triton.inference import service_pb2 as triton_pb
from support.peers import malformed_messages
from support.peers.http2 import Gone
from support.peers.malformed_http2 import CONTINUATION, DATA, END_STREAM, HEADERS, RST
from support.peers.malformed_messages import Call
from support.peers.pipelined import Pipeline
from support.peers.wire import TIMEOUT_S, Wire

MODEL, INPUT, FEATURES = "seq", "x", 3
NAMED = [f"fuzz-{number}" for number in range(8)]
"""Sessions that messages name."""
LOOK_EVERY = 500
"""Calls between two looks at all sessions."""
_HOUR_S = 3600
_STREAMED = "/stepwell.v1.SessionService/StepStream"
_LOAD = "/stepwell.v1.ModelAdminService/LoadModel"
_WATCHES = ("/grpc.health.v1.Health/Watch", "/stepwell.v1.WatchService/")
"""Calls whose replies depend on when they end begin with these."""
_TIMED = {("grpc-timeout", "1n"), ("content-length", "3")}
"""Headers with which it is a matter of time what ends the call: the second one contradicts the data that follow."""
_TENANT = "stepwell-tenant"
"""A server that knows no callers refuses it. The native front of the base ran steps meanwhile."""
_OPENING = {
    f"/stepwell.v1.SessionService/{name}"
    for name in ("OpenSession", "OpenSessions", "ForkSession", "ForkSessions")
}


class Line(Pipeline):
    """A connection that keeps what each call was answered with."""

    def __init__(self, address: str) -> None:
        self._data: dict[int, bytearray] = {}
        self._blocks: dict[int, dict[str, str]] = {}
        self._paths: dict[int, str] = {}
        self._reset: dict[int, int] = {}
        super().__init__(address)

    def begin(self, call: Call) -> int:
        """Send a call. Returns its number. Raises as `put`."""
        number = 2 * self.calls + 1
        self._paths[number] = call.path
        self.put(call)
        return number

    def answer(self, number: int) -> tuple[Answer, list[Message]]:
        """Wait for the end of a call: the answer, and the replies in it. Raises as `finish`."""
        while number in self._open:
            self._read()
        path, raw = self._paths.pop(number), bytes(self._data.pop(number, b""))
        headers, code = self._blocks.pop(number, {}), self._reset.pop(number, None)
        replies = [reply for reply in _replies(path, raw) if isinstance(reply, Message)]
        if code is not None:
            return answers.broken(f"reset {code}"), replies
        return _answer(path, headers, raw), replies

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            self._data.setdefault(stream, bytearray()).extend(payload)
        elif kind == RST and stream in self._open:
            self._reset[stream] = int.from_bytes(payload, "big")
        super()._take(kind, flags, stream, payload)
        if kind in {HEADERS, CONTINUATION} and self._flags & END_STREAM:
            decoded = hpack.Decoder().decode(self._block)
            self._blocks[stream] = {str(name): str(value) for name, value in decoded}


def _answer(path: str, headers: dict[str, str], raw: bytes) -> Answer:
    if "grpc-status" not in headers:
        return answers.broken(f"http {headers.get(':status')}")
    code = int(headers["grpc-status"]) if headers["grpc-status"].isdigit() else -1
    text = urllib.parse.unquote(headers.get("grpc-message", ""))
    packed = headers.get("grpc-status-details-bin", "")
    details = base64.b64decode(packed + "=" * (-len(packed) % 4)) if packed else b""
    found = list(_replies(path, raw))
    replies = [reply for reply in found if isinstance(reply, Message)]
    if path == _LOAD:  # how many of the others come is a matter of time
        replies = [reply for reply in replies if reply.HasField("model")]
    fields: dict[str, str] = {}
    if path == _STREAMED:
        fields |= dict(_of_parts(replies))
        replies = []
    answer = answers.failed(code, text, details, replies) if code else answers.succeeded(*replies)
    fields |= answer.fields
    fields |= {f"raw {number}": one.hex() for number, one in enumerate(found) if isinstance(one, bytes)}
    return Answer(fields)


def _replies(path: str, raw: bytes) -> Iterator[Message | bytes]:
    """The replies in the data of a call; bytes where they are none."""
    method = _methods().get(path)
    for message in messages_in(raw):
        if method is None:
            yield message
            continue
        try:
            yield message_factory.GetMessageClass(method.output_type).FromString(message)
        except DecodeError:
            yield message


def messages_in(body: bytes) -> Iterator[bytes]:
    """The whole gRPC messages in the data of a call, decompressed where that can be done."""
    at = 0
    while len(body) - at >= 5:
        end = at + 5 + int.from_bytes(body[at + 1 : at + 5], "big")
        if end > len(body):
            return
        raw = body[at + 5 : end]
        try:
            yield gzip.decompress(raw) if body[at] == 1 else raw
        except (OSError, EOFError, zlib.error):
            yield raw
        at = end


@functools.cache
def _methods() -> dict[str, MethodDescriptor]:
    """Triton's messages have a descriptor pool of their own, so each file says what it has."""
    files = (pb, models_pb2, triton_pb, health_pb2, reflection_pb2)
    return {
        f"/{service.full_name}/{method.name}": method
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def _of_parts(parts: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """The members of frames, whatever parts they came in: in the order of their numbers, all sessions have one row."""
    found: list[tuple[str, str]] = []
    for part in parts:
        assert isinstance(part, pb.StepStreamResponse)
        for entry in part.errors:
            members: Sequence[int | str] = list(entry.members) or ["all"]
            shown = "; ".join(answers.failed_member(entry.error).lines())
            found += [(f"frame {part.frame_id} member {member}", shown) for member in members]
        rest = pb.StepStreamResponse()
        rest.CopyFrom(part)
        rest.ClearField("errors")
        shown = "; ".join(
            f"{path}={value}" for path, value in answers.of_message(rest).items() if path != "last"
        )
        found.append((f"frame {part.frame_id} applied", shown))
    for number, (path, value) in enumerate(sorted(found)):
        yield f"{number} {path}", value


# --- what is not sent ---


def depends_on_time(call: Call) -> bool:
    """Whether the answer to a call depends on the clock or on how fast the server is."""
    if call.path.startswith(_WATCHES) or not _TIMED.isdisjoint(call.headers):
        return True
    if any(name == _TENANT for name, _ in call.headers):
        return True
    method = _methods().get(call.path)
    if method is None:
        return False
    messages = list(messages_in(call.body))
    if method.client_streaming and len(messages) > 1:
        return True  # the first may or may not be answered before the second is looked at
    for raw in messages:
        try:
            request = message_factory.GetMessageClass(method.input_type).FromString(raw)
        except DecodeError:
            continue
        if _has_time(request):
            return True
    return False


def patient(call: Call) -> Call:
    """A call with a time limit that only a hang reaches, if its data end with a whole message.

    Otherwise the server may wait for the rest, and the call ends by its own time limit.
    """
    at = 0
    while len(call.body) - at >= 5:
        at += 5 + int.from_bytes(call.body[at + 1 : at + 5], "big")
    if at != len(call.body) or not call.body:
        return call
    limits = {"3S": f"{TIMEOUT_S:.0f}S"}
    headers = [
        (name, limits.get(value, value) if name == "grpc-timeout" else value) for name, value in call.headers
    ]
    return call._replace(headers=headers)


def _has_time(message: Message) -> bool:
    for field, value in message.ListFields():
        if isinstance(value, Duration) and value.seconds < _HOUR_S:
            return True
        if field.name == "timeout_ms" and value < _HOUR_S * 1000:
            return True
        if isinstance(value, Message) and _has_time(value):
            return True
    return False


# --- what is sent ---


def send_malformed(pair: Pair, count: int, seed: int, say: Callable[[str], object]) -> None:
    """Send that many messages to both servers, and hold all sessions against each other every now and then."""
    _Sender(pair, seed, say).run(count)


class _Sender:
    def __init__(self, pair: Pair, seed: int, say: Callable[[str], object]) -> None:
        self._pair = pair
        self._seed = seed
        self._say = say
        self._lines: list[Line | None] = [None, None]
        self._waiting: list[tuple[int, Call, list[int]]] = []
        """Calls without a whole message, which may last until their time limits: place, call, numbers."""

    def run(self, count: int) -> None:
        rng = random.Random(f"{self._seed} malformed")
        known = malformed_messages.valid(MODEL, NAMED, FEATURES, INPUT)
        self._tidy()
        for number in range(count):
            call = patient(malformed_messages.odd_call(known, rng, max_messages=1))
            if number % max(1, count // 10) == 0:
                self._say(f"{self._pair.label}: malformed message {number} of {count}")
            if not depends_on_time(call):
                self._send(number, call)
            if number % LOOK_EVERY == LOOK_EVERY - 1 or number == count - 1:
                self._gather()
                self._look(number)
                self._tidy()
        for line in self._lines:
            if line is not None:
                line.close()

    def _send(self, number: int, call: Call) -> None:
        if any(line is not None and line.is_full for line in self._lines):
            self._gather()
            self._lines = [None, None]
        try:
            numbers = [self._line(side).begin(call) for side in range(2)]
        except (Gone, TimeoutError, OSError) as error:
            self._lost(number, call, error)
            return
        if next(messages_in(call.body), None) is None:
            self._waiting.append((number, call, numbers))
        else:
            self._compare(number, call, numbers)

    def _line(self, side: int) -> Line:
        line = self._lines[side]
        if line is None:
            line = self._lines[side] = Line(self._pair.servers[side].address)
        return line

    def _gather(self) -> None:
        waiting, self._waiting = self._waiting, []
        for number, call, numbers in waiting:
            self._compare(number, call, numbers)

    def _compare(self, number: int, call: Call, numbers: Sequence[int]) -> None:
        both: list[Exchange] = []
        made: list[list[str]] = []
        for side, own in enumerate(numbers):
            try:
                answer, replies = self._line(side).answer(own)
            except (Gone, TimeoutError, OSError, KeyError) as error:
                answer, replies = answers.broken(f"the connection has ended: {type(error).__name__}"), []
                self._lines[side] = None
            both.append(Exchange(f"malformed {call.path}", _shown(call), answer))
            made.append(_made(call, replies))
        alike = self._pair.compare("malformed messages", number, *both)
        for side, ids in enumerate(made):
            if ids:
                with Wire(self._pair.servers[side].address) as wire:
                    wire.close(*ids)
        if not alike:  # what comes next is to find the same sessions
            self._tidy()

    def _lost(self, number: int, call: Call, error: Exception) -> None:
        self._pair.note(
            f"malformed message {number} ({call.path}): a connection in order was closed: {error!r}"
        )
        self._waiting.clear()
        self._lines = [None, None]
        self._pair.revive()

    def _look(self, number: int) -> None:
        """Hold all sessions and their states against each other."""
        listed = pb.ListSessionsRequest(page_size=10_000)
        both: list[list[Exchange]] = []
        for server in self._pair.servers:
            with Wire(server.address) as wire:
                reply = wire.sessions.ListSessions(listed, timeout=TIMEOUT_S)
                taken = [Exchange("malformed ListSessions", "all", answers.succeeded(reply))]
                for session in reply.sessions:
                    state = wire.state(session.session_id)
                    taken.append(Exchange("malformed GetState", session.session_id, answers.succeeded(state)))
            both.append(taken)
        for one, two in zip(*both, strict=False):
            if not self._pair.compare("after malformed messages", number, one, two):
                break  # the others follow from it

    def _tidy(self) -> None:
        """End all sessions, and open those that messages name."""
        for server in self._pair.servers:
            with Wire(server.address) as wire:
                reply = wire.sessions.ListSessions(
                    pb.ListSessionsRequest(page_size=10_000), timeout=TIMEOUT_S
                )
                wire.close(*(session.session_id for session in reply.sessions))
                for name in NAMED:
                    wire.open(MODEL, session_id=name)


def _made(call: Call, replies: Sequence[Message]) -> list[str]:
    """Sessions whose ids the server made: their places in lists are random, so they are ended at once."""
    if call.path not in _OPENING:
        return []
    found: list[str] = []
    for reply in replies:
        if isinstance(reply, pb.OpenSessionResponse | pb.ForkSessionResponse):
            found.append(reply.session.session_id)
        elif isinstance(reply, pb.OpenSessionsResponse | pb.ForkSessionsResponse):
            found += reply.session_ids
    return [one for one in found if answers.normalised(one) != one]


def _shown(call: Call) -> str:
    headers = ", ".join(f"{name}: {value[:60]}" for name, value in call.headers)
    body = call.body if len(call.body) <= 400 else call.body[:400] + b"..."
    return f"{headers}; {body!r}"
