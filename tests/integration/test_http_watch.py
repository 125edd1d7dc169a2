"""Watches over HTTP from a real server: every event against the replies of steps, callers, bad clients, and the end."""

from __future__ import annotations

import base64
import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.auth import token_file
from stepwell_server.rpc.http.routes import WATCH_PATH
from support.peers import curl
from support.peers.events import EventReader, events_of
from support.peers.json_client import JsonClient, path_of, step_body
from support.secured import Server
from support.servers.attacked_server import TIMEOUT_S, AttackedServer, target
from support.servers.both_fronts import needs_native
from support.servers.closed_server import HTTP, Secured
from support.servers.served import local_server
from support.servers.server_process import FEATURES, serve, tensor

pytestmark = [needs_native, pytest.mark.plain("the tests secure their servers themselves")]
ALL = {"inputs": True, "outputs": True, "states": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with local_server("seq", extra_args=[*HTTP, "--cors-origin", "https://app.example.org"]) as running:
        yield running


@pytest.fixture
def client(server: Server) -> JsonClient:
    return JsonClient(server.http_address or "")


def opened(client: JsonClient, name: str) -> str:
    """The id of a new session."""
    status, answer = client.json("POST", path_of(name), {"model": "seq"})
    assert status == 200, answer
    return name


def watched(**fields: Any) -> dict[str, Any]:
    return {"sessions": {**ALL, **fields}}


def stepped(client: JsonClient, name: str, values: np.ndarray[Any, Any], **fields: Any) -> Any:
    """The reply to a step with these values."""
    tensor = {"data": base64.b64encode(values.tobytes()).decode(), "dtype": "DATA_TYPE_FLOAT32"}
    body = {"inputs": [{**tensor, "shape": [1, 3]}], **fields}
    status, answer = client.json("POST", f"{path_of(name)}:step", body)
    assert status == 200, answer
    return answer


def data(tensors: list[Any]) -> dict[str, str]:
    return {tensor["name"]: tensor["data"] for tensor in tensors}


def test_each_change_is_an_event_with_what_the_replies_say(client: JsonClient) -> None:
    rng = np.random.default_rng(11)
    name = opened(client, "watched")
    with client.events(WATCH_PATH, watched(session_ids=[name])) as events:
        assert (events.status, events.headers["content-type"]) == (200, "text/event-stream")
        (present,) = events.next()["events"]
        assert (present["kind"], present["model"]) == ("SESSION_EVENT_KIND_PRESENT", "seq")
        for revision in range(1, 21):
            x = rng.standard_normal((1, 3)).astype(np.float32)
            reply = stepped(client, name, x)
            (event,) = events.next()["events"]
            assert (event["kind"], event["revision"]) == ("SESSION_EVENT_KIND_STEP", str(revision))
            assert data(event["inputs"]) == {"x": base64.b64encode(x.tobytes()).decode()}
            assert data(event["outputs"]) == data(reply["outputs"])
            read = client.json("GET", f"{path_of(name)}/state")[1]
            assert data(event["states"]) == data(read["state"])
        client.json("DELETE", path_of(name))
        ((ended,),) = [event.data["events"] for event in events]
        assert (ended["kind"], ended["error"]["reason"]) == (
            "SESSION_EVENT_KIND_ENDED",
            "SESSION_NOT_FOUND",
        )


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_curl_shows_events_of_sessions_and_server_as_they_happen(client: JsonClient, version: str) -> None:
    name = opened(client, f"of curl {version}")
    body = {**watched(session_ids=[name]), "server": {"interval": "0.2s"}}
    url = f"http://{client.address}{WATCH_PATH}"
    command = curl.command(version, "--no-buffer", "--json", json.dumps(body), url)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        reader, output = EventReader(), running.stdout

        def next_of(name: str) -> Any:
            while True:
                for event in reader.feed(output.readline()):
                    if event.name == name:
                        return event.data

        assert next_of("sessions")["events"][0]["session_id"] == name
        assert next_of("server")["server"]["front"] == "native"
        stepped(client, name, np.zeros((1, 3), np.float32))
        assert next_of("sessions")["events"][0]["revision"] == "1"
        models = next_of("server")["models"]
        assert [model["name"] for model in models] == ["seq"]
        running.terminate()


def test_a_thousand_sessions_are_watched_by_one_stream(client: JsonClient) -> None:
    rng = np.random.default_rng(12)
    _, several = client.json("POST", "/v1/sessions:batchOpen", {"model": "seq", "count": 1024})
    ids = several["session_ids"]
    with client.events(WATCH_PATH, watched(session_ids=ids)) as events:
        seen: dict[str, Any] = {}
        while len(seen) < len(ids):
            seen |= {event["session_id"]: event for event in events.next()["events"]}
        chosen = rng.choice(ids, 50, replace=False).tolist()
        replies = {
            name: stepped(client, name, rng.standard_normal((1, 3)).astype(np.float32)) for name in chosen
        }
        found: dict[str, Any] = {}
        while len(found) < len(chosen):
            found |= {event["session_id"]: event for event in events.next()["events"]}
        assert {name: data(event["outputs"]) for name, event in found.items()} == {
            name: data(reply["outputs"]) for name, reply in replies.items()
        }
    client.json("POST", "/v1/sessions:closeMatching", {"model": "seq"})


def test_a_client_that_leaves_is_watched_for_no_longer(client: JsonClient) -> None:
    def watched_sessions() -> int:
        with client.events("/v1/server:watch", None, method="GET") as events:
            return int(events.next()["server"].get("watched_sessions", 0))

    name = opened(client, "left")
    with client.events(WATCH_PATH, watched(session_ids=[name])) as events:
        events.next()
        assert watched_sessions() == 1
    while watched_sessions():
        pass


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://app.example.org"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"host": "evil.example"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}, 403),
        ({"content-type": "text/plain"}, 415),
    ],
)
def test_pages_of_other_origins_watch_nothing(
    client: JsonClient, headers: dict[str, str], status: int
) -> None:
    with client.events(WATCH_PATH, {"server": {}}, headers) as events:
        assert events.status == status
        allowed = events.headers["access-control-allow-origin"]
        assert allowed == (headers["origin"] if status == 200 else None)


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_a_deadline_ends_a_watch_with_the_error(client: JsonClient, version: str) -> None:
    body, url = json.dumps({"server": {"interval": "3600s"}}), f"http://{client.address}{WATCH_PATH}"
    found = b""
    for limit in ("200m", "2S", "20S"):  # a busy machine may need more for the first event
        command = curl.command(version, "--header", f"grpc-timeout: {limit}", "--json", body, url)
        # curl fails unless the answer is complete
        found = subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S).stdout
        if found.startswith(b"event"):
            break
    first, last = events_of(found)
    assert (first.name, last.name, last.data["code"]) == ("server", "error", 4)
    assert last.data["details"][0]["reason"] == "DEADLINE_EXCEEDED"


