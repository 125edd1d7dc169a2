"""JSON over HTTP without a network: paths, bodies, queries, answers, errors, and what browsers may send."""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor

from stepwell.v1 import sessions_pb2
from stepwell_server.core.callers import Caller, Role
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.errors import InvalidInput
from stepwell_server.rpc.http import json_form
from stepwell_server.rpc.http.routes import NoRoute, Routes, WrongMethod, routes_of
from stepwell_server.rpc.steps.refusals import Refusals
from support.rpc.calls import MAX_MESSAGE_BYTES, calls
from support.rpc.fake_call import Requests
from support.rpc.http_client import HOST, JSON, SERVICES, Client, codec
from support.servers.both_fronts import needs_native

pytestmark = needs_native

# ------------------------------------------------------------------------------------------------------------ routes


def all_methods() -> list[MethodDescriptor]:
    return [method for service in SERVICES for method in service.methods]


def test_every_method_without_a_client_stream_has_a_path() -> None:
    for method in all_methods():
        assert bool(routes_of(method)) is not method.client_streaming, method.name


def test_no_get_changes_anything() -> None:
    for route in Routes(SERVICES).all:
        reads = route.method.name.startswith(("Get", "List", "WatchServer"))
        assert (route.http_method == "GET") is (reads and not route.has_body), route.template


@pytest.mark.parametrize(
    ("http_method", "path", "name", "variables"),
    [
        ("POST", "/v1/sessions", "OpenSession", {}),
        ("POST", "/v1/sessions/a", "OpenSession", {"session_id": "a"}),
        ("POST", "/v1/sessions/a%3Astep", "OpenSession", {"session_id": "a:step"}),
        ("POST", "/v1/sessions/a%2Fb%20c:step", "Step", {"session_id": "a/b c"}),
        ("POST", "/v1/sessions/x:y:reset", "ResetStates", {"session_id": "x:y"}),
        ("POST", "/v1/sessions/..:fork", "ForkSession", {"session_id": ".."}),
        ("GET", "/v1/sessions/%E6%97%A5/state", "GetState", {"session_id": "日"}),
        ("DELETE", "/v1/sessions/user:42", "CloseSession", {"session_id": "user:42"}),
        ("GET", "/v1/models/m:canary", "GetModel", {"name": "m:canary"}),
        ("POST", "/v1/models/m@2:predict", "Predict", {"model": "m@2"}),
        ("POST", "/v1/sessions:batchOpen", "OpenSessions", {}),
    ],
)
def test_a_path_leads_to_a_method(
    http_method: str, path: str, name: str, variables: Mapping[str, str]
) -> None:
    match = Routes(SERVICES).find(http_method, path)
    assert (match.route.method.name, match.variables) == (name, variables)


@pytest.mark.parametrize(
    ("http_method", "path"),
    [
        ("GET", "/v1/nothing"),
        ("GET", "/"),
        ("GET", ""),
        ("GET", "*"),
        ("GET", "/v1/sessions/a/b/state"),
        ("GET", "/v1/models/"),
        ("POST", "/v1/sessions/:step"),
        ("POST", "/v1/sessions/u:stpe"),
        ("POST", "/v1/sessions/u:step:again"),
        ("POST", "/v1/sessions/:open"),
        ("POST", "/stepwell.v1.SessionService/Step"),
    ],
)
def test_other_paths_lead_nowhere(http_method: str, path: str) -> None:
    with pytest.raises(NoRoute):
        Routes(SERVICES).find(http_method, path)


def test_another_http_method_is_named_with_those_allowed() -> None:
    with pytest.raises(WrongMethod) as caught:
        Routes(SERVICES).find("PUT", "/v1/sessions/a")
    assert caught.value.allowed == ["DELETE", "GET", "POST"]


# -------------------------------------------------------------------------------------------------------------- JSON


def read(document: object) -> sessions_pb2.OpenSessionRequest:
    message = sessions_pb2.OpenSessionRequest()
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    json_form.read_body(raw, message, codec())
    return message


