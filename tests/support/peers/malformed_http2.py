"""Connections that are no HTTP/2, or almost: what a peer may write on a socket. All is drawn from a `random.Random`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from support.peers.http2 import PREFACE
from support.peers.malformed_messages import Call, Random, flip, splice, varint

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, WITH_PRIORITY = 1, 4, 8, 32
MAX_BYTES = 256 << 10
"""Of a connection."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame; its length is a lie where it is given."""
    size = len(payload) if length is None else length
    return (
        (size & 0xFFFFFF).to_bytes(3, "big") + bytes([kind, flags]) + (stream & 0xFFFFFFFF).to_bytes(4, "big")
    ) + payload


def literal(name: str, value: str) -> bytes:
    """A header that is written out, and remembered by nobody."""
    raw_name, raw_value = name.encode("latin-1"), value.encode("latin-1")
    return b"\0" + _hpack_number(len(raw_name), 7) + raw_name + _hpack_number(len(raw_value), 7) + raw_value


def _hpack_number(value: int, bits: int, first: int = 0) -> bytes:
    most = (1 << bits) - 1
    return bytes([first | value]) if value < most else bytes([first | most]) + varint(value - most)


def headers(path: str, extra: Sequence[tuple[str, str]] = ()) -> bytes:
    """The block of a call's headers. What `extra` names it replaces, but for what may come more than once."""
    usual = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    named = {name for name, _ in extra}
    fields = [(name, value) for name, value in usual.items() if name not in named]
    return b"".join(literal(name, value) for name, value in [*fields, *extra])


def conversation(call: Call, stream: int = 1) -> bytes:
    """A call as it is meant to be."""
    block = headers(call.path, call.headers)
    body = call.body
    parts = [frame(HEADERS, END_HEADERS, stream, block)]
    parts += [frame(DATA, 0, stream, body[at : at + 16_384]) for at in range(0, len(body), 16_384)]
    return b"".join([*parts, frame(DATA, END_STREAM, stream)])


HELLO = PREFACE + frame(SETTINGS, 0, 0)


# --- what may be wrong; each gets a call that may be made of it ---


def no_preface(call: Call, rng: Random) -> bytes:
    return rng.choice(
        (
            lambda: b"",
            lambda: PREFACE[: rng.randrange(24)],
            lambda: flip(PREFACE, rng) + conversation(call),
            lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            lambda: b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
            lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(505),
            lambda: rng.randbytes(rng.randint(1, 400)),
            lambda: PREFACE + PREFACE,
            lambda: PREFACE + conversation(call),
            lambda: b"\0" * rng.randint(1, 5000),
        )
    )()


def random_bytes(_: Call, rng: Random) -> bytes:
    return HELLO + rng.randbytes(rng.randint(1, 2000))


def random_frames(call: Call, rng: Random) -> bytes:
    found = [HELLO]
    for _ in range(rng.randint(1, 30)):
        payload = rng.choice((b"", rng.randbytes(rng.randint(0, 40)), headers(call.path)))
        kind = rng.choice((*range(10), rng.randrange(256)))
        stream = rng.choice((0, 1, 1, 3, 2, (1 << 31) - 1, rng.getrandbits(32)))
        found.append(frame(kind, rng.randrange(256), stream, payload))
    return b"".join(found)


def lying_lengths(call: Call, rng: Random) -> bytes:
    payload = rng.choice((headers(call.path), rng.randbytes(20), b""))
    length = rng.choice((0, 1, len(payload) + 1, len(payload) * 2, 16_385, 65_537, 0xFFFFFF))
    lie = frame(rng.randrange(10), rng.randrange(256), rng.choice((0, 1, 3)), payload, length)
    return HELLO + rng.choice((b"", conversation(call))) + lie + conversation(call, 5)


def wrong_streams(call: Call, rng: Random) -> bytes:
    block = headers(call.path)
    begun = frame(HEADERS, END_HEADERS, 5, block)
    more = (
        frame(HEADERS, END_HEADERS, rng.choice((0, 2, 3, 4)), block),
        frame(DATA, 0, rng.choice((0, 1, 7, 9, 1 << 30)), call.body[:1000]),
        frame(DATA, END_STREAM, 5, call.body[:1000]) + frame(DATA, END_STREAM, 5, call.body[:1000]),
        frame(HEADERS, END_HEADERS, 5, block),
        frame(RST, 0, rng.choice((0, 7, 8)), bytes(4)),
        frame(WINDOW, 0, rng.choice((7, 8)), b"\0\0\0\1"),
        frame(PRIORITY, 0, rng.choice((0, 5)), b"\0\0\0\5\1"),
        frame(RST, 0, 5, bytes(4)) + frame(DATA, END_STREAM, 5, call.body[:1000]) * 3,
    )
    return HELLO + begun + b"".join(rng.sample(more, rng.randint(1, 4)))