def test_refusals_have_their_status(client: JsonClient) -> None:
    for body, words in (
        ({"sessions": {"session_ids": []}}, "sessions.session_ids must have 1 to 1024 ids; got 0"),
        (
            {"sessions": {"session_ids": ["a", "a"]}},
            "sessions.session_ids must not repeat an id; got 'a' twice",
        ),
        ({"sessions": {"session_ids": ["a"], "interval": "0.001s"}}, "sessions.interval must be from 0.01 s"),
        ({"sessions": {"session_ids": ["a"], "revisions": -1}}, "sessions.revisions must be an integer"),
        ({"sessions": {"session_ids": ["a"], "revisions": 0}}, "sessions.revisions must be 1 or more; got 0"),
        ({"sessions": {"session_ids": ["x" * 5000]}}, "sessions.session_ids must have at most 1024 bytes"),
        ({"server": {"interval": "0.1s"}}, "server.interval must be from 0.2 s"),
        ({}, "the body must have one of the fields sessions, server"),
    ):
        with client.events(WATCH_PATH, body) as events:
            assert events.status == 400
            assert events.document()["message"].startswith(words)
    # alone on its path, a request is the whole body
    with client.events("/v1/sessions:watch", {"session_ids": []}) as events:
        assert events.document()["message"] == "session_ids must have 1 to 1024 ids; got 0"


# ------------------------------------------------------------------------------------------------------------ callers


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    found = Secured(tmp_path_factory.mktemp("closed"))
    with local_server("seq", extra_args=found.options) as running:
        found.address = running.http_address or ""
        yield found