def test_each_kind_of_field_is_read_and_written() -> None:
    document = {
        "model": "m",
        "batchSize": 2,
        "must_be_new": True,
        "request_id": str(2**64 - 1),
        "max_idle": "3.500s",
        "unknown": {"is": "ignored"},
        "model_fingerprint": None,
        "state": [
            {"name": "h", "dtype": "DATA_TYPE_FLOAT32", "shape": ["1", 2.0], "values": [0.5, -1]},
            {"name": "c", "dtype": 1, "data": "AAAAP_-_"},
            {"values": ["NaN", "-Infinity", "1e3", 7]},
        ],
    }
    message = read(document)
    assert json_form.to_object(message) == {
        "model": "m",
        "batch_size": 2,
        "must_be_new": True,
        "request_id": str(2**64 - 1),
        "max_idle": "3.500s",
        "state": [
            {"name": "h", "dtype": "DATA_TYPE_FLOAT32", "shape": ["1", "2"], "values": [0.5, -1.0]},
            {"name": "c", "dtype": "DATA_TYPE_FLOAT32", "data": "AAAAP/+/"},
            {"values": ["NaN", "-Infinity", 1000.0, 7.0]},
        ],
    }
    again = sessions_pb2.OpenSessionRequest()
    json_form.read_body(json_form.dump(message, codec()), again, codec())
    assert again == message


def test_long_lists_keep_every_number() -> None:
    values = np.random.default_rng(3).normal(size=5000).tolist()
    message = read({"state": [{"values": values}]})
    assert list(message.state[0].values) == values
    assert json.loads(json_form.dump(message, codec())) == {"state": [{"values": values}]}