def hpack(call: Call, rng: Random) -> bytes:
    """Blocks that stand for far more than they have, and such that stand for nothing."""
    large = b"\x40" + _hpack_number(5, 7) + b"x-big" + _hpack_number(3000, 7) + b"v" * 3000
    block = rng.choice(
        (
            lambda: large + b"\xbe" * rng.choice((100, 5000, 16_000)),
            lambda: b"\x80",
            lambda: b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
            lambda: b"\xff\xff\xff\xff\x0f",
            lambda: b"\x3f" + varint(1 << 30),
            lambda: b"\x3f\xe1\x1f" * 2000,
            lambda: b"\x00\x85\xff\xff\xff\xff\xff\x85\xff\xff\xff\xff\xff",
            lambda: b"\x00\x03te",
            lambda: b"\x00" + _hpack_number(1 << 28, 7) + b"a",
            lambda: rng.randbytes(rng.randint(1, 200)),
            lambda: flip(headers(call.path), rng),
            lambda: b"\x20" * 100 + headers(call.path),
            lambda: b"".join(literal(f"x-{n}", "v" * 90) for n in range(rng.choice((50, 130)))),
            lambda: b"\0\0\0" * rng.choice((10, 5000)),
        )
    )()
    begun = frame(HEADERS, END_HEADERS | rng.randrange(2), 1, block[:16_384])
    return HELLO + begun + conversation(call, 3)


def continuations(call: Call, rng: Random) -> bytes:
    block = headers(call.path)
    part = frame(CONTINUATION, 0, 1, rng.choice((b"", b"\0\1a\1b", block, literal("x-more", "v" * 4000))))
    begun = frame(HEADERS, 0, 1, block)
    end = frame(CONTINUATION, END_HEADERS, 1)
    return (
        HELLO
        + rng.choice(
            (
                lambda: begun + part * rng.choice((1, 20, 2000)),
                lambda: (
                    begun + part * rng.choice((1, 50)) + end + frame(DATA, END_STREAM, 1, call.body[:9000])
                ),
                lambda: part,
                lambda: begun + frame(PING, 0, 0, bytes(8)) + end,
                lambda: begun + frame(CONTINUATION, END_HEADERS, 3),
                lambda: begun + frame(DATA, END_STREAM, 1, call.body[:1000]),
                lambda: frame(HEADERS, END_STREAM, 1, block) + part + conversation(call, 3),
            )
        )()
    )


