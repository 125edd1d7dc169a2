"""The HTTP door: turns requests into calls of the protocol's methods, and their replies into answers.

Each request runs the very function that serves the method over gRPC, with its headers as metadata. So guard, roles,
tenants, quotas, audit log, request log, metrics and traces apply alike.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import NamedTuple

from google.protobuf import empty_pb2, message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from stepwell_server.core.callers import Caller
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.errors import (
    DeadlineExceeded,
    InvalidInput,
    PermissionDenied,
    RequestTooLarge,
    ServerError,
    ServiceNotFound,
    Unsupported,
    shorten,
)
from stepwell_server.rpc.boundary import internal
from stepwell_server.rpc.fronts.base import CallEnded, HttpAnswer, HttpCall, JsonCodec, Method
from stepwell_server.rpc.fronts.shape_check import check_shape
from stepwell_server.rpc.http import console, json_form
from stepwell_server.rpc.http.answers import Headers, extended, json_answer, of_error, of_status
from stepwell_server.rpc.http.conversion import Conversion
from stepwell_server.rpc.http.events import EVENT, EventAnswer, Sleep, Source, Write, accepts_events
from stepwell_server.rpc.http.origin import OriginRules
from stepwell_server.rpc.http.routes import (
    WATCH_PATH,
    WATCHES,
    BadPath,
    Match,
    NoRoute,
    Route,
    Routes,
    WrongMethod,
)
from stepwell_server.rpc.status import Code, Status

MAX_BODY_BYTES = 8 << 20
"""Limit of a body in JSON."""
_JSON_TYPE = "application/json"
_OPENAPI = "/openapi.json"
_MAX_SHOWN = 200


class _Refused(Exception):
    """The request is answered without a call."""

    def __init__(self, answer: HttpAnswer, reason: str = "") -> None:
        super().__init__(answer.status)
        self.answer = answer
        self.reason = reason
        """The reason for metrics; empty: the answer is no refusal."""


class _Target(NamedTuple):
    """The method that a request calls."""

    match: Match
    query: str
    method: Method
    headers: Mapping[str, str]
    is_joint: bool = False
    """Whether the body names the methods. `method` is then the first that may be named."""


class Door:
    """Serves the routes of some services. Lives on the event loop.

    Args:
        services: Services with `google.api.http` options.
        methods: The methods of these services that a front serves.
        rules: Rules for browsers.
        refused: Called with the reason of each request that is refused before it is a call.
        max_message_bytes: Limit of a request over gRPC.
        version: The version of Stepwell, for the OpenAPI document.
        codec: Reads and writes JSON.
        sleep: Sleeps, for answers that take long.
    """

    def __init__(
        self,
        services: Iterable[ServiceDescriptor],
        methods: Iterable[Method],
        rules: OriginRules,
        refused: Callable[[str], None],
        max_message_bytes: int,
        version: str,
        codec: JsonCodec,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.max_body_bytes = min(MAX_BODY_BYTES, max_message_bytes)
        self.has_console = True
        """Whether the console is served."""
        self._routes = Routes(services)
        self._methods: Mapping[str, Method] = {method.path: method for method in methods}
        self._rules = rules
        self._refused = refused
        self._version = version
        self._sleep = sleep
        self._conversion = Conversion(codec)
        self._document: bytes | None = None
        self._types = {
            route.path: (
                message_factory.GetMessageClass(route.method.input_type),
                message_factory.GetMessageClass(route.method.output_type),
            )
            for route in self._routes.all
        }

    def refusals(self, limits: FrontLimits, overloaded: Status) -> Mapping[str, HttpAnswer]:
        """See `base.HttpDoor`."""
        return {
            "overloaded": of_status(overloaded),
            "headers_too_large": of_error(
                InvalidInput(
                    f"the headers of a request must have at most {limits.header_bytes} bytes; got more"
                ),
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
            ),
            "body_too_large": of_error(
                RequestTooLarge(f"the body must have at most {self.max_body_bytes} bytes; got more"),
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            ),
            "malformed": of_error(
                InvalidInput(
                    "the body must come in chunks with their sizes, as HTTP/1.1 writes them; got other bytes"
                )
            ),
            "two_lengths": of_error(
                InvalidInput("a request must have one of Content-Length and Transfer-Encoding; got both")
            ),
            "slow": of_error(
                DeadlineExceeded(
                    f"the body must come without a pause of more than {limits.receive_s:g} s, and at"
                    f" {limits.receive_bytes_per_s} bytes a second or faster after the first {limits.receive_s:g} s"
                ),
                HTTPStatus.REQUEST_TIMEOUT,
            ),
            "bad_timeout": of_error(
                InvalidInput(
                    "grpc-timeout must be a number of at most 8 digits and one of the units H, M, S, m, u and n, such as"
                    ' "500m"'
                )
            ),
            "late": of_error(DeadlineExceeded("the time of grpc-timeout has passed")),
            "failed": of_error(ServerError("the server failed to answer; search its log")),
        }

    def judge(self, call: HttpCall) -> HttpAnswer | None:
        """Check a request by its headers, before its body is read. None: it may be served."""
        try:
            target = self._target(call)
            if target.method.judge is not None:
                target.method.judge(_DoorCall(call, b"", None, _drop))
        except (_Refused, CallEnded) as ended:
            return extended(self._early(ended), self._rules.headers(_text(call.metadata.get("origin"))))
        return None

    async def serve(self, call: HttpCall) -> HttpAnswer | None:
        """Serve a request, whose body is `call.request`. None: the answer was begun, and has ended."""
        headers = self._rules.headers(_text(call.metadata.get("origin")))
        answer: HttpAnswer | None
        try:
            answer = await self._answer(self._target(call), call, headers)
        except (_Refused, CallEnded) as ended:
            answer = self._early(ended)
        except Exception as error:
            answer = of_error(internal(error, path=shorten(str(call.metadata.get(":path")), _MAX_SHOWN)))
        return None if answer is None else extended(answer, headers)

    def _early(self, ended: _Refused | CallEnded) -> HttpAnswer:
        """Return the answer to a request that ended before its reply, and count a refusal."""
        if isinstance(ended, CallEnded):
            return of_status(ended.status)
        if ended.reason:
            self._refused(ended.reason)
        return ended.answer

    def _target(self, call: HttpCall) -> _Target:
        """Find the method of a request, and check its headers.

        Raises:
            _Refused: the request is answered without a call.
        """
        headers = {key: text for key, value in call.metadata.items() if (text := _text(value)) is not None}
        http_method, (path, _, query) = headers[":method"], headers.get(":path", "").partition("?")
        authority = headers.get(":authority", "")
        if not authority or call.metadata_keys.count(":authority") > 1:
            got = "several" if authority else "none"
            raise _refused(InvalidInput(f"the Host of a request must be given once; got {got}"))
        if http_method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
            self._answer_preflight(headers["origin"])
        try:
            self._rules.require_allowed(headers, authority, may_navigate=http_method == "GET")
        except PermissionDenied as error:
            raise _refused(error) from None
        if http_method == "GET" and path == _OPENAPI:
            raise _Refused(json_answer(self._openapi()))
        is_console = self.has_console and console.has(path)
        if is_console and http_method in console.METHODS:
            raise _Refused(console.answer(http_method, path, headers))
        watches = [*self._routes.watches.values()]
        is_joint = path == WATCH_PATH and bool(watches)
        try:
            if path == _OPENAPI:
                raise WrongMethod(["GET"])
            if is_console:
                raise WrongMethod(console.METHODS)
            if is_joint and http_method != "POST":
                raise WrongMethod(["POST"])
            match = Match(watches[0], {}) if is_joint else self._routes.find(http_method, path)
        except NoRoute as error:
            raise _refused(ServiceNotFound(shorten(str(error), _MAX_SHOWN))) from None
        except WrongMethod as error:
            allowed = ", ".join(error.allowed)
            problem = Unsupported(
                f"{shorten(path, _MAX_SHOWN)} must be called with {allowed}; got {http_method}"
            )
            raise _refused(problem, HTTPStatus.METHOD_NOT_ALLOWED, (("allow", allowed),)) from None
        except BadPath as error:
            raise _refused(InvalidInput(str(error))) from None
        if match.route.has_body and "content-type" in headers:
            _require_json(headers)
        return _Target(match, query, self._methods[match.route.path], headers, is_joint)

    def _openapi(self) -> bytes:
        if self._document is None:
            # Imported here, because most servers are never asked for it.
            from stepwell_server.rpc.http import openapi

            self._document = openapi.document(self._routes.all, self._version)
        return self._document

    def _answer_preflight(self, origin: str) -> None:
        if self._rules.allows(origin):
            raise _Refused(HttpAnswer(HTTPStatus.OK, self._rules.preflight(), b""))
        raise _refused(
            PermissionDenied(
                f"--cors-origin must allow the page's origin; got {shorten(origin, _MAX_SHOWN)!r}"
            )
        )

    async def _answer(self, target: _Target, call: HttpCall, headers: Headers) -> HttpAnswer | None:
        method, as_json = target.method, self._conversion.as_json
        sources = await self._sources(target, call)
        accepts = accepts_events(_text(call.metadata.get("accept")) or "")
        if method.streams and (accepts or method.name in WATCHES):
            return await EventAnswer(call, headers, as_json, self._sleep).run(sources)
        (source,) = sources
        if not method.streams:
            return json_answer(await as_json(source.reply_type, await source.serve(_drop)))
        # the status of a load is known at its end, and belongs into the first line of the answer
        replies: list[bytes] = []

        async def keep(reply: bytes) -> None:
            replies.append(await as_json(source.reply_type, reply))

        await source.serve(keep)
        return json_answer(b"[" + b", ".join(replies) + b"]")

    async def _sources(self, target: _Target, call: HttpCall) -> list[Source]:
        """Return the call of a request's method, or the calls that its body names."""
        body, call.request = call.request, b""
        if target.match.route.has_body and body:
            _require_json(target.headers)
        codec, is_large = self._conversion.codec, not json_form.is_small(body)

        def read(message: Message) -> None:
            _read(message, body, target, codec)

        if not target.is_joint:
            return [await self._source(target.match.route, call, read, is_large=is_large)]
        routes = self._routes.watches

        def readers() -> dict[str, Callable[[Message], None]]:
            json_form.read_query(target.query, empty_pb2.Empty())
            return json_form.readers(body, [*routes], codec)

        try:
            found = await self._conversion.run(readers, is_large=is_large)
        except InvalidInput as error:
            refusal = error

            def refuse(_message: Message) -> None:
                raise refusal

            found = {next(iter(routes)): refuse}  # by a method, so that unknown callers are refused as such
        return [
            await self._source(routes[name], call, one, is_large=is_large, part=f"{name}.")
            for name, one in found.items()
        ]

    async def _source(
        self, route: Route, call: HttpCall, read: Callable[[Message], None], *, is_large: bool, part: str = ""
    ) -> Source:
        """Return a call of a method.

        Args:
            route: One of its paths.
            call: The request.
            read: Fills the method's request, and may raise `InvalidInput`.
            is_large: Whether that takes long.
            part: Where the body has the method's request, with a dot at the end; empty: it is the body.
        """
        method = self._methods[route.path]
        request_type, reply_type = self._types[route.path]
        raw, refusal = b"", None

        def request() -> bytes:
            message = request_type()
            read(message)
            found = message.SerializeToString()
            if method.shape is not None and (breach := check_shape(method.shape, found)) is not None:
                raise InvalidInput(part + breach.message)
            return found

        try:
            raw = await self._conversion.run(request, is_large=is_large)
        except InvalidInput as error:
            refusal = error

        async def serve(write: Write) -> bytes:
            own = _DoorCall(call, raw, refusal, write)
            try:
                return await method.serve(own)
            except CallEnded as ended:
                if not (part and own.is_read and ended.status.code is Code.INVALID_ARGUMENT):
                    raise
                # the method names a field of its request, and the caller must find it in the body
                named = dataclasses.replace(ended.status, message=part + ended.status.message)
                raise CallEnded(named) from None

        return Source(WATCHES.get(method.name, EVENT), reply_type, serve)