@pytest.mark.parametrize("size", [1, 5000])
def test_small_and_large_messages_have_the_same_form(size: int) -> None:
    message = read({"model": 'a "b"\n\u2028ü', "request_id": 7, "state": [{"values": [0.5] * size}, {}]})
    numbers = ", ".join(["0.5"] * size)
    wanted = (
        f'{{"model": "a \\"b\\"\\n\u2028ü", "state": [{{"values": [{numbers}]}}, {{}}], "request_id": "7"}}'
    )
    assert json_form.dump(message, codec()).decode() == wanted


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b" ", "the body must be a JSON object: EOF while parsing a value at line 1 column 1"),
        (b"{", "the body must be a JSON object: EOF while parsing an object"),
        (b"{}}", "the body must be a JSON object: trailing characters at line 1 column 3"),
        (
            b'{"model": "\xff"}',
            "the body must be a JSON object: invalid unicode code point at line 1 column 13",
        ),
        ([1], "the body must be a JSON object; got a list"),
        (b"[" * 100_000, "the body must be a JSON object: recursion limit exceeded"),
        (b'{"model": "a", "model": "b"}', 'each field must be given once; got "model" twice'),
        ({"must_be_new": 1}, "must_be_new must be true or false; got 1"),
        ({"batch_size": True}, "batch_size must be an integer from 0 to 4294967295; got true"),
        ({"batch_size": -1}, "batch_size must be an integer from 0 to 4294967295; got -1"),
        ({"batch_size": 1.5}, "batch_size must be an integer from 0 to 4294967295; got 1.5"),
        ({"request_id": str(2**64)}, f'request_id must be an integer from 0 to {2**64 - 1}; got "{2**64}"'),
        ({"model": 5}, "model must be a string; got 5"),
        (b'{"model": "\\ud800"}', "the body must be a JSON object: unexpected end of hex escape"),
        ({"state": {}}, "state must be a list; got an object"),
        ({"state": [None]}, "state[0] must be an object; got null"),
        ({"state": [{"data": "*"}]}, 'state[0].data must be bytes in base64; got "*"'),
        ({"state": [{"dtype": "FLOAT"}]}, "state[0].dtype must be one of DATA_TYPE_UNSPECIFIED, "),
        ({"state": [{"values": [1, None]}]}, "state[0].values[1] must be a number"),
        ({"state": [{"values": [1, "one"]}]}, 'got "one"'),
        ({"state": [{"values": [True]}]}, "state[0].values[0] must be a number"),
        (
            b'{"state": [{"values": [1e999]}]}',
            "the body must be a JSON object: number out of range at line 1 column 28",
        ),
        (b'{"state": [{"values": [1, NaN]}]}', 'NaN must be a string, "NaN"'),
        ({"max_idle": "soon"}, 'max_idle must be a duration such as "3.5s"; got "soon"'),
        (b'{"state": [' + b"1," * 150_001 + b"1]}", "the body must have at most 150000 commas"),
        (b'{"batch_size": ' + b"1" * 5000 + b"}", "number out of range"),
        ({f"f{i}": 1 for i in range(1025)}, "an object in the body must have at most 1024 fields; got more"),
        ({"state": [{}] * 4097}, "state must have at most 4096 entries; got 4097"),
    ],
)
def test_a_body_that_is_not_the_message_is_refused(document: object, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(document)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("verbose=1", 'Could not find field "verbose" in the query; the parameters are '),
        ("page_size=many", 'page_size must be an integer from 0 to 4294967295; got "many"'),
        ("model=a&model=b", 'model must be given once; got it again with the value "b"'),
        ("model", "the query must be NAME=VALUE pairs in UTF-8"),
        ("model=%FF", "the query must be NAME=VALUE pairs in UTF-8"),
    ],
)
def test_a_query_that_is_not_the_message_is_refused(query: str, words: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        json_form.read_query(query, sessions_pb2.ListSessionsRequest())
    assert words in caught.value.message


def test_a_long_list_of_numbers_may_belong_to_any_field() -> None:
    values = [float(number) for number in range(100)]
    message = read({"state": [{"shape": values, "values": [*values, "NaN"]}]})
    assert list(message.state[0].shape) == values
    assert list(message.state[0].values)[:-1] == values
    for document, words in (
        ({"state": [{"shape": [*values, 0.5]}]}, "state[0].shape[100] must be an integer"),
        ({"state": [{"name": values}]}, "state[0].name must be a string; got a list"),
        ({"state": [{"data": values}]}, "state[0].data must be bytes in base64; got a list"),
        ({"state": values}, "state[0] must be an object; got 0.0"),
        ({"max_idle": values}, "max_idle must be a duration"),
        (values, "the body must be a JSON object; got a list"),
    ):
        with pytest.raises(InvalidInput) as caught:
            read(document)
        assert words in caught.value.message


def test_long_bytes_are_read_whole() -> None:
    data = random.randbytes(200_000)
    text = base64.b64encode(data).decode()
    assert read({"state": [{"data": text}]}).state[0].data == data
    assert read({"state": [{"data": text.rstrip("=")}]}).state[0].data == data
    with pytest.raises(InvalidInput):
        read({"state": [{"data": text[: 64 << 10] + "AA==" + text}]})
    with pytest.raises(InvalidInput):
        read({"state": [{"data": text[: (64 << 10) - 2] + "==" + text}]})


# -------------------------------------------------------------------------------------------------------------- calls


async def test_a_session_is_opened_stepped_read_forked_and_closed() -> None:
    async with calls() as at:
        client = Client(at)
        status, opened = await client.json("POST", "/v1/sessions/user%3A42", {"model": "plain"})
        assert (status, opened["session"]["session_id"]) == (200, "user:42")
        step = {"inputs": [{"values": [1, 2]}], "request_id": "5", "expected_revision": 0}
        status, stepped = await client.json("POST", "/v1/sessions/user:42:step", step)
        assert (status, stepped["revision"]) == (200, "1")
        assert stepped["outputs"][0]["shape"] == ["1", "2"]
        assert await client.json("POST", "/v1/sessions/user:42:step", step) == (
            200,
            {**stepped, "replayed": True},
        )
        path = "/v1/sessions/user%3A42/state"
        _, numbers = await client.json("GET", f"{path}?tensor_format=TENSOR_FORMAT_VALUES")
        _, data = await client.json("GET", path)
        for one, other in zip(numbers["state"], data["state"], strict=True):
            assert np.float32(one["values"]).tobytes() == base64.b64decode(other["data"])
        status, forked = await client.json("POST", "/v1/sessions/user:42:fork", {"new_session_id": "twin"})
        assert (status, forked["session"]["revision"]) == (200, "1")
        _, listed = await client.json("GET", "/v1/sessions?page_size=1")
        assert [session["session_id"] for session in listed["sessions"]] == ["twin"]
        assert await client.json("DELETE", "/v1/sessions/twin") == (200, {})
        status, error = await client.json("GET", "/v1/sessions/twin")
        assert (status, error["code"]) == (404, 5)
        assert error["details"][0]["reason"] == "SESSION_NOT_FOUND"
        assert client.refused == []


async def test_a_load_is_answered_when_it_ends() -> None:
    async with calls() as at:
        client = Client(at)
        status, error = await client.json("POST", "/v1/models/other:load", {"path": "/nowhere.keras"})
        assert (status, error["code"]) != (200, 0)
        assert error["details"][0]["domain"] == "stepwell"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/v1/nothing", None, 404, "Could not resolve /v1/nothing to a method"),
        ("GET", "/v1/sessions/a:step", None, 405, "/v1/sessions/a:step must be called with POST; got GET"),
        ("HEAD", "/v1/models", None, 405, "/v1/models must be called with GET; got HEAD"),
        ("HEAD", "/openapi.json", None, 405, "/openapi.json must be called with GET; got HEAD"),
        ("GET", "/v1/sessions/%FF", None, 400, "the path must be percent-encoded UTF-8"),
        ("GET", "/v1/models?verbose=1", None, 400, 'Could not find field "verbose"'),
        ("GET", "/v1/models", {}, 400, "the body must be empty for GET /v1/models; got 2 bytes"),
        ("POST", "/v1/sessions/a:step", {"session_id": "b"}, 400, "session_id must be left out of the body"),
        ("POST", "/v1/sessions", {"model": "x" * 2000}, 400, "model must have at most 1024 bytes; got 2000"),
    ],
)
async def test_bad_requests_are_refused(
    method: str, path: str, body: object, status: int, words: str
) -> None:
    async with calls() as at:
        found, error = await Client(at).json(method, path, body)
        assert (found, words in error["message"]) == (status, True), error
        assert error["details"][0]["domain"] == "stepwell"


