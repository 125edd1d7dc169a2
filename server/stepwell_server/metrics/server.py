"""Serves metrics and probes over HTTP, with waitress, which bounds the resources of its clients.

A scrape runs on a thread; the event loop makes a copy of the counts for it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from stepwell_server.addresses import Address
from stepwell_server.metrics.gauges import of_disk
from stepwell_server.metrics.probes import PATHS, Probes
from stepwell_server.metrics.token import MetricsToken

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from prometheus_client.metrics_core import Metric

    from stepwell_server.process.readiness import Readiness

Source: TypeAlias = "Callable[[], Iterable[Metric]]"
"""Returns the current metrics of one part of the server. Called on the event loop."""
_SCRAPE_TIMEOUT_S = 5.0
#: Concurrent scrapes, connections, bytes of a request, and longest silence of a connection.
_THREADS, _MAX_CONNECTIONS, _MAX_REQUEST_BYTES, _SILENCE_S = 2, 64, 16 << 10, 3
_BACKLOG = 64
_CHALLENGE = ("WWW-Authenticate", 'Bearer realm="metrics"')


class MetricsServer:
    """Answers scrapes over HTTP on a thread of its own. Create it on the event loop."""

    def __init__(
        self,
        sources: Sequence[Source],
        address: Address,
        readiness: Readiness,
        data_dir: Path | None = None,
        token: MetricsToken | None = None,
    ) -> None:
        """Listen at once.

        Args:
            sources: Functions that return the metrics. Each scrape calls all of them, on the event loop.
            address: Address to listen on.
            readiness: The readiness that probes report.
            data_dir: Folder whose disk has metrics too.
            token: Token that scrapes must send.

        Raises:
            OSError: the address is in use, or not an address of this machine.
        """
        from waitress.server import create_server

        for name in ("waitress", "waitress.queue"):  # they log only mistakes of clients
            logging.getLogger(name).setLevel(logging.CRITICAL)
        loop = asyncio.get_running_loop()
        collector = _Collector(sources, loop, data_dir)
        family, _, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(place[:2], family=family, backlog=_BACKLOG)
        self.address = address._replace(port=listener.getsockname()[1])
        """The address it listens on, with the port that the system chose if it was 0."""
        self._map: dict[int, Any] = {}
        self._server = create_server(
            _application(collector, Probes(loop, readiness, token), token),
            map=self._map,
            sockets=[listener],
            threads=_THREADS,
            backlog=_BACKLOG,
            connection_limit=_MAX_CONNECTIONS,
            channel_timeout=_SILENCE_S,
            cleanup_interval=1,
            max_request_header_size=_MAX_REQUEST_BYTES,
            max_request_body_size=_MAX_REQUEST_BYTES,
            asyncore_use_poll=True,
            ident=None,
        )
        self._thread = threading.Thread(target=self._server.run, name="stepwell-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and cut off running requests. Blocks for a moment: do not call it on the event loop's thread."""
        from waitress.wasyncore import close_all

        self._server.trigger.pull_trigger(lambda: close_all(self._map))
        self._thread.join()
        self._server.task_dispatcher.shutdown()


def _application(collector: _Collector, probes: Probes, token: MetricsToken | None) -> WSGIApplication:
    @functools.cache
    def metrics() -> WSGIApplication:
        # Metrics are on by default, but a server that nobody scrapes should not import this.
        from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

        # `?name[]=` asks the collectors that have no names too, and ours has none before it collects.
        registry = CollectorRegistry(support_collectors_without_names=True)
        registry.register(collector)
        ProcessCollector(registry=registry)
        return make_wsgi_app(registry)

    def serve(environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if environment["REQUEST_METHOD"] != "HEAD":
            return answered(environment, start)
        # waitress would send the body too, which the client would read as its next answer
        begun: list[tuple[str, list[tuple[str, str]]]] = []

        def note(status: str, headers: list[tuple[str, str]], _error: object = None, /) -> Any:
            begun.append((status, headers))

        body = b"".join(answered({**environment, "REQUEST_METHOD": "GET"}, note))
        status, headers = begun[-1]
        start(status, [*headers, ("Content-Length", str(len(body)))])
        return []

    def answered(environment: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environment["PATH_INFO"]
        if path not in {"/metrics", *PATHS}:
            return _refused(start, "404 Not Found", f"this port has only /metrics, {' and '.join(PATHS)}")
        if environment["REQUEST_METHOD"] != "GET":
            return _refused(start, "405 Method Not Allowed", f"{path} accepts only GET and HEAD")
        if path in PATHS:
            return probes.answer(environment, start)
        if token is not None and not token.allows(environment.get("HTTP_AUTHORIZATION", "")):
            return _refused(
                start, "401 Unauthorized", "metrics need the token of --metrics-token-file", _CHALLENGE
            )
        answer: Iterable[bytes] = metrics()(environment, start)
        return answer

    return serve


def _refused(start: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> list[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8"), *headers])
    return [text.encode() + b"\n"]


class _Collector:
    """Collects the metrics for the registry, on the thread of a scrape."""

    def __init__(
        self, sources: Sequence[Source], loop: asyncio.AbstractEventLoop, data_dir: Path | None
    ) -> None:
        self._sources = sources
        self._loop = loop
        self._data_dir = data_dir

    def collect(self) -> Iterable[Metric]:
        async def on_loop() -> list[Metric]:
            return [family for source in self._sources for family in source()]

        yield from asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(_SCRAPE_TIMEOUT_S)
        if self._data_dir is not None:
            yield from of_disk(self._data_dir)
