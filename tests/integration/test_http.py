"""JSON over HTTP from a real server: versions of HTTP, TLS, callers, the audit log, and the start and end of the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import ssl
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import stepwell
from stepwell_server.auth.web_tokens import LEEWAY_S
from support.certificates import Authority
from support.peers.curl import curl
from support.peers.json_client import JsonClient, path_of, step_body
from support.secured import Server
from support.servers.both_fronts import needs_native
from support.servers.closed_server import HTTP, Secured
from support.servers.served import local_server
from support.servers.server_process import forecast, serve

pytestmark = [needs_native, pytest.mark.plain("the tests secure their servers themselves")]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with local_server("seq", extra_args=HTTP) as running:
        yield running


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge", "--http2"])
def test_curl_speaks_either_version(server: Server, version: str) -> None:
    url = f"http://{server.http_address}{path_of('by curl')}"
    shown = ("--write-out", "\n%{http_version} %{http_code}")
    opened, _, ended = curl(version, *shown, "--json", '{"model": "seq"}', url).rpartition("\n")
    assert json.loads(opened)["session"]["session_id"] == "by curl"
    assert ended == ("2 200" if version == "--http2-prior-knowledge" else "1.1 200")
    stepped = json.loads(curl(version, "--json", json.dumps(step_body()), f"{url}:step"))
    assert stepped["outputs"][0]["shape"] == ["1", "2"]
    assert json.loads(curl(version, "--request", "DELETE", url)) == {}


@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_the_console_is_there(server: Server, version: str) -> None:
    url = f"http://{server.http_address}/console"
    page = curl(version, "--include", url)
    head, _, body = page.replace("\r", "").partition("\n\n")
    assert f"content-length: {len(body)}" in head.splitlines()
    tag = re.search(r"etag: (\S+)", head)
    assert tag is not None
    asked = curl(version, "--head", url).replace("\r", "")
    assert asked.partition("date:")[0].strip() == head.partition("date:")[0].strip()
    known = curl(version, "--include", "--header", f"if-none-match: {tag[1]}", url)
    assert " 304" in known.splitlines()[0]
    assert "content-length" not in known


def test_the_server_reports_its_addresses_and_the_role(server: Server) -> None:
    _, found = JsonClient(server.http_address or "").json("GET", "/v1/models")
    reported = {name: found["server"][name] for name in ("address", "http_address", "role")}
    http_address = f"http://{server.http_address}"
    assert reported == {"address": server.address, "http_address": http_address, "role": "admin"}
    with stepwell.connect(server.address) as client:
        info = client.server_info()
    assert (info.http_address, info.role) == (http_address, "admin")


def test_a_large_body_and_a_large_answer_come_whole(server: Server) -> None:
    client = JsonClient(server.http_address or "")
    values = [number / 7 for number in range(3 * 20_000)]
    body = {"inputs": [{"values": values, "shape": [1, 20_000, 3]}]}
    status, answer = client.json("POST", "/v1/models/seq:predict", body)
    assert (status, answer["outputs"][0]["shape"]) == (200, ["1", "20000", "2"])
    assert len(answer["outputs"][0]["values"]) == 40_000


def test_a_session_is_the_same_over_both_protocols(server: Server) -> None:
    client = JsonClient(server.http_address or "")
    with stepwell.connect(server.address) as other, other.open_session("seq", session_id="both") as session:
        assert client.json("POST", f"{path_of('both')}:step", step_body())[1]["revision"] == "1"
        session.refresh()
        assert session.revision == 1
        session.close()
    assert client.json("GET", path_of("both"))[0] == 404


def test_many_clients_step_at_the_same_time(server: Server) -> None:
    client = JsonClient(server.http_address or "")
    revisions: dict[str, str] = {}

    def steps(name: str) -> None:
        client.json("POST", path_of(name), {"model": "seq"})
        for _ in range(20):
            revisions[name] = client.json("POST", f"{path_of(name)}:step", step_body())[1]["revision"]

    threads = [threading.Thread(target=steps, args=(f"many {number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(revisions.values()) == {"20"}
    assert len(revisions) == 8


# ------------------------------------------------------------------------------------------------------------ callers


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    found = Secured(tmp_path_factory.mktemp("closed"))
    with local_server("seq", extra_args=found.options) as running:
        found.address = running.http_address or ""
        yield found


def reason_of(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["details"][0]["reason"]


def test_a_caller_must_be_known(closed: Secured) -> None:
    for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": "Basic YTpi"}):
        status, raw, shown = closed.client.http("GET", "/v1/models", headers=headers)
        assert (status, shown["www-authenticate"], json.loads(raw)["code"]) == (401, "Bearer", 16)
    assert closed.json("ann", "GET", "/v1/models")[0] == 200


def test_sessions_belong_to_tenants_and_roles_bound_what_a_caller_may_do(closed: Secured) -> None:
    path = path_of("of acme")
    assert closed.json("ann", "POST", path, {"model": "seq"})[0] == 200
    assert closed.json("eye", "GET", f"{path}/state")[0] == 200
    assert reason_of(closed.json("eye", "POST", f"{path}:step", step_body())) == (403, "PERMISSION_DENIED")
    assert reason_of(closed.json("bob", "GET", path)) == (404, "SESSION_NOT_FOUND")
    assert closed.json("ops", "GET", path, stepwell_tenant="acme")[0] == 200
    assert reason_of(closed.json("ann", "GET", path, stepwell_tenant="zeta")) == (403, "PERMISSION_DENIED")
    assert reason_of(closed.json("ann", "POST", "/v1/models/seq:unload", {})) == (403, "PERMISSION_DENIED")


def test_quotas_and_the_audit_log_count_calls_over_http(closed: Secured) -> None:
    assert closed.json("bob", "POST", path_of("first"), {"model": "seq"})[0] == 200
    assert reason_of(closed.json("bob", "POST", path_of("second"), {"model": "seq"})) == (
        429,
        "QUOTA_EXCEEDED",
    )
    lines = [json.loads(line) for line in closed.audit.read_text().splitlines()]
    assert any(line["action"] == "open" and line["who"] == "bob" for line in lines), lines[-3:]


def test_a_rate_of_a_tenant_is_kept_over_http(closed: Secured) -> None:
    closed.tokens["web"] = closed.web_token("slow")
    path = path_of("rated")
    assert closed.json("web", "POST", path, {"model": "seq"})[0] == 200
    minute = [0.0] * (60 * 3)
    body = {"inputs": [{"dtype": "DATA_TYPE_FLOAT32", "shape": [1, 60, 3], "values": minute}]}
    assert closed.json("web", "POST", f"{path}:step", body)[0] == 200
    answer = closed.json("web", "POST", f"{path}:step", body)
    assert reason_of(answer) == (429, "QUOTA_EXCEEDED")
    assert closed.json("web", "GET", path)[1]["session"]["revision"] == "1", "it was not applied"
    (delay,) = [each["retry_delay"] for each in answer[1]["details"] if "retry_delay" in each]
    assert float(delay.removesuffix("s")) > 1
    assert closed.json("ann", "POST", path_of("not rated"), {"model": "seq"})[0] == 200


def test_web_tokens_name_callers_over_http(closed: Secured) -> None:
    path = path_of("of the web")
    closed.tokens |= {"web": closed.web_token("acme"), "eyes": closed.web_token("acme", "viewer")}
    assert closed.json("web", "POST", path, {"model": "seq"})[0] == 200
    assert closed.json("ann", "GET", path)[0] == 200, "both are of one tenant"
    assert closed.json("eyes", "GET", path)[0] == 200
    assert reason_of(closed.json("eyes", "POST", f"{path}:step", step_body())) == (403, "PERMISSION_DENIED")
    assert reason_of(closed.json("bob", "GET", path)) == (404, "SESSION_NOT_FOUND")
    head, claims, signature = closed.tokens["web"].split(".")
    for wrong in (
        closed.web_token("acme", valid_s=-3600),
        closed.web_token("acme", aud="another"),
        closed.web_token("acme", role="emperor"),
        f"{head}.{claims}.{signature[::-1]}",
        f"{head}.{claims}.",
    ):
        closed.tokens["wrong"] = wrong
        status, answer = closed.json("wrong", "GET", path)
        assert (status, answer["code"]) == (401, 16), answer


def test_a_watch_ends_when_its_web_token_expires(closed: Secured) -> None:
    path = path_of("watched until")
    assert closed.json("ann", "POST", path, {"model": "seq"})[0] == 200
    closed.tokens["web"] = closed.web_token("acme", valid_s=4.0 - LEEWAY_S)
    with closed.events("web", {"sessions": {"session_ids": ["watched until"]}}) as stream:
        first, *_, last = stream
    assert (first.name, last.name) == ("sessions", "error")
    assert "no longer valid" in last.data["message"], last


def test_a_header_that_decides_the_caller_comes_once(closed: Secured) -> None:
    bearer = f"authorization: Bearer {closed.tokens['ann']}"
    url = f"https://{closed.address}/v1/models"
    trust = ("--cacert", str(closed.authority.cert))
    answer = json.loads(curl(*trust, "--header", bearer, "--header", "authorization: Bearer x", url))
    assert (answer["code"], answer["message"]) == (3, "authorization must be sent at most once; got 2")


@pytest.mark.parametrize(("version", "spoken"), [("--http1.1", "1.1"), ("--http2", "2")])
def test_tls_offers_either_version(closed: Secured, version: str, spoken: str) -> None:
    bearer = f"authorization: Bearer {closed.tokens['ann']}"
    shown = ("--write-out", "\n%{http_version}", "--cacert", str(closed.authority.cert))
    models, _, ended = curl(
        version, *shown, "--header", bearer, f"https://{closed.address}/v1/models"
    ).rpartition("\n")
    assert ([model["name"] for model in json.loads(models)["models"]], ended) == (["seq"], spoken)


def test_new_connections_get_a_new_certificate(tmp_path: Path) -> None:
    found = Secured(tmp_path)
    bearer = {"authorization": f"Bearer {found.tokens['ann']}"}
    with local_server("seq", extra_args=found.options) as running:
        found.address = running.http_address or ""
        context = ssl.create_default_context(cafile=str(found.authority.cert))
        old = http.client.HTTPSConnection(found.address, timeout=60, context=context)
        with contextlib.closing(old):
            old.request("GET", "/v1/models", headers=bearer)
            assert old.getresponse().read()
            (tmp_path / "new").mkdir()
            authority = Authority(tmp_path / "new")
            for new, file in zip(authority.issue(), found.pair, strict=True):
                new.replace(file)
            found.authority = authority
            status = 0
            while not status:
                with contextlib.suppress(ssl.SSLCertVerificationError):
                    status = found.json("ann", "GET", "/v1/models")[0]
            assert status == 200
            old.request("GET", "/v1/models", headers=bearer)
            assert old.getresponse().status == 200, "it keeps its connection"


# --------------------------------------------------------------------------------------------------- starts and stops


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--http-listen", "0.0.0.0:0"), "--http-listen: beyond loopback the server must use TLS"),
        ((*HTTP, "--front", "python"), "--http-listen: must be left out with --front python"),
        (("--http-listen", "here"), "must be HOST:PORT"),
        (("--cors-origin", "https://app.example.org"), "--cors-origin: must be given with --http-listen"),
        ((*HTTP, "--cors-origin", "app.example.org"), "must be *, or SCHEME://HOST[:PORT]"),
    ],
)
def test_options_that_make_no_sense_stop_the_start(options: Sequence[str], words: str) -> None:
    with pytest.raises(stepwell.ServerStartError) as caught:
        Server({"forecast": forecast().path}, extra_args=options).start()
    assert words in str(caught.value)


def test_an_address_in_use_is_named_with_its_option(server: Server) -> None:
    with pytest.raises(stepwell.ServerStartError) as caught:
        Server({"forecast": forecast().path}, extra_args=["--http-listen", server.http_address or ""]).start()
    assert caught.value.refusal.startswith(f"--http-listen: cannot listen on {server.http_address}: ")


def test_the_ready_line_names_the_address_and_a_stop_ends_idle_connections() -> None:
    with serve(*HTTP) as running:
        found = re.search(
            r"native front, HTTP on http://(127\.0\.0\.1:\d+), listening on ", running.ready_line
        )
        assert found is not None
        client = JsonClient(found[1])
        with contextlib.closing(http.client.HTTPConnection(found[1], timeout=60)) as connection:
            connection.request("GET", "/v1/models")
            assert connection.getresponse().read()
            assert client.json("GET", "/v1/models")[0] == 200
            running.signal(signal.SIGTERM)
            assert running.finish()[0] == 0