class _DoorCall:
    """A call of one message by an HTTP request. Implements `base.Call`."""

    def __init__(self, call: HttpCall, request: bytes, refusal: ServerError | None, write: Write) -> None:
        self._call = call
        self.request = request
        self.refusal = refusal
        self.write = write
        self.is_read = False
        """Whether the method has the request. False after a refusal."""

    @property
    def who(self) -> Caller:
        return self._call.who

    @who.setter
    def who(self, who: Caller) -> None:
        self._call.who = who

    @property
    def caller(self) -> str:
        return self._call.caller

    @property
    def certificate_names(self) -> Sequence[str]:
        return self._call.certificate_names

    @property
    def deadline(self) -> float:
        return self._call.deadline

    @property
    def is_late(self) -> bool:
        return self._call.is_late

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        return self._call.metadata

    @property
    def metadata_keys(self) -> Sequence[str]:
        return self._call.metadata_keys

    async def read(self) -> bytes | None:
        if self.refusal is not None:
            raise self.refusal
        if self.is_read:
            return None
        self.is_read = True
        return self.request


async def _drop(_reply: bytes) -> None:
    """The method writes no replies."""


def _read(message: Message, body: bytes, target: _Target, codec: JsonCodec) -> None:
    """Fill the request message.

    Raises:
        InvalidInput: body, query or path do not fit the message.
    """
    route = target.match.route
    if route.has_body:
        if body:  # without one, it is an empty message
            json_form.read_body(body, message, codec)
    elif body:
        raise InvalidInput(f"the body must be empty for {_named(route)}; got {len(body)} bytes")
    json_form.read_query(target.query, message)
    for name, text in target.match.variables.items():
        json_form.set_variable(name, text, message)


