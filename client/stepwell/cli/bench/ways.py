"""Where lanes send calls that they make without the SDK: to the server, or to the replica that the SDK would choose."""

from __future__ import annotations

from typing import Any

import grpc.aio

from stepwell._base.metadata import Pairs
from stepwell._routing.ranking import key_of
from stepwell._routing.replica import Replica
from stepwell._routing.router import Router
from stepwell._transport import channel
from stepwell.config import ClientConfig
from stepwell.errors import StepwellError
from stepwell.v1 import sessions_pb2

_STEP = "/stepwell.v1.SessionService/Step"
_STEP_STREAM = "/stepwell.v1.SessionService/StepStream"


class Way:
    """A channel to a server, and the two calls that lanes make on it."""

    def __init__(self, config: ClientConfig, replica: Replica | None = None) -> None:
        self.replica = replica
        self._channel: grpc.aio.Channel = channel.open_async_channel(config, replica)
        self.step: Any = self._channel.unary_unary(_STEP)
        self.stream: Any = self._channel.stream_stream(
            _STEP_STREAM, response_deserializer=sessions_pb2.StepStreamResponse.FromString
        )

    async def close(self) -> None:
        """End the channel."""
        await self._channel.close()


class Ways:
    """The ways to a server, or to its replicas, each made when it is first taken. Belongs to one event loop."""

    def __init__(self, config: ClientConfig, router: Router | None, metadata: Pairs | None = None) -> None:
        """A client's.

        Args:
            config: Of the client.
            router: Of the client, which looks after its replicas; None: there is one server.
            metadata: To send with each call.
        """
        self._config = config
        self._router = router
        self.metadata = metadata
        self._made: dict[Replica | None, Way] = {}

    @staticmethod
    def key(session_id: str) -> int:
        """What `to` is asked with, for the calls of a session."""
        return key_of(session_id)

    def to(self, key: int) -> Way:
        """The way for a call now: another one than before if a replica has gone or come."""
        replica = None if self._router is None else self._router.choose(key)
        way = self._made.get(replica)
        if way is None:
            way = self._made[replica] = Way(self._config, replica)
        return way

    def failed(self, way: Way, error: StepwellError) -> None:
        """A call has failed there."""
        if self._router is not None and way.replica is not None:
            self._router.failed(way.replica, way.replica.generation, error)

    async def close(self) -> None:
        """End all channels."""
        for way in self._made.values():
            await way.close()