@pytest.mark.parametrize(
    "body", [b'{"session_id": "\\ud800"}', b'{"\\ud800": 1}', b'{"a": "\\ud800\\u0041"}']
)
async def test_half_a_surrogate_pair_is_refused(body: bytes) -> None:
    async with calls() as at:
        answer = await Client(at).send("POST", "/v1/sessions", body, JSON)
        error = json.loads(answer.body)
        assert (answer.status, "hex escape at line 1 column " in error["message"]) == (400, True), error


async def test_refusals_of_the_front_are_json_too() -> None:
    async with calls() as at:
        door = Client(at).door
        overloaded = Refusals(MAX_MESSAGE_BYTES, Requests()).overloaded()
        found = door.refusals(FrontLimits(MAX_MESSAGE_BYTES), overloaded)
        assert {name: answer.status for name, answer in found.items()} == {
            "overloaded": 429,
            "headers_too_large": 431,
            "body_too_large": 413,
            "malformed": 400,
            "two_lengths": 400,
            "slow": 408,
            "bad_timeout": 400,
            "late": 504,
            "failed": 500,
        }
        assert dict(found["overloaded"].headers)["retry-after"] == "1"
        for answer in found.values():
            assert json.loads(answer.body)["details"][0]["reason"]


# ----------------------------------------------------------------------------------------------------------- browsers

WHO = (("ann", "acme"), ("bob", "zeta"))
APP, EVIL = "https://app.example.org", "https://evil.example"