def _require_json(headers: Mapping[str, str]) -> None:
    """Check the type of a body. A page of another origin cannot send this type without asking first.

    A request without a type and without a body is served: browsers send Origin with it, which `OriginRules` checks.

    Raises:
        _Refused: it is not JSON, or compressed.
    """
    encoding = headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        error = InvalidInput(
            f"the body must not be compressed; got content-encoding: {shorten(encoding, _MAX_SHOWN)}"
        )
        raise _refused(error, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    given = headers.get("content-type", "")
    media_type, _, parameters = given.partition(";")
    charset = parameters.strip().lower()
    if media_type.strip().lower() == _JSON_TYPE and charset in {"", "charset=utf-8", 'charset="utf-8"'}:
        return
    error = InvalidInput(
        f"content-type must be {_JSON_TYPE} in UTF-8 (curl: --json); got {shorten(given, _MAX_SHOWN) or 'none'!r}"
    )
    raise _refused(error, HTTPStatus.UNSUPPORTED_MEDIA_TYPE)


def _refused(error: ServerError, http_status: int = 0, headers: Headers = ()) -> _Refused:
    return _Refused(of_error(error, http_status, headers), error.reason)


def _named(route: Route) -> str:
    return f"{route.http_method} {route.template}"


def _text(value: str | bytes | None) -> str | None:
    return value if isinstance(value, str) else None
