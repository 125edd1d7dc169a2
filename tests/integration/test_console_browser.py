"""The harness of the console's tests: the tab notices what no page may do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from support.console import axe
from support.console.browser import NARROW, Browser

# Only a change of the harness breaks them; the tests of pages use it in each run.
pytestmark = pytest.mark.slow

_PAGES = {
    "/good": "<title>good</title><h1>Good</h1><img src='data:,'>",
    "/script": "<h1>Page</h1><script>document.title = 'ran'</script>",
    "/style": "<h1>Page</h1><p style='color: red'>red</p>",
    "/elsewhere": "<h1>Page</h1><img src='http://127.0.0.2:9/x.png'>",
    "/error": "<h1>Page</h1><script src='/error.js'></script>",
    "/throws": "<h1>Page</h1><script src='/throws.js'></script>",
    "/alerts": "<h1>Page</h1><script src='/alerts.js'></script>",
    "/missing": "<h1>Page</h1><img src='/nothing.png'>",
    "/silent": "<html lang=en><title>Page</title><main><h1>Page</h1><button></button></main></html>",
    "/named": "<html lang=en><title>Page</title><main><h1>Page</h1><button>Go</button></main></html>",
    "/wide": "<style nonce=x>main { width: 900px }</style><main>wide</main>",
}
_SCRIPTS = {
    "/error.js": "console.error('an error')",
    "/throws.js": "setTimeout(() => { throw new Error('thrown') }); ",
    "/alerts.js": "alert('hello')",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'nonce-x'; img-src 'self' data: http://127.0.0.2:9"
)


class _Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = _PAGES.get(self.path) or _SCRIPTS.get(self.path)
        self.send_response(200 if found else 204 if self.path == "/favicon.ico" else 404)
        self.send_header("content-type", "text/javascript" if self.path in _SCRIPTS else "text/html")
        self.send_header("content-security-policy", _POLICY)
        self.end_headers()
        self.wfile.write((found or "").encode())

    def log_message(self, *_args: object) -> None:
        """The base class writes to stderr."""


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Pages) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/script", "policy: script-src"),
        ("/style", "policy: style-src"),
        ("/elsewhere", "request to another origin: GET http://127.0.0.2:9/x.png"),
        ("/error", "console error: an error"),
        ("/throws", "exception: thrown"),
        ("/alerts", "dialog: alert: hello"),
        ("/missing", "console error: Failed to load resource"),
    ],
)
def test_what_no_page_may_do_fails_the_test(browser: Browser, origin: str, path: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem), browser.tab(origin) as tab:
        tab.goto(path)


def test_a_good_page_passes_and_requests_are_known(browser: Browser, origin: str) -> None:
    with browser.tab(origin) as tab:
        tab.goto("/good")
        assert tab.paths("GET")[0] == "/good"
        assert not tab.grows_too_wide()


def test_an_expected_error_is_no_problem_and_a_wide_page_is_noticed(browser: Browser, origin: str) -> None:
    with browser.tab(origin, NARROW) as tab:
        with tab.expecting("404"):
            tab.goto("/missing")
        tab.goto("/wide")
        assert any("<main>" in one for one in tab.grows_too_wide())


def test_a_button_without_a_name_is_a_serious_finding(browser: Browser, origin: str) -> None:
    with browser.tab(origin) as tab:
        tab.goto("/silent")
        (finding,) = axe.findings(tab)
        assert finding.startswith("critical button-name")
        tab.goto("/named")
        assert axe.findings(tab) == []
