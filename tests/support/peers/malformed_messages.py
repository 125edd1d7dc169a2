"""Messages that are almost right: valid ones of every method, and what may be wrong with their bytes.

All is drawn from a `random.Random`, so that a seed finds it again. Nothing here knows whether a message is still valid:
some are, and are served.
"""

from __future__ import annotations

import functools
import gzip
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from stepwell.v1 import models_pb2, watch_pb2
from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.rpc.triton.inference import service_pb2 as triton_pb
from support.peers.http2 import framed
from support.peers.wire import tensor
from support.triton.triton_requests import request as infer_request

Headers = list[tuple[str, str]]
Random = random.Random
MAX_BYTES = 48 << 10
"""Of a message; what claims to be larger than it is needs no bytes for that."""
SESSIONS, MODELS = "stepwell.v1.SessionService", "stepwell.v1.ModelService"
MODEL_ADMIN, WATCHES = "stepwell.v1.ModelAdminService", "stepwell.v1.WatchService"
TRITON, HEALTH = "inference.GRPCInferenceService", "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


class Call(NamedTuple):
    """A call on its way: its path, the bytes of its data, and headers beside the usual ones."""

    path: str
    body: bytes
    headers: Sequence[tuple[str, str]]
    messages: int


class Valid(NamedTuple):
    """A valid message of a method."""

    path: str
    raw: bytes
    streams: bool
    ends: bool
    """The call ends by itself; else it has a short time limit. All have one: gRPC's own servers let calls without a message
    wait for as long as they may."""


