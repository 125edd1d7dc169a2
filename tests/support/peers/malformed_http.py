"""Connections to the port of JSON that are almost right: requests of every method with a path, and what may be wrong.

All is drawn from a `random.Random`, so that a seed finds it again. Nothing here knows whether a request is still valid:
some are, and are served.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2
from stepwell_server.rpc.http.routes import WATCH_PATH, WATCHES, Routes
from support.peers import malformed_http2
from support.peers.malformed_messages import Call, Random, Valid, cut, flip, mutate, noise, splice

MAX_BYTES = 192 << 10
"""Of a connection."""
_SERVICES = [
    service
    for file in (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR, watch_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
]
Headers = list[tuple[str, str]]


class Request(NamedTuple):
    """A valid request. `document`: its body in JSON; None: it has no body."""

    method: str
    target: str
    document: dict[str, Any] | None


def valid(known: Sequence[Valid]) -> list[Request]:
    """Requests for messages of methods that have paths."""
    routes = Routes(_SERVICES).all
    found = [Request("GET", "/openapi.json", None)]
    together: dict[str, Any] = {}
    for message in known:
        for route in routes:
            if route.path != message.path:
                continue
            read = GetMessageClass(route.method.input_type).FromString(message.raw)
            document = MessageToDict(read, preserving_proto_field_name=True)
            if route.method.name in WATCHES:
                together[WATCHES[route.method.name]] = copy.deepcopy(document)
            names = re.findall(r"\{(\w+)\}", route.template)
            values = {name: quote(str(document.pop(name, "fuzz-0")), safe="") for name in names}
            target = route.template.format(**values)
            if route.has_body:
                found.append(Request(route.http_method, target, document))
            else:
                plain = {
                    name: value for name, value in document.items() if not isinstance(value, list | dict)
                }
                found.append(Request(route.http_method, f"{target}?{urlencode(plain)}", None))
    if together:
        found.append(Request("POST", WATCH_PATH, together))
    return found


# --- what may be wrong with a document ---

_ODD_VALUES: Sequence[Any] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        -0.0,
        1e308,
        5e-324,
        2**31,
        2**53 + 1,
        2**63,
        2**64,
        -(2**63) - 1,
        10**400,
    ),
    *(
        "",
        "NaN",
        "-Infinity",
        "1e999",
        "0x10",
        "\ud800",
        "\udc00\ud800",
        "\0",
        "日本",
        "fuzz-1",
        "seq",
        "seq@1",
        "*",
    ),
    *("a" * 3000, "A" * 20_000, "AA==" * 9000, "9" * 5000, "3.5s", "-1s", "2026-01-02T03:04:05Z", "a\x1fb"),
    *(
        [],
        {},
        [[]],
        [None] * 70,
        [1] * 70,
        [0.5] * 3000,
        [1.5] * 70 + ["NaN"],
        [{}] * 300,
        ["s"] * 3000,
        [True] * 9,
    ),
    *({"": ""}, {f"f{number}": number for number in range(1100)}, {"values": [1, 2, 3]}, [2**53] * 65),
)


def odd_document(document: dict[str, Any], rng: Random) -> dict[str, Any]:
    """The same document with one to three values or names that are others."""
    found = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        holder: Any = found
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.6:
                holder = holder[key]
                continue
            _change(holder, key, rng)
            break
    return found


def _change(holder: Any, key: Any, rng: Random) -> None:
    kind = rng.randrange(6)
    if kind == 0 and isinstance(holder, dict):
        holder[rng.choice(("", "a", "values", "sessionId", "日本", "\ud800", "x" * 2000))] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * rng.choice((1, 5, 300)))
    elif kind == 3:
        nested: Any = holder[key]
        for _ in range(rng.choice((1, 20, 120, 250))):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        holder[key] = nested
    else:
        holder[key] = copy.deepcopy(rng.choice(_ODD_VALUES))


def odd_text(raw: bytes, rng: Random) -> bytes:
    """The bytes of a document, some of which are others."""
    odd: tuple[Callable[[], bytes], ...] = (
        lambda: flip(raw, rng),
        lambda: cut(raw, rng),
        lambda: splice(raw, rng),
        lambda: noise(raw, rng),
        lambda: mutate(raw, rng),
        lambda: raw.replace(b'"', b"'"),
        lambda: raw.replace(b"}", b",}"),
        lambda: raw.replace(b": ", rng.choice((b": NaN, ", b": -Infinity", b": 01", b": 1e999, ", b": +"))),
        lambda: raw[:-1] + b", " + raw[1:],
        lambda: b"\xef\xbb\xbf" + raw,
        lambda: raw.decode().encode("utf-16"),
        lambda: b" " * rng.choice((1, 9000)) + raw + b"\0",
        lambda: b"/* */" + raw,
        lambda: raw + raw,
        lambda: rng.choice((b"[", b'{"a":', b'[{"a":')) * rng.choice((100, 20_000)),
    )
    return rng.choice(odd)()


# --- what may be wrong with a request ---

_ODD_PIECES = (
    *(
        "%00",
        "%ff",
        "%c0%af",
        "%ed%a0%80",
        "%zz",
        "%",
        "%2F",
        "%3A",
        "..",
        "/../",
        "//",
        ":",
        ":step",
        ":step:reset",
    ),
    *(
        "?",
        "?a",
        "?a=b",
        "&a.b.c=1",
        "?page_size=-1",
        "?page_size=1&page_size=2",
        "#",
        ";",
        "*",
        "@",
        "\\",
        '"',
    ),
    *(
        "\x00",
        "\x7f",
        "\t",
        " ",
        "\xff",
        "a" * 5000,
        "?" + "a=1&" * 3000,
        "/a" * 2000,
        "?" + "%41" * 2000,
        "~user",
    ),
)
_TARGETS = (
    "*",
    "",
    "/",
    "//",
    "http://localhost/v1/models",
    "http://evil.example/v1/models",
    "localhost:80",
    "v1",
)
_METHODS = (
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PRI",
    "get",
    "A" * 300,
    "",
)
_VERSIONS = ("HTTP/1.0", "HTTP/1.1", "HTTP/1.2", "HTTP/2.0", "HTTP/0.9", "HTTP/11", "ICY", "")
_ODD_HEADERS: Sequence[tuple[str, str]] = (
    *(
        ("Content-Length", value)
        for value in ("0", "5", "-1", "+5", "0x10", "1e3", "99999999999999999999", "5, 5", "")
    ),
    *(
        ("Transfer-Encoding", value)
        for value in ("chunked", "gzip", "identity", "gzip, chunked", "chunked, chunked")
    ),
    *(
        ("Host", value)
        for value in ("", "evil.example", "localhost:x", "a@localhost", "[::1", "localhost\t", "\xff")
    ),
    *(("Origin", value) for value in ("null", "http://evil.example", "http://localhost", "")),
    *(
        ("Content-Type", value)
        for value in ("text/plain", "application/json; charset=utf-16", "", "application/grpc")
    ),
    *(("Connection", value) for value in ("close", "keep-alive", "upgrade", "close, keep-alive", "host")),
    *(("Upgrade", value) for value in ("h2c", "websocket")),
    *(("Expect", value) for value in ("100-continue", "200-ok", "")),
    *(("grpc-timeout", value) for value in ("1n", "50m", "-1S", "soon", "")),
    *(
        ("authorization", value)
        for value in ("Bearer nobody", "Bearer", "Basic bm9ib2R5", "Bearer " + "A" * 6000)
    ),
    *(
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Mode", "navigate"),
        ("Access-Control-Request-Method", "POST"),
    ),
    *(
        ("Accept", "text/event-stream"),
        ("Accept-Encoding", "gzip"),
        ("Content-Encoding", "gzip"),
        ("Range", "bytes=0-"),
    ),
    *(("traceparent", "00-zz-zz-01"), ("stepwell-tenant", "watched"), ("HTTP2-Settings", "AAMAAABkAAQAAP__")),
    *(
        (":path", "/v1/models"),
        (":method", "DELETE"),
        ("x", "v" * 20_000),
        ("", "v"),
        ("a b", "c"),
        ("x", "a\x00b"),
    ),
    *(("x", "a\r\n folded"), ("x\r\ny", "z"), ("x", "a\nb"), ("Te", "trailers"), ("Trailer", "x")),
)


def _target(target: str, rng: Random) -> str:
    if rng.random() < 0.1:
        return rng.choice(_TARGETS)
    for _ in range(rng.choice((0, 1, 1, 2))):
        at = rng.randint(0, len(target))
        target = target[:at] + rng.choice(_ODD_PIECES) + target[at + rng.choice((0, 0, 1, 5)) :]
    return target


def _chunked(body: bytes, rng: Random) -> bytes:
    """A body in chunks, whose sizes may lie."""
    parts, at = [], 0
    while at < len(body):
        size = rng.choice((1, 7, 300, 9000))
        part = body[at : at + size]
        at += size
        shown = b"%x" % len(part)
        if rng.random() < 0.05:
            shown = rng.choice(
                (b"", b"-1", b"0x5", b"%x" % (len(part) + 1), b"f" * 17, b"zz", shown + b";" + b"e" * 5000)
            )
        parts.append(shown + rng.choice((b"\r\n", b"\r\n", b"\r\n", b"\n", b";a=b\r\n")) + part + b"\r\n")
    end = rng.choice(
        (b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n", b"0\r\n", b"", b"0\r\n" + b"x: y\r\n" * 3000)
    )
    return b"".join(parts) + end


def _body(request: Request, rng: Random) -> bytes:
    document = request.document
    if document is None:
        return b"" if rng.random() < 0.9 else noise(b"12345678", rng)
    if document and rng.random() < 0.7:
        document = odd_document(document, rng)
    raw = json.dumps(document).encode()
    return odd_text(raw, rng) if rng.random() < 0.3 else raw


def message(request: Request, rng: Random, headers: Headers) -> bytes:
    """A request of HTTP/1.1, in which some things may be wrong."""
    is_odd = rng.random() < 0.5
    method = rng.choice(_METHODS) if is_odd and rng.random() < 0.2 else request.method
    target = _target(request.target, rng) if is_odd else request.target
    version = rng.choice(_VERSIONS) if is_odd and rng.random() < 0.1 else "HTTP/1.1"
    body = _body(request, rng)
    fields = [*headers, ("Host", "localhost"), ("Content-Type", "application/json")]
    if rng.random() < 0.2:
        fields.append(("Transfer-Encoding", "chunked"))
        body = _chunked(body, rng)
    else:
        fields.append(
            ("Content-Length", str(len(body) + (rng.choice((-1, 1, 1 << 20)) if rng.random() < 0.05 else 0)))
        )
    if is_odd:
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            fields.insert(rng.randint(0, len(fields)), rng.choice(_ODD_HEADERS))
        if rng.random() < 0.1:
            del fields[rng.randrange(len(fields))]
        if rng.random() < 0.03:
            fields += [(f"x-{number}", "") for number in range(rng.choice((101, 600, 4000)))]
    end = rng.choice(("\r\n",) * 9 + ("\n",))
    lines = [f"{method} {target} {version}", *(f"{name}: {value}" for name, value in fields), "", ""]
    return end.join(lines).encode("latin-1", "replace") + body


def connection(known: Sequence[Request], rng: Random, tokens: Sequence[str] = ()) -> bytes:
    """What a peer writes on a connection before it writes no more."""
    headers = [("authorization", f"Bearer {token}") for token in tokens if rng.random() < 0.9]
    if rng.random() < 0.25:
        return _http2(rng.choice(known), rng, headers)
    requests = [message(rng.choice(known), rng, headers) for _ in range(rng.choice((1, 1, 1, 2, 3, 20)))]
    raw = b"".join(requests)
    kind = rng.random()
    if kind < 0.1:
        raw = cut(raw, rng)
    elif kind < 0.25:
        raw = rng.choice((flip, splice))(raw, rng)
    elif kind < 0.27:
        raw = rng.randbytes(rng.randint(0, 3000))
    return raw[:MAX_BYTES]


def _http2(request: Request, rng: random.Random, headers: Headers) -> bytes:
    odd = [(name.lower(), value) for name, value in rng.choices(_ODD_HEADERS, k=rng.choice((0, 0, 1, 2)))]
    target = _target(request.target, rng) if rng.random() < 0.4 else request.target
    fields = [(":method", request.method), ("content-type", "application/json"), *headers, *odd]
    shown = [(name, value.encode("latin-1", "replace").decode("latin-1")) for name, value in fields]
    call = Call(target.encode("latin-1", "replace").decode("latin-1"), _body(request, rng), shown, 1)
    if rng.random() < 0.4:
        return malformed_http2.HELLO + malformed_http2.conversation(call)
    return malformed_http2.connection(call, rng)