def test_a_viewer_watches_the_sessions_of_its_tenant(closed: Secured) -> None:
    name = "of acme"
    assert closed.json("ann", "POST", path_of(name), {"model": "seq"})[0] == 200
    with closed.events("eye", {**watched(session_ids=[name]), "server": {}}) as events:
        assert events.next("sessions")["events"][0]["session_id"] == name
        shown = events.next("server")
        assert ("server" in shown, [model["name"] for model in shown["models"]]) == (False, ["seq"])
        closed.json("ann", "POST", f"{path_of(name)}:step", step_body())
        assert events.next("sessions")["events"][0]["revision"] == "1"
    with closed.events("bob", watched(session_ids=[name])) as events:
        ((ended,),) = [event.data["events"] for event in events]
        assert ended["error"]["reason"] == "SESSION_NOT_FOUND"
    with closed.events("ops", {"server": {}}) as events:
        assert events.next()["server"]["front"] == "native"
    lines = [json.loads(line) for line in closed.audit.read_text().splitlines()]
    watches = [(line["who"], line["sessions"]) for line in lines if line["action"] == "watch"]
    assert watches == [("eye", [name]), ("bob", [name])]


def test_an_unknown_caller_watches_nothing(closed: Secured) -> None:
    with closed.client.events(WATCH_PATH, {"server": {}}) as events:
        assert (events.status, events.headers["www-authenticate"]) == (401, "Bearer")


def test_a_watch_ends_with_its_token(tmp_path: Path) -> None:
    found = Secured(tmp_path)
    with local_server("seq", extra_args=found.options) as running:
        found.address = running.http_address or ""
        with found.events("eye", {"server": {}}) as events, found.events("ann", {"server": {}}) as others:
            events.next()
            others.next()
            token_file.remove(found.token_file, lambda token: token.caller.name == "eye")
            *_, last = events
            assert (last.name, last.data["code"]) == ("error", 16)
            assert "revoked" in last.data["message"]
            others.next()


# -------------------------------------------------------------------------------------------------------- bad clients


@pytest.fixture(scope="module")
def attacked() -> Iterator[AttackedServer]:
    limits = {"unread_s": 0.5}
    with target("native", *HTTP, limits=limits) as found:
        yield found


def test_a_client_that_does_not_read_delays_no_session(attacked: AttackedServer) -> None:
    found = re.search(r"HTTP on http://(\S+),", attacked.server.ready_line)
    assert found is not None
    before = attacked.refused("unread_replies")
    large, rows = "large", np.zeros((1024, FEATURES), np.float32)
    attacked.stub.OpenSession(
        pb.OpenSessionRequest(model="forecast", session_id=large, batch_size=len(rows)), timeout=TIMEOUT_S
    )
    step = pb.StepRequest(session_id=large, inputs=[tensor(rows)])
    body = json.dumps(watched(session_ids=[large]))
    head = f"POST {WATCH_PATH} HTTP/1.1\r\nHost: {found[1]}\r\nContent-Type: application/json\r\n"
    host, _, port = found[1].rpartition(":")
    with socket.socket() as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connected.connect((host, int(port)))
        connected.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        attacked.wait_until(lambda: attacked.number("stepwell_watched_sessions") == 1)
        while attacked.refused("unread_replies") == before:
            attacked.stub.Step(step, timeout=TIMEOUT_S)
        attacked.wait_until(lambda: attacked.number("stepwell_watched_sessions") == 0)
    attacked.wait_until(lambda: attacked.count("held_bytes") < 64 << 10)


# -------------------------------------------------------------------------------------------------------------- stops


def test_a_stopping_server_ends_its_watches() -> None:
    with serve(*HTTP) as running:
        found = re.search(r"HTTP on http://(\S+),", running.ready_line)
        assert found is not None
        client = JsonClient(found[1])
        client.json("POST", path_of("a"), {"model": "forecast"})
        with client.events(WATCH_PATH, {**watched(session_ids=["a"]), "server": {}}) as events:
            events.next("sessions")
            running.signal(signal.SIGTERM)
            *_, last = events
            assert (last.name, last.data["code"]) == ("error", 14)
            assert running.finish()[0] == 0
