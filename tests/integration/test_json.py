"""JSON over HTTP: the server itself and an Envoy before it answer alike."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from support import secured
from support.models import programs
from support.peers import wire
from support.peers.json_client import JsonClient, X, path_of, step_body
from support.peers.wire import Wire, tensor
from support.secured import Server
from support.servers.both_fronts import needs_native
from support.servers.envoy import Envoy
from support.servers.served import local_server

pytestmark = needs_native
AS_VALUES = "tensor_format=TENSOR_FORMAT_VALUES"
ORIGIN = ("--cors-origin", "https://app.example.org")


@pytest.fixture(scope="module", params=["server", "envoy"])
def kind(request: pytest.FixtureRequest) -> str:
    """Who answers JSON."""
    if secured.is_on():
        pytest.skip("the servers here are without TLS; there is a test with it")
    return str(request.param)


@pytest.fixture(scope="module")
def server(kind: str) -> Iterator[Server]:
    options = ["--http-listen", "127.0.0.1:0", *ORIGIN] if kind == "server" else []
    with local_server("seq", extra_args=options) as running:
        yield running


@pytest.fixture(scope="module")
def door(kind: str, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JsonClient]:
    if kind == "server":
        yield JsonClient(server.http_address or "")
        return
    with Envoy(tmp_path_factory.mktemp("envoy"), [server.address], *ORIGIN) as envoy:
        yield envoy


def test_json_opens_steps_reads_and_resets(door: JsonClient, server: Server) -> None:
    inputs = [tensor(np.array([X], np.float32))]
    with Wire(server.address) as one:
        wanted = one.predict("seq", inputs)
    path = path_of("from curl")
    status, opened = door.json("POST", path, {"model": "seq"})
    assert (status, opened["session"]["session_id"], opened["session"]["batch_size"]) == (200, "from curl", 1)
    status, stepped = door.json("POST", f"{path}:step", step_body(request_id=5, expected_revision=0))
    assert (status, stepped["revision"], stepped["position"]) == (200, "1", "1")
    (output,) = stepped["outputs"]
    assert (output["name"], output["dtype"], output["shape"]) == ("y", "DATA_TYPE_FLOAT32", ["1", "2"])
    assert np.float32(output["values"]).tobytes() == wanted.outputs[0].data
    status, again = door.json("POST", f"{path}:step", step_body(request_id="5", expected_revision="0"))
    assert (status, again) == (200, {**stepped, "replayed": True})
    status, read = door.json("GET", f"{path}/state?{AS_VALUES}")
    assert (status, read["session"]["revision"]) == (200, "1")
    for found, state in zip(read["state"], wanted.state, strict=True):
        assert found["name"] == state.name
        assert np.float32(found["values"]).tobytes() == state.data
    status, in_bytes = door.json("GET", f"{path}/state")
    assert [base64.b64decode(state["data"]) for state in in_bytes["state"]] == [
        state.data for state in wanted.state
    ]
    status, reset = door.json("POST", f"{path}:reset", {})
    assert (status, reset) == (200, {"revision": "2", "model_version": "1"})
    assert door.json("GET", path)[1]["session"]["revision"] == "2"
    assert door.json("DELETE", path) == (200, {})
    assert door.json("GET", path)[0] == 404
    status, predicted = door.json("POST", "/v1/models/seq:predict", step_body())
    assert np.float32(predicted["outputs"][0]["values"]).tobytes() == wanted.outputs[0].data
    assert [model["name"] for model in door.json("GET", "/v1/models")[1]["models"]] == ["seq"]


def test_a_load_is_answered_with_its_stages(door: JsonClient) -> None:
    body = {"path": str(programs.saved("lstm_dense").path)}
    status, replies = door.json("POST", "/v1/models/loaded:load", body)
    assert status == 200
    *stages, last = replies
    assert all({*reply} == {"stage"} for reply in stages)
    assert (last["model"]["name"], last["version"]) == ("loaded", "1")
    status, error = door.json("POST", "/v1/models/loaded:load", {"path": "/nowhere.keras"})
    assert status != 200
    assert "/nowhere.keras" in error["message"]


BAD: dict[str, tuple[str, str, object, int, int, str]] = {
    "no such session": (
        "GET",
        "/v1/sessions/nobody",
        None,
        404,
        5,
        "must be that of an open session; got 'nobody'",
    ),
    "no such model": (
        "POST",
        "/v1/sessions",
        {"model": "nope"},
        404,
        5,
        "'seq']; got 'nope'",
    ),
    "a wrong shape": (
        "POST",
        "/v1/models/seq:predict",
        {"inputs": [{"values": [1, 2]}]},
        400,
        3,
        "input 'x' must have shape (1, 3) or (1, T, 3); got (1, 2)",
    ),
    "no such path": ("GET", "/v1/nothing", None, 404, 5, "Could not resolve /v1/nothing to a method"),
    "another session in the body": (
        "POST",
        "/v1/sessions/a:step",
        step_body(session_id="b"),
        400,
        3,
        "session_id",
    ),
    "no such parameter": ("GET", "/v1/models?verbose=1", None, 400, 3, 'Could not find field "verbose"'),
    "no number": (
        "POST",
        "/v1/sessions/a:step",
        {"inputs": [{"values": ["one"]}]},
        400,
        3,
        '"one"',
    ),
    "no document": ("POST", "/v1/sessions", [1], 400, 3, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_json_with_their_codes(door: JsonClient, name: str) -> None:
    method, path, body, status, code, words = BAD[name]
    found, answer = door.json(method, path, body)
    assert (found, answer["code"]) == (status, code)
    assert words in answer["message"]


def test_an_error_of_a_replica_says_its_reason(door: JsonClient) -> None:
    status, answer = door.json("POST", path_of("nobody") + ":step", step_body())
    assert status == 404
    (info,) = answer["details"]
    assert info["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
    assert (info["reason"], info["domain"]) == ("SESSION_NOT_FOUND", "stepwell")


RAW: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "more than JSON": b"{}}",
    "a number too large": b'{"inputs": [{"values": [1e999]}]}',
    "half a character": b'{"session_id": "\xc3"}',
    "bytes that are not": b'{"inputs": [{"data": "*"}]}',
    "no number of 64 bits": b'{"request_id": "99999999999999999999"}',
    "deep": b'{"inputs": ' * 500 + b"[" * 500,
    "random": bytes(range(256)),
}


@pytest.mark.parametrize("name", RAW)
def test_a_body_that_is_no_message_is_refused(door: JsonClient, name: str) -> None:
    status, answer, headers = door.http(
        "POST", "/v1/models/seq:predict", RAW[name], {"content-type": "application/json"}
    )
    assert (status, headers.get_content_type()) == (400, "application/json")
    assert json.loads(answer)["code"] == 3


def test_a_call_without_a_body_has_an_empty_message(door: JsonClient) -> None:
    path = path_of("without a body")
    door.json("POST", path, {"model": "seq"})
    for headers in ({}, {"content-type": "application/json"}):
        assert door.http("POST", f"{path}:reset", headers=headers)[0] == 200
    status, answer, _ = door.http("POST", f"{path}:step")
    assert (status, json.loads(answer)["code"]) == (400, 3), "inputs are missing"
    status, answer, _ = door.http("POST", "/v1/sessions/nobody:reset")
    assert (status, json.loads(answer)["code"]) == (404, 5)
    assert door.json("GET", path)[1]["session"]["revision"] == "2"


def test_a_page_of_another_origin_may_not_call_without_a_body(door: JsonClient) -> None:
    """A browser sends such a request without asking first."""
    path = path_of("not without a body")
    door.json("POST", path, {"model": "seq"})
    status, _, _ = door.http("POST", f"{path}:reset", headers={"origin": "https://evil.example"})
    assert status == 403
    assert door.json("GET", path)[1]["session"].get("revision", "0") == "0"


@pytest.mark.parametrize(
    "session_id", ["user:42", "a/b c", "a:step", "..", "Jürgen %41+?&", "x:y:reset", "日本"]
)
def test_an_id_may_be_anything(door: JsonClient, session_id: str) -> None:
    path = path_of(session_id)
    status, opened = door.json("POST", path, {"model": "seq"})
    assert (status, opened["session"]["session_id"]) == (200, session_id)
    assert door.json("POST", f"{path}:step", step_body())[1]["revision"] == "1"
    assert door.json("GET", f"{path}/state?{AS_VALUES}")[1]["session"]["session_id"] == session_id
    assert door.json("DELETE", path)[0] == 200


@pytest.mark.parametrize("end", ["u:stpe", "u:open", "u:step:again", ":open"])
def test_a_call_that_there_is_not_opens_nothing(door: JsonClient, server: Server, end: str) -> None:
    status, answer = door.json("POST", f"/v1/sessions/{end}", {"model": "seq"})
    assert (status, answer["code"]) == (404, 5)
    assert answer["message"] == "no such call; in the id of a session to open, a colon is %3A"
    with Wire(server.address) as one:
        listed = one.sessions.ListSessions(pb.ListSessionsRequest(), timeout=wire.TIMEOUT_S)
    assert not any(":" in session.session_id for session in listed.sessions)


def test_a_browser_may_call(door: JsonClient) -> None:
    asked = {"origin": "https://app.example.org", "access-control-request-method": "POST"}
    status, _, headers = door.http("OPTIONS", "/v1/sessions", headers=asked)
    assert (status, headers["access-control-allow-origin"]) == (200, asked["origin"])
    assert "content-type" in headers["access-control-allow-headers"]
    _, _, others = door.http("OPTIONS", "/v1/sessions", headers={**asked, "origin": "https://example.com"})
    assert "access-control-allow-origin" not in others
    _, _, headers = door.http("GET", "/v1/models", headers={"origin": asked["origin"]})
    assert headers["access-control-allow-origin"] == asked["origin"]


def test_a_page_of_another_origin_may_do_nothing(door: JsonClient) -> None:
    path = path_of("not by others")
    other = {"origin": "https://evil.example"}
    for body in ({"model": "seq"}, {}):
        # what a browser sends without asking first
        status, answer = door.json("POST", path, body, {**other, "content-type": "text/plain"})
        assert (status, answer["code"]) == (403, 7)
        assert "--cors-origin" in answer["message"]
    assert door.json("GET", path)[0] == 404
    assert door.json("POST", path, {"model": "seq"}, {"origin": "https://app.example.org"})[0] == 200
    assert door.json("DELETE", path, headers=other)[0] == 403
    assert door.json("DELETE", path)[0] == 200


def test_a_page_whose_name_leads_here_may_do_nothing(door: JsonClient) -> None:
    port = door.address.rpartition(":")[2]
    for host in ("localhost", "127.0.0.1", "[::1]"):
        assert door.json("GET", "/v1/models", headers={"host": f"{host}:{port}"})[0] == 200
    status, answer = door.json("GET", "/v1/models", headers={"host": f"evil.example:{port}"})
    assert (status, answer["code"]) == (403, 7)
