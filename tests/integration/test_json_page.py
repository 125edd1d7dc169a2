"""docs/guides/json.md and the README: their calls by curl run, and answer what the pages say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor import MethodDescriptor

from stepwell.v1 import models_pb2, sessions_pb2, watch_pb2
from stepwell_server.rpc.http.routes import WATCH_PATH
from support import secured
from support.models import programs
from support.peers import curl
from support.peers.json_client import JsonClient
from support.secured import Server
from support.servers.both_fronts import needs_native
from support.servers.envoy import Envoy
from support.servers.server_process import forecast

README = Path(__file__).parents[2] / "README.md"
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "json.md"
pytestmark = needs_native
BLOCK = re.compile(r"^```(sh|json|js)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: For machines without curl: as much of it as the page uses.
CURL = """
import http.client, sys
from urllib.parse import urlsplit
words, method, body = sys.argv[1:], None, None
while words:
    word = words.pop(0)
    if word == "-X": method = words.pop(0)
    elif word == "--json": body = words.pop(0)
    elif word != "-s": url = urlsplit("http://" + word)
connection = http.client.HTTPConnection(url.netloc)
path = url.path + ("?" + url.query if url.query else "")
headers = {"content-type": "application/json"} if body else {}
connection.request(method or ("POST" if body else "GET"), path, body, headers)
print(connection.getresponse().read().decode())
"""


@pytest.fixture(params=["server", pytest.param("envoy", marks=pytest.mark.slow)])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the page's calls go: the server itself, and an Envoy before it."""
    if secured.is_on():
        pytest.skip("the page's server is without TLS")
    options = ["--http-listen", "127.0.0.1:0"] if request.param == "server" else []
    with Server({"forecast": forecast().path}, cache_dir=programs.cache_dir(), extra_args=options) as server:
        if request.param == "server":
            yield server.http_address or ""
            return
        with Envoy(tmp_path, [server.address]) as envoy:
            yield envoy.address


def alike(found: Any, shown: Any) -> Any:
    """What was found, rounded as far as what is shown is."""
    if isinstance(shown, float):
        return round(found, 4)
    if isinstance(shown, list) and len(shown) == len(found):
        return [alike(one, other) for one, other in zip(found, shown, strict=True)]
    if isinstance(shown, dict) and shown.keys() == found.keys():
        return {name: alike(found[name], other) for name, other in shown.items()}
    return found


def run(blocks: str, address: str, folder: Path) -> list[Any]:
    """The answers to the calls of blocks of a page."""
    prelude = ""
    if shutil.which("curl") is None:
        (folder / "curl.py").write_text(CURL)
        prelude = f'curl() {{ python3 {folder / "curl.py"} "$@"; }}\n'
    # a line break before each answer, because curl writes none behind it
    script = blocks.replace("localhost:8080", address).replace("curl ", "echo; curl -s ")
    done = subprocess.run(["bash", "-euc", prelude + script], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


def test_calls_by_curl_answer_what_the_page_says(address: str, tmp_path: Path) -> None:
    answers: list[Any] = []
    shown = 0
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "json":
            assert alike(answers[-1], json.loads(text)) == json.loads(text)
            shown += 1
        elif "curl" in text and kind == "sh" and WATCH_PATH not in text:
            answers += run(text, address, tmp_path)
    assert shown == 3
    assert len(answers) == 7
    assert [answer["code"] for answer in answers if "code" in answer] == [5]


@pytest.fixture
def own_address() -> Iterator[str]:
    """Where the page's watches go."""
    if secured.is_on():
        pytest.skip("the page's server is without TLS")
    with Server(
        {"forecast": forecast().path},
        cache_dir=programs.cache_dir(),
        extra_args=["--http-listen", "127.0.0.1:0"],
    ) as server:
        yield server.http_address or ""


def block_with_the_watch(kind: str, address: str) -> str:
    (found,) = (text for each, text in BLOCK.findall(PAGE.read_text()) if each == kind and WATCH_PATH in text)
    return str(found).replace("localhost:8080", address)


def test_the_watch_by_curl_ends_with_its_session(own_address: str) -> None:
    script = block_with_the_watch("sh", own_address)
    curl.command()  # skips where there is none
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("data: ")]
    events = [event for line in lines for event in json.loads(line.removeprefix("data: "))["events"]]
    kinds = [event["kind"].removeprefix("SESSION_EVENT_KIND_") for event in events]
    assert (kinds[0], kinds[-1]) == ("PRESENT", "ENDED")
    assert {event["session_id"] for event in events} == {"sensor-8"}


@pytest.mark.slow
def test_the_watch_by_a_page_shows_events(own_address: str, tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    JsonClient(own_address).json("POST", "/v1/sessions/sensor-8", {"model": "forecast"})
    code = """
        const seen = new Map();
        function show(name, data) {
          seen.set(name, data);
          if (seen.size < 2) return;
          console.log(JSON.stringify(Object.fromEntries(seen)));
          process.exit();
        }
    """
    script = tmp_path / "page.mjs"
    script.write_text(code + block_with_the_watch("js", own_address))
    done = subprocess.run(["node", script], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["sessions"]["events"][0]["session_id"] == "sensor-8"
    assert seen["server"]["server"]["front"] == "native"


def test_the_readme_opens_steps_and_reads_a_session_by_curl(address: str, tmp_path: Path) -> None:
    blocks = [text for kind, text in BLOCK.findall(README.read_text()) if kind == "sh" and "curl" in text]
    opened, stepped, state = run("".join(blocks), address, tmp_path)
    assert (opened["session"]["session_id"], stepped["revision"]) == ("user-42", "1")
    assert state["session"]["revision"] == "1"


def test_the_page_has_every_path() -> None:
    page = PAGE.read_text()
    for file in (sessions_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR, watch_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                for path in _paths(method):
                    place, _, verb = path.partition(":")
                    shown = place.replace("{session_id}", "ID").replace("{client_id}", "ID")
                    shown = re.sub(r"{(name|model)}", "NAME", shown)
                    assert f"{shown}:" in page if verb else shown in page, path
                    assert f"`{shown}:{verb}`" in page or f":{verb}`" in page or not verb, path


def _paths(method: MethodDescriptor) -> list[str]:
    rule = method.GetOptions().Extensions[annotations_pb2.http]
    return [
        getattr(one, str(kind))
        for one in (rule, *rule.additional_bindings)
        if (kind := one.WhichOneof("pattern")) is not None
    ]