def valid(model: str, session_ids: Sequence[str], features: int, input_name: str) -> list[Valid]:
    """A few of every method, on sessions of one row of a model."""
    one, two, three = session_ids[:3]
    x = tensor(np.ones((1, features), np.float32), input_name)
    wide = tensor(np.ones((3, 2, features), np.float32), input_name)
    rows = tensor(np.ones((3, features), np.float32), input_name)
    named = infer_request((input_name, np.ones((1, 1, features), np.float32)), model=model, sequence_id=7)
    begun = infer_request(
        (input_name, np.ones((1, 1, features), np.float32)), model=model, sequence_id=7, start=True, end=True
    )
    alone = infer_request((input_name, np.ones((1, 1, features), np.float32)), model=model)
    of_sessions: dict[str, list[Message]] = {
        "OpenSession": [
            pb.OpenSessionRequest(model=model, session_id=one, batch_size=1, request_id=5),
            pb.OpenSessionRequest(model=model, session_id=two, state=[rows], model_fingerprint="f"),
        ],
        "OpenSessions": [pb.OpenSessionsRequest(model=model, session_ids=session_ids, request_id=6)],
        "CloseSession": [pb.CloseSessionRequest(session_id="fuzz-closed", request_id=7)],
        "CloseSessions": [pb.CloseSessionsRequest(session_ids=["fuzz-closed", "fuzz-gone"])],
        "GetSession": [pb.GetSessionRequest(session_id=one)],
        "ListSessions": [
            pb.ListSessionsRequest(
                model=model, page_size=3, session_id_prefix="fuzz-", idle_longer=Duration(seconds=1)
            )
        ],
        "Step": [
            pb.StepRequest(session_id=one, inputs=[x], expected_revision=1, request_id=8),
            pb.StepRequest(session_id=two, inputs=[x], outputs=pb.OUTPUT_SELECTION_LAST, output_names=["y"]),
            pb.StepRequest(session_id=three, inputs=[x], reset_mask=[True], state_rows=[0], rows=[0]),
        ],
        "ResetStates": [
            pb.ResetStatesRequest(session_id=one, rows=[0], expected_revision=1, request_id=9),
            pb.ResetStatesRequest(session_id=two, state=[rows], position=3),
        ],
        "GetState": [pb.GetStateRequest(session_id=one)],
        "GetStates": [pb.GetStatesRequest(session_ids=session_ids)],
        "ForkSession": [pb.ForkSessionRequest(session_id=one, new_session_id=two, request_id=10)],
        "ForkSessions": [
            pb.ForkSessionsRequest(
                session_ids=[one, two], new_session_ids=["fuzz-a", "fuzz-b"], request_id=11
            )
        ],
        "ExportSessions": [pb.ExportSessionsRequest(session_ids=[one, two], page_bytes=4096)],
        "ImportSessions": [
            pb.ImportSessionsRequest(
                sessions=[pb.ExportedSession(session_id=three, record=bytes(range(256)))]
            )
        ],
    }
    frames: list[Message] = [
        pb.StepStreamRequest(
            frame_id=1, step=pb.StepFrame(session_ids=[one, two, three], inputs=[rows], request_ids=[1, 2, 3])
        ),
        pb.StepStreamRequest(
            frame_id=2, step=pb.StepFrame(session_ids=[one, two, three], inputs=[wide], request_id_base=4)
        ),
        pb.StepStreamRequest(
            frame_id=3, step=pb.StepFrame(session_ids=[one, two, three], inputs=[rows], expected_revision=2)
        ),
        pb.StepStreamRequest(frame_id=4, step=pb.StepFrame(session_ids=[one], inputs=[x], timeout_ms=50)),
        pb.StepStreamRequest(
            frame_id=5, reset=pb.ResetFrame(session_ids=[one, two], batch_sizes=[1, 1], expected_revision=5)
        ),
        pb.StepStreamRequest(frame_id=6),
    ]
    found = [
        Valid(f"/{SESSIONS}/{name}", raw.SerializeToString(deterministic=True), False, True)
        for name, messages in of_sessions.items()
        for raw in messages
    ]
    found += [
        Valid(f"/{SESSIONS}/StepStream", frame.SerializeToString(deterministic=True), True, True)
        for frame in frames
    ]
    unary: list[tuple[str, str, Message]] = [
        (MODELS, "ListModels", models_pb2.ListModelsRequest()),
        (MODEL_ADMIN, "UnloadModel", models_pb2.UnloadModelRequest(name="fuzz", version=1, force=True)),
        (
            MODEL_ADMIN,
            "SetDefault",
            models_pb2.SetDefaultRequest(name="fuzz", version=1, sessions=models_pb2.SESSION_POLICY_RESET),
        ),
        (MODEL_ADMIN, "SetLabel", models_pb2.SetLabelRequest(name=model, label="fuzz", version=1)),
        (MODELS, "Predict", models_pb2.PredictRequest(model=model, inputs=[wide], state=[rows])),
        (MODELS, "ListSlowSessions", models_pb2.ListSlowSessionsRequest()),
        (MODELS, "GetModel", models_pb2.GetModelRequest(name=model)),
        (TRITON, "ServerLive", triton_pb.ServerLiveRequest()),
        (TRITON, "ServerReady", triton_pb.ServerReadyRequest()),
        (TRITON, "ModelReady", triton_pb.ModelReadyRequest(name=model)),
        (TRITON, "ServerMetadata", triton_pb.ServerMetadataRequest()),
        (TRITON, "ModelMetadata", triton_pb.ModelMetadataRequest(name=model)),
        (TRITON, "ModelConfig", triton_pb.ModelConfigRequest(name=model)),
        (TRITON, "ModelStatistics", triton_pb.ModelStatisticsRequest(name=model)),
        (TRITON, "RepositoryIndex", triton_pb.RepositoryIndexRequest(ready=True)),
        (TRITON, "RepositoryModelLoad", triton_pb.RepositoryModelLoadRequest(model_name="nothing")),
        (TRITON, "RepositoryModelUnload", triton_pb.RepositoryModelUnloadRequest(model_name="nothing")),
        (TRITON, "ModelInfer", named),
        (TRITON, "ModelInfer", begun),
        (TRITON, "ModelInfer", alone),
        (HEALTH, "Check", health_pb2.HealthCheckRequest(service=SESSIONS)),
        (SESSIONS, "NoSuchMethod", pb.GetStateRequest(session_id=one)),
    ]
    found += [
        Valid(f"/{service}/{name}", raw.SerializeToString(deterministic=True), False, True)
        for service, name, raw in unary
    ]
    found += [
        Valid(f"/{TRITON}/ModelStreamInfer", raw.SerializeToString(deterministic=True), True, True)
        for raw in (begun, named, alone)
    ]
    sent: list[tuple[str, Message]] = [
        (
            "LoadModel",
            models_pb2.LoadModelRequest(name="fuzz", version=2, path="/fuzz.keras", labels=["fuzz"]),
        ),
        ("UploadModel", models_pb2.UploadModelRequest(filename="fuzz.keras", content=b"no model")),
    ]
    found += [
        Valid(f"/{MODEL_ADMIN}/{name}", raw.SerializeToString(deterministic=True), True, True)
        for name, raw in sent
    ]
    asked = reflection_pb2.ServerReflectionRequest
    found += [
        Valid(f"/{REFLECTION}/ServerReflectionInfo", raw.SerializeToString(deterministic=True), True, True)
        for raw in (
            asked(list_services=""),
            asked(file_containing_symbol=SESSIONS),
            asked(file_by_filename="x"),
        )
    ]
    endless: list[tuple[str, str, Message]] = [
        (
            WATCHES,
            "WatchSessions",
            watch_pb2.WatchSessionsRequest(
                session_ids=[one, two], inputs=True, outputs=True, states=True, state_names=["h"], revisions=2
            ),
        ),
        (
            WATCHES,
            "WatchSessions",
            watch_pb2.WatchSessionsRequest(session_ids=session_ids, interval=Duration(seconds=1)),
        ),
        (WATCHES, "WatchServer", watch_pb2.WatchServerRequest(interval=Duration(seconds=1))),
        (HEALTH, "Watch", health_pb2.HealthCheckRequest(service="")),
    ]
    found += [
        Valid(f"/{service}/{name}", raw.SerializeToString(deterministic=True), False, False)
        for service, name, raw in endless
    ]
    return found


