"""The console's files over HTTP: what they are, what browsers may do with them, and who gets them."""

from __future__ import annotations

import gzip
import re

import pytest

from support.rpc.calls import calls
from support.rpc.http_client import HOST, Client
from support.servers.both_fronts import needs_native

pytestmark = needs_native

FILES = {
    "/console": "text/html",
    "/console/console.js": "text/javascript",
    "/console/console.css": "text/css",
    "/console/licenses.txt": "text/plain",
}
FROM_BROWSER = {"sec-fetch-site": "same-origin", "accept-encoding": "gzip, deflate, br"}


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("is_open", [True, False])
async def test_anyone_gets_the_files(path: str, is_open: bool) -> None:
    async with calls() as at:
        answer = await Client(at, is_open=is_open).send("GET", path)
    headers = dict(answer.headers)
    assert (answer.status, headers["content-type"].split(";")[0]) == (200, FILES[path])
    assert headers["x-content-type-options"] == "nosniff"
    assert answer.body


async def test_the_page_may_load_its_own_files_alone() -> None:
    async with calls() as at:
        page = await Client(at).send("GET", "/console")
    policy = dict(
        part.strip().split(" ", 1) for part in dict(page.headers)["content-security-policy"].split(";")
    )
    assert policy.pop("img-src") == "'self' data: blob:"
    for name in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy.pop(name) == "'none'"
    assert set(policy.values()) == {"'self'"}
    # what the policy would stop, the page does not try
    text = page.body.decode()
    assert not re.search(r"<style|<script>|\son\w+=|style=|https?:", text)
    assert {f"/{path}" for path in re.findall(r'(?:href|src)="(console[^"]*)"', text)} < FILES.keys()


@pytest.mark.parametrize("path", FILES)
async def test_a_browser_keeps_a_file_until_it_changes(path: str) -> None:
    async with calls() as at:
        client = Client(at)
        plain, zipped = await client.send("GET", path), await client.send("GET", path, headers=FROM_BROWSER)
        assert gzip.decompress(zipped.body) == plain.body
        tags = [dict(answer.headers)["etag"] for answer in (plain, zipped)]
        assert tags[0] != tags[1]
        for tag, encoding in zip(tags, ("identity", "gzip"), strict=True):
            known = {"if-none-match": tag, "accept-encoding": encoding}
            again = await client.send("GET", path, headers=known)
            assert (again.status, again.body, dict(again.headers)["etag"]) == (304, b"", tag)
        stale = await client.send("GET", path, headers={"if-none-match": '"other"'})
        assert (stale.status, stale.body) == (200, plain.body)


@pytest.mark.parametrize("path", FILES)
async def test_head_has_the_headers_of_get(path: str) -> None:
    async with calls() as at:
        got, head = [await Client(at).send(method, path) for method in ("GET", "HEAD")]
    length = ("content-length", str(len(got.body)))
    assert (head.status, head.headers, head.body) == (200, (*got.headers, length), b"")


async def test_other_paths_and_methods_are_refused() -> None:
    async with calls() as at:
        client = Client(at)
        moved = await client.send("GET", "/console/")
        assert (moved.status, dict(moved.headers)["location"]) == (308, "../console")
        for path in (
            "/console/nothing.js",
            "/console/../console/console.js",
            "/consoles",
            "/console/index.html",
        ):
            assert (await client.send("GET", path)).status == 404
        for path in (*FILES, "/console/"):
            refused = await client.send("POST", path)
            assert (refused.status, dict(refused.headers)["allow"]) == (405, "GET, HEAD")


async def test_a_server_without_a_console_refuses_its_paths() -> None:
    async with calls() as at:
        client = Client(at)
        client.door.has_console = False
        for path in (*FILES, "/console/"):
            assert (await client.send("GET", path)).status == 404


async def test_the_rules_for_browsers_hold() -> None:
    async with calls() as at:
        client = Client(at)
        for headers in (
            {":authority": "evil.example"},
            {"origin": "https://evil.example"},
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        ):
            assert (await client.send("GET", "/console/console.js", headers=headers)).status == 403
        link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", ":authority": HOST}
        assert (await client.send("GET", "/console", headers=link)).status == 200
