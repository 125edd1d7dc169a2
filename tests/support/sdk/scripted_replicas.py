"""Scripted servers that share their sessions, as replicas of one server do that have one store."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, Self

import pytest

from stepwell._base.ports import reserved
from stepwell._routing.ranking import key_of, weight
from stepwell._transport import channel
from support.sdk.scripted_server import Fault, ScriptedServer


class ScriptedReplicas:
    """Context manager; `address` names all of them."""

    def __init__(self, count: int = 3) -> None:
        self._kept = contextlib.ExitStack()
        first = ScriptedServer(port=self._port())
        self.servers = [first, *(ScriptedServer(first, self._port()) for _ in range(count - 1))]
        self.addresses = [server.address for server in self.servers]
        self.address = ",".join(self.addresses)
        self._open = [contextlib.ExitStack() for _ in self.servers]

    def __enter__(self) -> Self:
        # Client and servers share this process: where it cannot run for three seconds, no replica has hung. The limit is
        # no setting of a client, and what it is for is tested with replicas that are processes.
        patch = self._kept.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(channel, "_KEEPALIVE_TIMEOUT_MS", 100_000)
        for server, opened in zip(self.servers, self._open, strict=True):
            opened.enter_context(server)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for opened in self._open:
            opened.close()
        self._kept.close()

    def _port(self) -> int:
        """One that is kept until the block ends, or any where that cannot be."""
        held = reserved("127.0.0.1")
        return 0 if held is None else int(self._kept.enter_context(held).getsockname()[1])

    def stop(self, at: int) -> None:
        """The replica is gone: its calls end, and nothing listens there, nor anybody else until it is back."""
        self._open[at].close()

    def start(self, at: int) -> ScriptedServer:
        """It is there again, on the same port, and knows what the others know."""
        port = int(self.addresses[at].rpartition(":")[2])
        other = self.servers[at - 1]
        self.servers[at] = self._open[at].enter_context(ScriptedServer(other, port))
        return self.servers[at]

    def drain(self, at: int, refusal: Fault) -> None:
        """It takes no calls any more, and says so."""
        self.servers[at].is_serving = False
        for method in (
            "OpenSession",
            "OpenSessions",
            "Step",
            "StepStream",
            "GetState",
            "GetStates",
            "ListModels",
        ):
            self.servers[at].fail(method, refusal, times=10_000)

    def undrain(self, at: int) -> None:
        """It takes calls again."""
        self.servers[at].fail_no_more()
        self.servers[at].is_serving = True

    def requests(self, at: int, method: str) -> list[Any]:
        """What has come to one of them."""
        return self.servers[at].requests(method)

    def ranking(self, session_id: str) -> list[int]:
        """The replicas in the order in which a session goes to them, by the documented form."""
        key = key_of(session_id)
        seeds = [key_of(address.rpartition("//")[2]) for address in self.addresses]
        return sorted(range(len(seeds)), key=lambda at: -weight(key, seeds[at]))

    def ids_of(self, at: int, count: int, prefix: str = "of") -> list[str]:
        """Names of sessions that have this replica."""
        found = (f"{prefix}-{at}-{i}" for i in range(10_000))
        return [one for one in found if self.ranking(one)[0] == at][:count]

    def spread(self, count: int, prefix: str = "spread") -> list[str]:
        """Names of sessions, in turn of each of the replicas."""
        own = [self.ids_of(at, count, prefix) for at in range(len(self.servers))]
        return [one for ids in zip(*own, strict=True) for one in ids][:count]