# --- what may be wrong with a message ---


def flip(raw: bytes, rng: Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(raw: bytes, rng: Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def splice(raw: bytes, rng: Random) -> bytes:
    """A piece is left out, repeated, or put somewhere else."""
    start = rng.randrange(len(raw))
    end = start + rng.randint(1, 24)
    piece, rest = raw[start:end], raw[:start] + raw[end:]
    at = rng.randint(0, len(rest))
    return rng.choice((rest, raw[:at] + piece * rng.randint(1, 40) + raw[at:], rest[:at] + piece + rest[at:]))


def noise(raw: bytes, rng: Random) -> bytes:
    return rng.randbytes(rng.randint(0, 2 * len(raw) + 8))


def overwrite(raw: bytes, rng: Random) -> bytes:
    """Numbers at the edges of their types, and bytes that begin something, in place of others."""
    value = rng.choice(_ODD_BYTES)
    at = rng.randrange(len(raw))
    return raw[:at] + value + raw[at + rng.choice((0, len(value))) :]


_ODD_BYTES = (
    b"\xff" * 9 + b"\x01",
    b"\xff" * 12,
    b"\x80" * 9 + b"\x00",
    b"\xff\xff\xff\xff\x0f",
    b"\xff\xff\xff\xff\x07",
    b"\x80\x80\x80\x80\x10",
    b"\x00",
    b"\x7f",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x1f",
    b"\x0b\x0c",
)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def fields_of(raw: bytes) -> list[tuple[int, int, int]]:
    """Where the fields of a message stand: start, start of the value, end. As far as they can be read."""
    found, at = [], 0
    while at < len(raw):
        start = at
        tag, at = _read_varint(raw, at)
        value, wire = at, tag & 7
        if wire == 0:
            _, at = _read_varint(raw, at)
        elif wire == 2:
            size, value = _read_varint(raw, at)
            at = value + size
        elif wire in {1, 5}:
            at += 8 if wire == 1 else 4
        else:
            break
        if at > len(raw):
            break
        found.append((start, value, at))
    return found


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(raw) and shift < 70:
        value |= (raw[at] & 127) << shift
        at += 1
        if raw[at - 1] < 128:
            break
        shift += 7
    return value, at


def refield(raw: bytes, rng: Random) -> bytes:
    """One field, here or further in: another type, number or length, or something else in its place."""
    fields = fields_of(raw)
    if not fields:
        return noise(raw, rng)
    start, value, end = rng.choice(fields)
    inner = raw[value:end]
    tag, _ = _read_varint(raw, start)
    number = tag >> 3
    if tag & 7 == 2 and inner and rng.random() < 0.5:
        changed = mutate(inner, rng)
        return raw[:start] + varint(tag) + varint(len(changed)) + changed + raw[end:]
    lengths, edges = (1, 7, 1 << 20, (1 << 31) - 1, 1 << 32, 1 << 63), (0, 1, *_EDGES)
    odd: tuple[Callable[[], bytes], ...] = (
        lambda: varint(number << 3 | rng.randrange(8)) + raw[start + len(varint(tag)) : end],
        lambda: varint(rng.choice((0, 1, 15, 16, 2047, (1 << 29) - 1)) << 3 | tag & 7) + raw[value:end],
        lambda: varint(tag) + varint(len(inner) + rng.choice(lengths)) + inner,
        lambda: varint(tag) + varint(rng.choice(edges)),
        lambda: varint(number << 3 | 2) + varint(3) + b"\xff\xfe\x80",
        lambda: raw[start:end] * rng.choice((2, 3, 300)),
        lambda: b"",
        lambda: nested(number, rng.choice((10, 90, 200, 3000))),
        lambda: varint(number << 3 | 3) * rng.choice((1, 99, 2000)),
        lambda: varint(number << 3 | 2) + varint(0),
        lambda: varint(number << 3 | 2) + varint(40) + bytes(40),
    )
    return raw[:start] + rng.choice(odd)() + raw[end:]


_EDGES = ((1 << 31) - 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1)


@functools.lru_cache(1000)
def nested(number: int, depth: int) -> bytes:
    """A message in a message, and so on."""
    found = b""
    for _ in range(depth):
        found = varint(number << 3 | 2) + varint(len(found)) + found
        if len(found) > MAX_BYTES // 2:
            break
    return found


def unknown(raw: bytes, rng: Random) -> bytes:
    """A field that nobody knows."""
    number = rng.choice((20, 100, 1000, 19_000, (1 << 29) - 1))
    more = (
        varint(number << 3) + varint(rng.getrandbits(64)),
        varint(number << 3 | 1) + rng.randbytes(8),
        varint(number << 3 | 2) + varint(9) + rng.randbytes(9),
        varint(number << 3 | 3) + varint(number << 3 | 4),
        varint(number << 3 | 3),
        varint(number << 3 | 5) + rng.randbytes(4),
    )
    return raw + rng.choice(more) if rng.random() < 0.5 else rng.choice(more) + raw


_SHAPES: Sequence[Sequence[int]] = (
    [],
    [0],
    [1],
    [-1],
    [1, 0],
    [2**31, 2**31],
    [2**62, 4],
    [1] * 33,
    [1] * 5000,
    [3, 2, 3],
    [1, 10_000, 3],
    [2**63 - 1],
    [65_537, 1],
)


def odd_tensor(raw: bytes, rng: Random) -> bytes:
    """A tensor that contradicts itself, for the field 2 and others that are one."""
    made = _odd_tensors()[rng.randrange(_ODD_TENSORS)]
    return raw + varint(rng.choice((2, 4, 5)) << 3 | 2) + varint(len(made)) + made


_ODD_TENSORS = 300


@functools.cache
def _odd_tensors() -> list[bytes]:
    rng, found = random.Random(0), []
    for _ in range(_ODD_TENSORS):
        odd = tensor(
            np.zeros(rng.choice((0, 1, 3, 12, 2000)), np.float32),
            rng.choice(("", "x", "y", "keras_tensor", "\x1f", "a" * 3000)),
            dtype=rng.choice((0, 1, 2, 3, 13, 14, 99)),
        )
        shape = b"".join(varint(axis & (1 << 64) - 1) for axis in rng.choice(_SHAPES))
        found.append(odd.SerializeToString() + b"\x1a" + varint(len(shape)) + shape)
    return found


_MUTATIONS: Sequence[Callable[[bytes, Random], bytes]] = (
    flip,
    flip,
    cut,
    splice,
    overwrite,
    overwrite,
    refield,
    refield,
    refield,
    refield,
    unknown,
    odd_tensor,
    noise,
)


def mutate(raw: bytes, rng: Random) -> bytes:
    """The same message with one to three things wrong."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not raw:
            return noise(b"12345678", rng)
        raw = rng.choice(_MUTATIONS)(raw, rng)
        if len(raw) > MAX_BYTES:
            raw = raw[:MAX_BYTES]
    return raw


# --- what may be wrong with a call ---


def misframed(raw: bytes, rng: Random) -> bytes:
    """A message whose prefix lies, or several, or none where one is due."""
    size = len(raw).to_bytes(4, "big")
    odd: tuple[Callable[[], bytes], ...] = (
        lambda: b"",
        lambda: b"\0",
        lambda: b"\0" + size,
        lambda: b"\1" + size + raw,
        lambda: bytes([rng.randrange(2, 256)]) + size + raw,
        lambda: b"\0" + (len(raw) + rng.randint(1, 9)).to_bytes(4, "big") + raw,
        lambda: b"\0" + (len(raw) // 2).to_bytes(4, "big") + raw,
        lambda: b"\0\xff\xff\xff\xff" + raw,
        lambda: b"\0" + (1 << 24).to_bytes(4, "big") + raw,
        lambda: framed(raw) + framed(raw),
        lambda: framed(raw) + b"\0\0",
        lambda: packed(gzip.compress(raw, mtime=0)),
        lambda: packed(flip(gzip.compress(raw, mtime=0), rng)),
        lambda: packed(_bomb()),
    )
    return rng.choice(odd)()


def packed(compressed: bytes) -> bytes:
    return b"\1" + len(compressed).to_bytes(4, "big") + compressed


@functools.cache
def _bomb() -> bytes:
    return gzip.compress(bytes(32 << 20), mtime=0)


_ODD_HEADERS: Sequence[tuple[str, str]] = (
    ("authorization", "Bearer nobody"),
    ("authorization", "Bearer"),
    ("authorization", "Bearer  "),
    ("authorization", "bearer \u00ff\u00fe"),
    ("authorization", "Basic bm9ib2R5"),
    ("authorization", "Bearer " + "A" * 6000),
    ("authorization", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZG1pbiJ9."),
    ("stepwell-tenant", "*"),
    ("stepwell-tenant", "watched"),
    ("stepwell-tenant", "a b,c"),
    ("grpc-timeout", "1n"),
    ("grpc-timeout", "-1S"),
    ("grpc-timeout", ""),
    ("grpc-encoding", "gzip"),
    ("grpc-encoding", "deflate"),
    ("grpc-encoding", "br"),
    ("grpc-accept-encoding", ",,,gzip"),
    ("content-type", "application/json"),
    ("content-length", "3"),
    ("te", "deflate"),
    ("traceparent", "00-zz-zz-01"),
    ("tracestate", "=" * 300),
    ("x-odd-bin", "!!!not base64!!!"),
    ("x-long", "v" * 7000),
)


def odd_call(known: Sequence[Valid], rng: Random, tokens: Sequence[str] = (), max_messages: int = 12) -> Call:
    """A call whose messages are malformed, or its headers. `tokens`: of callers that the server knows."""
    first = rng.choice(known)
    count = rng.randint(1, max_messages) if first.streams else 1
    alike = [one for one in known if one.path == first.path] if first.streams else [first]
    body = b""
    for _ in range(count):
        raw = rng.choice(alike).raw
        kind = rng.random()
        if kind < 0.9:
            body += framed(mutate(raw, rng))
        elif kind < 0.97:
            body += misframed(raw, rng)
        else:
            body += framed(raw)
    headers: Headers = []
    if tokens and rng.random() < 0.9:
        headers.append(("authorization", f"Bearer {rng.choice(tokens)}"))
    if rng.random() < 0.1:
        headers += rng.sample(_ODD_HEADERS, rng.randint(1, 3))
    if all(name != "grpc-timeout" for name, _ in headers):
        headers.append(("grpc-timeout", "3S" if first.ends else "20m"))
    return Call(first.path, body[:MAX_BYTES], headers, count)
