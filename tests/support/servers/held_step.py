"""A step that a server has under way for as long as a test likes: its commit does not come back before `release`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from stepwell.v1 import sessions_pb2 as pb
from support.peers.proxy import Proxy
from support.servers.server_process import FEATURES, random_tensor
from support.servers.valkey_servers import Valkey

_TIMEOUT_S = 100.0


class HeldStore:
    """A Valkey behind a proxy. `options` are those of a server that uses it."""

    def __init__(self, valkey: Valkey, proxy: Proxy) -> None:
        url = valkey.url("?timeout_ms=60000").replace(valkey.address, proxy.address)
        self.options = ("--store", url, "--durability", "async")
        self._proxy = proxy

    def begin_step(self, stub: Any, session_id: str) -> Any:
        """A step whose commit is held. Returns its call when the server waits for the store."""
        request = pb.StepRequest(session_id=session_id, inputs=[random_tensor(1, 1, 1, FEATURES)])
        self.hold()
        call = stub.Step.future(request, timeout=10 * _TIMEOUT_S)  # for as long as the test takes
        self.wait()
        return call

    def hold(self) -> None:
        """Keep back the answers of the store from now on."""
        self._proxy.hold("answers")

    def wait(self) -> None:
        """Wait until one is kept back."""
        assert self._proxy.held.wait(_TIMEOUT_S)

    def release(self) -> None:
        """Let the store answer, now and from now on."""
        self._proxy.release()


@contextlib.contextmanager
def held_store() -> Iterator[HeldStore]:
    """A new store."""
    with Valkey(append="no") as valkey, Proxy(valkey.address, seed=1) as proxy:
        yield HeldStore(valkey, proxy)
