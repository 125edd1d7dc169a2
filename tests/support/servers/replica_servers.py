"""Several real servers at once, such as share a real Valkey."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from support.load.driver import MODEL
from support.models import programs
from support.secured import Server
from support.servers.server_process import forecast
from support.servers.valkey_servers import Valkey


@contextlib.contextmanager
def started(servers: list[Server]) -> Iterator[list[Server]]:
    """Start some servers at the same time. They end with the block."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(Server.start, servers))
        yield servers


def replicas(valkey: Valkey, count: int) -> contextlib.AbstractContextManager[list[Server]]:
    """Servers of the model `forecast` with the same store, which end with the block."""
    model, cache = {MODEL: forecast().path}, programs.cache_dir()
    store = ["--store", valkey.url(), "--durability", "async"]
    return started(
        [Server(model, cache_dir=cache, start_timeout_s=100.0, extra_args=store) for _ in range(count)]
    )