@pytest.mark.parametrize(
    ("origins", "is_open", "headers", "allowed"),
    [
        ((), True, {}, True),
        ((), True, {":authority": "localhost:8080"}, True),
        ((), True, {":authority": "[::1]:8080"}, True),
        ((), True, {":authority": "127.9.9.9"}, True),
        ((), True, {":authority": "evil.example:8080"}, False),
        ((), True, {":authority": "localhost.evil.example"}, False),
        ((), True, {":authority": "127.0.0.1.evil.example"}, False),
        ((), True, {":authority": "evil.example@localhost"}, False),
        ((), True, {":authority": "localhost:port"}, False),
        ((), True, {":authority": "[::1"}, False),
        ((), True, {":authority": "evil.example:8080", "origin": "http://evil.example:8080"}, False),
        ((), False, {":authority": "stepwell.example:8080"}, True),
        ((), True, {"origin": f"http://{HOST}"}, True),
        ((), True, {"origin": "http://127.0.0.1:3000"}, False),
        ((), True, {"origin": f"https://{HOST}"}, False),
        ((), True, {"origin": "null"}, False),
        ((), False, {"origin": EVIL}, False),
        ((APP,), True, {"origin": APP}, True),
        ((APP,), True, {"origin": EVIL}, False),
        ((APP,), True, {"origin": APP, ":authority": "app.example.org"}, True),
        (("*",), True, {"origin": EVIL, ":authority": "evil.example"}, True),
        ((), True, {"sec-fetch-site": "same-origin"}, True),
        ((), True, {"sec-fetch-site": "none"}, True),
        ((), True, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, False),
        ((), True, {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, False),
        ((), True, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),
    ],
)
async def test_only_pages_of_the_server_and_of_allowed_origins_are_answered(
    origins: Sequence[str], is_open: bool, headers: Mapping[str, str], allowed: bool
) -> None:
    async with calls() as at:
        client = Client(at, *origins, is_open=is_open)
        answer = await client.send("GET", "/v1/models", b"", headers)
        assert answer.status == (200 if allowed else 403), answer.body
        assert client.refused == ([] if allowed else ["PERMISSION_DENIED"])
        shown = dict(answer.headers).get("access-control-allow-origin")
        assert shown == (headers.get("origin") if origins and allowed else None)


async def test_a_link_on_another_site_changes_nothing() -> None:
    async with calls() as at:
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
        answer = await Client(at).send("POST", "/v1/sessions", b'{"model": "plain"}', {**JSON, **link})
        assert answer.status == 403
        assert (await at.at.engine.list_sessions())[0] == []


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=UTF-8", 200),
        (None, 415),
        ("", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("text/plain; application/json", 415),
        ("application/json; charset=utf-16", 415),
    ],
)
async def test_a_change_needs_the_type_that_forms_cannot_send(kind: str | None, status: int) -> None:
    async with calls() as at:
        headers = {} if kind is None else {"content-type": kind}
        answer = await Client(at).send("POST", "/v1/sessions/a", b'{"model": "plain"}', headers)
        assert answer.status == status
        assert len((await at.at.engine.list_sessions())[0]) == (status == 200)


async def test_a_compressed_body_is_refused() -> None:
    async with calls() as at:
        client = Client(at)
        headers = {**JSON, "content-encoding": "gzip"}
        refused = await client.send("POST", "/v1/sessions", gzip.compress(b'{"model": "plain"}'), headers)
        assert (refused.status, b"content-encoding: gzip" in refused.body) == (415, True)
        headers["content-encoding"] = "identity"
        assert (await client.send("POST", "/v1/sessions", b'{"model": "plain"}', headers)).status == 200


async def test_a_browser_that_asks_first_learns_what_it_may_send() -> None:
    async with calls() as at:
        client = Client(at, APP)
        asked = {"access-control-request-method": "POST", "origin": APP}
        answer = await client.send("OPTIONS", "/v1/sessions", b"", asked)
        headers = dict(answer.headers)
        assert len(headers) == len(answer.headers), "browsers refuse an answer that allows an origin twice"
        assert (answer.status, headers["access-control-allow-origin"]) == (200, APP)
        assert {"content-type", "authorization"} <= {*headers["access-control-allow-headers"].split(", ")}
        refused = await client.send("OPTIONS", "/v1/sessions", b"", {**asked, "origin": EVIL})
        assert refused.status == 403
        assert "access-control-allow-origin" not in dict(refused.headers)


# ------------------------------------------------------------------------------------------------------------ callers


async def test_headers_are_the_metadata_of_the_call() -> None:
    async with calls() as at:
        headers = {**JSON, "stepwell-tenant": "acme"}
        answer = await Client(at).send("POST", "/v1/sessions/a", b'{"model": "plain"}', headers)
        assert (answer.status, json.loads(answer.body)["code"]) == (400, 3)
        assert "stepwell-tenant must not be sent" in json.loads(answer.body)["message"]


async def test_each_caller_has_its_own_sessions() -> None:
    async with calls() as at:
        ann, bob = (Client(at.of(Caller(name, tenant, Role.USER))) for name, tenant in WHO)
        assert (await ann.json("POST", "/v1/sessions/a", {"model": "plain"}))[0] == 200
        assert (await ann.json("GET", "/v1/sessions/a"))[0] == 200
        status, error = await bob.json("GET", "/v1/sessions/a")
        assert (status, error["details"][0]["reason"]) == (404, "SESSION_NOT_FOUND")
