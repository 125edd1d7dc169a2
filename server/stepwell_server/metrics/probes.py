"""/livez and /readyz, for supervisors and load balancers.

/livez reports whether the process works, that is, whether its event loop runs. A server that compiles models, or whose disk
is full, is alive: a restart would not help. /readyz reports whether the server can answer calls, and the reason if not. Both
answer without a token, which probes cannot send. If metrics need a token, only its holders see the reason.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

    from stepwell_server.metrics.token import MetricsToken
    from stepwell_server.process.readiness import Readiness

PATHS = ("/livez", "/readyz")
ALIVE_S = 5.0
"""An event loop that runs nothing for longer than this is stuck. A piece of work on it takes milliseconds."""


class Probes:
    """Answers probes, on the threads of the HTTP server."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        readiness: Readiness,
        token: MetricsToken | None = None,
        alive_s: float = ALIVE_S,
    ) -> None:
        self._loop = loop
        self._readiness = readiness
        self._token = token
        self._alive_s = alive_s

    def answer(self, environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        """Answer a request for one of the paths, with `?verbose` in JSON."""
        if environment["PATH_INFO"] == "/livez":
            is_well, text, document = self._live()
        else:
            token = self._token
            has_access = token is None or token.allows(environment.get("HTTP_AUTHORIZATION", ""))
            is_well, text, document = self._ready(has_access=has_access)
        kind = "text/plain; charset=utf-8"
        if "verbose" in parse_qs(environment.get("QUERY_STRING", ""), keep_blank_values=True):
            kind, text = "application/json", json.dumps(document)
        start(
            "200 OK" if is_well else "503 Service Unavailable",
            [("Content-Type", kind), ("Cache-Control", "no-store")],
        )
        return [f"{text}\n".encode()]

    def _live(self) -> tuple[bool, str, dict[str, object]]:
        async def run() -> None:
            """Do nothing: running is the answer."""

        waiting = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            waiting.result(self._alive_s)
        except TimeoutError:
            waiting.cancel()
            problem = f"the event loop has been blocked for {self._alive_s:g} s"
            return False, f"not alive: {problem}", {"alive": False, "problem": problem}
        return True, "alive", {"alive": True}

    def _ready(self, *, has_access: bool) -> tuple[bool, str, dict[str, object]]:
        report = self._readiness.report
        if not has_access:
            text = "ready" if report.is_ready else "not ready"
            return report.is_ready, text, {"ready": report.is_ready}
        document: dict[str, object] = {
            "ready": report.is_ready,
            "problems": dict(report.problems),
            "warnings": dict(report.warnings),
            "models": report.models,
            "versions": {
                f"{name}@{version}": how
                for name, versions in report.versions.items()
                for version, how in versions.items()
            },
        }
        reasons = "; ".join(f"{about}: {reason}" for about, reason in report.problems.items())
        return report.is_ready, "ready" if report.is_ready else f"not ready: {reasons}", document
