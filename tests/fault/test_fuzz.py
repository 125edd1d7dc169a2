"""Malformed messages and connections, a few of them on each front; `make fuzz` sends very many.

And the fuzzer itself: what it is there to find, it finds.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fault.fuzz import FUZZED, Fuzz, Tokens
from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2
from stepwell_server.rpc.http.routes import WATCH_PATH, Routes
from stepwell_server.rpc.triton.inference import service_pb2
from support.peers import malformed_http, malformed_http2, malformed_messages
from support.rpc.http_client import SERVICES
from support.servers.both_fronts import needs_native

MESSAGES, CONNECTIONS, REQUESTS = 1000, 100, 400
#: What is planted into a server: its folder is where Python looks for modules first.
PLANTED = """
import os
from stepwell_server.rpc import boundary

parse = boundary.parse

def planted(message_type, raw):
    if message_type.__name__ == "ForkSessionRequest":
        raise RuntimeError("planted")
    if message_type.__name__ == "ExportSessionsRequest" and not os.path.exists(__file__ + ".done"):
        open(__file__ + ".done", "w").close()
        os.abort()
    return parse(message_type, raw)

boundary.parse = planted
"""
KNOWN = malformed_messages.valid("seq", FUZZED, 3, "x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("front", "asks"),
    [
        pytest.param("native", False, marks=needs_native),
        pytest.param("native", True, marks=needs_native),
        ("python", True),
    ],
)
def test_nothing_malformed_breaks_a_server_or_changes_a_session(
    front: str, asks: bool, tmp_path: Path
) -> None:
    tokens = Tokens.make(tmp_path) if asks else None
    found = Fuzz(front, 5, tmp_path, tokens=tokens).run(MESSAGES, CONNECTIONS, REQUESTS)
    assert (found.crashes, found.changed) == ([], set())
    assert found.messages >= MESSAGES
    assert found.ended["0"], "some are served all the same"
    assert sum(found.ended.values()) == found.calls, "each call has had an end"
    assert found.connections == CONNECTIONS
    assert bool(found.ended["16"]) is asks
    if front == "native":
        assert found.requests == REQUESTS
        assert found.answered["200"], "some are served all the same"
        assert not found.answered["500"]
        assert bool(found.answered["401"]) is asks


@pytest.mark.slow
@needs_native
def test_the_fuzzer_finds_defects_and_crashes(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    environment = {"PYTHONPATH": str(tmp_path)}
    found = Fuzz("native", 5, tmp_path / "kept", environment=environment).run(600, 0)
    assert any("RuntimeError: planted" in crash for crash in found.crashes)
    assert any("the server's process has ended" in crash for crash in found.crashes)
    assert len(list((tmp_path / "kept").iterdir())) == len(found.crashes)
    assert found.messages >= 600, "it goes on with a server that is well"


def test_every_method_is_fuzzed() -> None:
    """But for one that may end the watched sessions, rightly."""
    services = (
        *(one.DESCRIPTOR.services_by_name.values() for one in (sessions_pb2, models_pb2, watch_pb2)),
        service_pb2.DESCRIPTOR.services_by_name.values(),
    )
    methods = {
        f"/{service.full_name}/{method.name}"
        for file in services
        for service in file
        for method in service.methods
    }
    fuzzed = {one.path for one in KNOWN}
    assert methods - fuzzed == {"/stepwell.v1.SessionService/CloseMatchingSessions"}


def test_every_method_with_a_path_is_fuzzed_over_http() -> None:
    paths = {(one.method, one.target.partition("?")[0]) for one in malformed_http.valid(KNOWN)}
    of_fuzzed = {one.path for one in KNOWN}
    routes = [route for route in Routes(SERVICES).all if route.path in of_fuzzed]
    assert len(routes) > 20
    assert ("POST", WATCH_PATH) in paths
    for route in routes:
        pattern = re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(route.template)))
        assert any(method == route.http_method and pattern.fullmatch(path) for method, path in paths), route


@settings(max_examples=50)
@given(st.randoms(use_true_random=False))
def test_requests_are_found_again_by_their_seed(rng: malformed_messages.Random) -> None:
    known, state = malformed_http.valid(KNOWN), rng.getstate()
    raw = malformed_http.connection(known, rng)
    rng.setstate(state)
    assert malformed_http.connection(known, rng) == raw
    assert len(raw) <= malformed_http2.MAX_BYTES


@settings(max_examples=50)
@given(st.randoms(use_true_random=False))
def test_what_is_sent_is_bounded_and_found_again_by_its_seed(rng: malformed_messages.Random) -> None:
    state = rng.getstate()
    call = malformed_messages.odd_call(KNOWN, rng)
    rng.setstate(state)
    assert malformed_messages.odd_call(KNOWN, rng) == call
    assert len(call.body) <= malformed_messages.MAX_BYTES


def test_the_valid_messages_are_the_same_bytes_in_each_process() -> None:
    """The entries of a map come in any order, another one in each process, unless they are sorted."""
    requests = [one.raw for one in KNOWN if one.path.endswith(("/ModelInfer", "/ModelStreamInfer"))]
    assert len(requests) == 6
    for raw in requests:
        parsed = service_pb2.ModelInferRequest.FromString(raw)
        assert parsed.SerializeToString(deterministic=True) == raw
