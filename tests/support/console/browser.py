"""Chromium, driven by playwright, and a tab that notices everything that no page of the console may do.

One browser serves the tests of a file. Each tab has storage of its own, as a private window has. While a browser is
open, playwright runs an event loop in this thread, so a file with a browser has no test that is a coroutine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from playwright import sync_api

TIMEOUT_S = 60.0
"""Only a hang reaches it."""
WIDE, NARROW = (1280, 800), (400, 800)
"""Sizes of the window in pixels for which the console is made."""
_REPORT = "reportViolation"
_WATCH_POLICY = f"""
document.addEventListener("securitypolicyviolation", (event) =>
  window.{_REPORT}(`${{event.violatedDirective}} forbids ${{event.blockedURI}} (${{event.sourceFile}}:${{event.lineNumber}})`));
"""


def program() -> str:
    """The path of chromium."""
    found = shutil.which("chromium")
    assert found, "chromium is missing; `make test` says how to install it"
    return found


class Browser:
    """A browser without a window. Leaving the block ends it."""

    def __init__(self) -> None:
        sync_api.expect.set_options(timeout=1000 * TIMEOUT_S)
        self._driver = sync_api.sync_playwright().start()
        try:
            # root has no user namespaces of its own to put pages into; a page of a test is ours
            sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
            self._chromium = self._driver.chromium.launch(executable_path=program(), args=sandbox)
        except BaseException:
            self._driver.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._chromium.close()
        self._driver.stop()

    def tab(self, origin: str, size: tuple[int, int] = WIDE, **options: Any) -> Tab:
        """A tab for pages of one origin, such as http://127.0.0.1:8080; see playwright's `new_context` for options."""
        width, height = size
        context = self._chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(1000 * TIMEOUT_S)
        return Tab(context, origin)


class Tab:
    """A tab. Leaving the block closes it, and fails if something happened that no page may do.

    That is: an error or a warning in the browser's console, an exception that nobody caught, a violation of the content
    security policy, a request to another origin, and a dialog of the browser.
    """

    def __init__(self, context: Any, origin: str) -> None:
        self.origin = origin
        self.problems: list[str] = []
        """What happened that no page may do."""
        self.requests: list[Any] = []
        """All requests, in order."""
        self._open: list[Any] = []
        self._context = context
        self._expected: list[re.Pattern[str]] = []
        context.expose_binding(_REPORT, lambda _source, text: self._note(f"policy: {text}"))
        context.add_init_script(_WATCH_POLICY)
        self.page = context.new_page()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self._note(f"exception: {error}"))
        self.page.on("request", self._request)
        self.page.on("requestfinished", self._ended)
        self.page.on("requestfailed", self._ended)
        self.page.on("dialog", self._dialog)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.check()
            elif self.problems:
                error.add_note("the tab noticed:\n" + "\n".join(self.problems))
        finally:
            self._context.close()

    def check(self) -> None:
        """Fail if something happened until now that no page may do."""
        # the browser reports in order: what it noticed before this answer, and before a timer of now, is known with it
        self.page.evaluate("() => new Promise((resolve) => setTimeout(resolve))")
        assert not self.problems, "\n".join(self.problems)

    @contextlib.contextmanager
    def expecting(self, pattern: str) -> Iterator[None]:
        """Accept problems that match in this block: the browser logs each answer with an error."""
        self._expected.append(re.compile(pattern))
        try:
            yield
            self.check()
        finally:
            self._expected.pop()

    def paths(self, method: str = "") -> list[str]:
        """Path and query of each request with a method, or of all."""
        wanted = [one for one in self.requests if method in {"", one.method}]
        return [one.url.removeprefix(self.origin) for one in wanted]

    def open_paths(self) -> list[str]:
        """The paths of the requests that have no whole answer yet."""
        return [one.url.removeprefix(self.origin) for one in self._open]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the browser reports."""
        limit = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < limit, "it did not happen"
            self.check()

    def goto(self, path: str) -> None:
        """Open a path."""
        self.page.goto(self.origin + path)

    def grows_too_wide(self) -> list[str]:
        """What makes the page wider than the window: a description of each element that sticks out."""
        found = self.page.evaluate(
            """() => {
              const root = document.scrollingElement, wide = root.clientWidth;
              if (root.scrollWidth <= wide) return [];
              const scrolls = (one) => one && (getComputedStyle(one).overflowX !== "visible" || scrolls(one.parentElement));
              const out = [...document.querySelectorAll("body *")].filter(
                (one) => one.getBoundingClientRect().right > wide && !scrolls(one.parentElement));
              return [`${root.scrollWidth} > ${wide}`, ...out.map((one) => one.outerHTML.slice(0, 120))];
            }"""
        )
        described: list[str] = found
        return described

    def _note(self, problem: str) -> None:
        if not any(pattern.search(problem) for pattern in self._expected):
            self.problems.append(problem)

    def _console(self, message: Any) -> None:
        if message.type in {"error", "warning", "assert"}:
            self._note(f"console {message.type}: {message.text} ({json.dumps(message.location)})")

    def _request(self, request: Any) -> None:
        self.requests.append(request)
        self._open.append(request)
        parts = urlsplit(request.url)
        if parts.scheme not in {"data", "blob"} and f"{parts.scheme}://{parts.netloc}" != self.origin:
            self._note(f"request to another origin: {request.method} {request.url}")

    def _ended(self, request: Any) -> None:
        self._open.remove(request)

    def _dialog(self, dialog: Any) -> None:
        self._note(f"dialog: {dialog.type}: {dialog.message}")
        dialog.dismiss()