def odd_settings(call: Call, rng: Random) -> bytes:
    def setting(number: int, value: int) -> bytes:
        return number.to_bytes(2, "big") + value.to_bytes(4, "big")

    edges = (0, 1, 2, 16_383, 16_384, (1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
    values = b"".join(setting(rng.choice((1, 2, 3, 4, 5, 6, 8, 999)), rng.choice(edges)) for _ in range(4))
    odd = rng.choice(
        (
            lambda: frame(SETTINGS, 0, 0, values),
            lambda: frame(SETTINGS, 0, 0, values[:-1]),
            lambda: frame(SETTINGS, 1, 0, values),
            lambda: frame(SETTINGS, 0, 1, values),
            lambda: frame(SETTINGS, 1, 0) * 50,
            lambda: frame(SETTINGS, 0, 0, values) * 500,
            lambda: (
                frame(SETTINGS, 0, 0, setting(4, 0))
                + conversation(call)
                + frame(SETTINGS, 0, 0, setting(4, 1))
            ),
            lambda: (
                frame(SETTINGS, 0, 0, setting(4, (1 << 31) - 1)) + frame(WINDOW, 0, 0, b"\x7f\xff\xff\xff")
            ),
            lambda: frame(SETTINGS, 0, 0, setting(3, 100) * 3000),
        )
    )()
    return HELLO + odd + conversation(call, 3)


def control(call: Call, rng: Random) -> bytes:
    """Frames that carry no call: too many, too long, at the wrong place."""
    odd = (
        lambda: frame(PING, rng.randrange(2), rng.choice((0, 1)), bytes(rng.choice((0, 7, 8, 9)))),
        lambda: frame(PING, 0, 0, bytes(8)) * rng.choice((2, 3000)),
        lambda: frame(PRIORITY, 0, 1, rng.randbytes(rng.choice((4, 5, 6)))) * rng.choice((1, 2000)),
        lambda: frame(WINDOW, 0, rng.choice((0, 1)), rng.choice((bytes(4), b"\x7f\xff\xff\xff", b"\1"))) * 3,
        lambda: frame(GOAWAY, 0, rng.choice((0, 1)), rng.randbytes(rng.choice((0, 7, 8, 800)))),
        lambda: frame(RST, 0, 1, rng.randbytes(rng.choice((3, 4, 5)))),
        lambda: frame(PUSH, END_HEADERS, 1, b"\0\0\0\2" + headers(call.path)),
        lambda: (
            frame(rng.randrange(10, 256), 255, rng.getrandbits(31), rng.randbytes(50)) * rng.choice((1, 900))
        ),
        lambda: frame(DATA, 0, 1) * rng.choice((1, 1500)),
    )
    begun = frame(HEADERS, END_HEADERS, 1, headers(call.path, call.headers))
    return (
        HELLO + begun + b"".join(rng.choice(odd)() for _ in range(rng.randint(1, 3))) + conversation(call, 3)
    )


def odd_headers(call: Call, rng: Random) -> bytes:
    """Blocks that HPACK can read and HTTP/2 forbids, or gRPC."""
    odd = rng.choice(
        (
            lambda: headers(call.path, [(":method", rng.choice(("GET", "", "CONNECT", "post")))]),
            lambda: headers(rng.choice(("", "*", "/", "/a", "//", "/" + "a" * 9000, "/\u00ff\u00fe", "a b"))),
            lambda: headers(call.path, [("Upper-Case", "x")]),
            lambda: headers(call.path, [("connection", "close"), ("transfer-encoding", "chunked")]),
            lambda: headers(
                call.path, [("content-length", rng.choice(("0", "1", "99999999999999999999", "-1", "x")))]
            ),
            lambda: headers(call.path) + literal(":path", "/late"),
            lambda: headers(call.path)[len(literal(":method", "POST")) :],
            lambda: headers(call.path, [(":unknown", "x")]),
            lambda: headers(call.path, [("", "x")]),
            lambda: headers(call.path, [("x", "a\r\nb: c")]),
            lambda: headers(call.path, [("x\0y", "\0")]),
            lambda: headers(call.path, [(":authority", "\u00e9" * 50)]),
            lambda: headers(call.path, [(":scheme", rng.choice(("", "ftp", "https://")))]),
            lambda: headers(
                call.path, [("content-type", rng.choice(("", "application/grpc+json", "text/html")))]
            ),
            lambda: headers(call.path, [("authorization", "Bearer " + "x" * rng.choice((0, 1, 9000)))] * 2),
            lambda: headers(
                call.path, [("grpc-timeout", rng.choice(("", "S", "9" * 30 + "S", "1s", "\u00ff")))]
            ),
            lambda: b"".join(literal("cookie", "c" * 30) for _ in range(1500)) + headers(call.path),
        )
    )()
    return HELLO + b"".join(
        (
            frame(HEADERS, END_HEADERS, 1, odd[:16_384]),
            frame(DATA, END_STREAM, 1, call.body[:9000]),
            frame(HEADERS, END_HEADERS | END_STREAM, 1, headers("/trailers")),
            conversation(call, 3),
        )
    )


def padding(call: Call, rng: Random) -> bytes:
    block = headers(call.path)
    odd = (
        frame(DATA, PADDED, 1, b"\xff" + call.body[:20]),
        frame(DATA, PADDED, 1, b"\x00"),
        frame(DATA, PADDED, 1),
        frame(HEADERS, PADDED | END_HEADERS, 3, b"\xff" + block[:30]),
        frame(HEADERS, WITH_PRIORITY | END_HEADERS, 3, b"\0\0\0\3\xff" + block),
        frame(HEADERS, WITH_PRIORITY | END_HEADERS, 3, b"\0\0"),
    )
    return HELLO + frame(HEADERS, END_HEADERS, 1, block) + rng.choice(odd) + conversation(call, 5)


def resets(call: Call, rng: Random) -> bytes:
    """Calls that begin and are taken back, or are half closed and go on."""
    found = [HELLO]
    for number in range(rng.choice((3, 300))):
        stream = 2 * number + 1
        begun = frame(HEADERS, END_HEADERS | rng.randrange(2), stream, headers(call.path))
        found.append(begun + frame(RST, 0, stream, rng.choice((bytes(4), b"\0\0\0\x08", rng.randbytes(4)))))
    return b"".join(found) + conversation(call, 2001)


def damaged(call: Call, rng: Random) -> bytes:
    """Whole conversations, some bytes of which are others."""
    raw = HELLO + b"".join(conversation(call, stream) for stream in range(1, 2 * rng.randint(1, 4), 2))
    for _ in range(rng.randint(1, 3)):
        raw = rng.choice((flip, splice))(raw, rng)
    return raw


def cut_off(call: Call, rng: Random) -> bytes:
    raw = HELLO + conversation(call)
    return raw[: rng.randint(1, len(raw))]


_KINDS: Sequence[Callable[[Call, Random], bytes]] = (
    no_preface,
    random_bytes,
    random_frames,
    lying_lengths,
    wrong_streams,
    hpack,
    continuations,
    odd_settings,
    control,
    odd_headers,
    padding,
    resets,
    damaged,
    damaged,
    cut_off,
)


def connection(call: Call, rng: random.Random) -> bytes:
    """What a peer writes on a connection before it writes no more. `call` is made somewhere on it."""
    return rng.choice(_KINDS)(call, rng)[:MAX_BYTES]
