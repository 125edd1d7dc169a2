"""Real servers that share a real Valkey."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from support import programs
from support.driver import MODEL
from support.secured import Server
from support.server_process import forecast
from support.valkey import Valkey


@contextlib.contextmanager
def replicas(valkey: Valkey, count: int) -> Iterator[list[Server]]:
    """Servers of the model `forecast` with the same store, which end with the block."""
    store = ["--store", valkey.url(), "--durability", "async"]
    servers = [
        Server(
            {MODEL: forecast().path}, cache_dir=programs.cache_dir(), start_timeout_s=100.0, extra_args=store
        )
        for _ in range(count)
    ]
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(Server.start, servers))
        yield servers
