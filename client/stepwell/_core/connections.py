"""The connections of a sync client: one to its server, or one to each replica that it has asked."""

from __future__ import annotations

import threading
from collections.abc import Callable

from stepwell._base.flow import Retrier
from stepwell._batching.sender import Sender
from stepwell._batching.steps import Step, Stepped, read
from stepwell._routing.probing import Prober
from stepwell._routing.replica import Replica
from stepwell._transport import channel
from stepwell._transport.channel import SyncTransport
from stepwell._transport.stream import Link
from stepwell._transport.tokens import Tokens
from stepwell.config import ClientConfig
from stepwell.errors import StepwellError


class Connection:
    """A channel, its stream, and the sender of its steps. Thread-safe."""

    def __init__(
        self,
        config: ClientConfig,
        retrier: Retrier,
        known: Tokens,
        replica: Replica | None,
        *,
        coalesce: bool,
    ) -> None:
        self.transport = SyncTransport(config, known, replica)
        self.link = Link(self.transport.stream, config.address if replica is None else replica.address)
        # A quarter of the message limit, because outputs may be larger than inputs.
        frame_bytes = config.max_message_bytes // 4
        transport = self.transport

        def unary(step: Step) -> Stepped:
            return read(transport.invoke(retrier.unary(step)))

        self.sender = Sender(self.link, retrier, unary, frame_bytes)
        self.step: Callable[[Step], Stepped] = self.sender.step if coalesce else unary
        """Makes one attempt of a step."""

    def close(self) -> None:
        """Ends the calls in flight, then the channel."""
        self.transport.is_closed = True
        self.sender.close()
        self.link.close()
        self.transport.close()

    def drop(self) -> None:
        """The same while the client goes on: calls in flight are tried again elsewhere."""
        self.transport.drop()
        self.sender.close()
        self.link.close()


class Connections:
    """The connections to replicas, each made when it is first needed. Thread-safe."""

    def __init__(self, config: ClientConfig, retrier: Retrier, *, coalesce: bool) -> None:
        assert retrier.router is not None
        self._config = config
        self._retrier = retrier
        self._tokens = channel.tokens(config)
        self._coalesce = coalesce
        self._router = retrier.router
        self._made: dict[Replica, Connection] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._prober = Prober(self._router, self._check, config.connect_timeout_s)
        self._router.attach(self._prober.wake, self._drop)

    def to(self, replica: Replica) -> Connection:
        """The connection to a replica."""
        return self._made.get(replica) or self._make(replica)

    def _make(self, replica: Replica) -> Connection:
        with self._lock:
            if self._is_closed:
                raise channel.closed()
            if replica not in self._made:
                self._made[replica] = Connection(
                    self._config, self._retrier, self._tokens, replica, coalesce=self._coalesce
                )
            return self._made[replica]

    def _check(self, replica: Replica, timeout_s: float) -> StepwellError | None:
        return self.to(replica).transport.check(timeout_s)

    def _drop(self, replica: Replica) -> None:
        with self._lock:
            connection = self._made.pop(replica, None)
        if connection is not None:
            connection.drop()

    def close(self) -> None:
        """Ends all of them."""
        with self._lock:
            self._is_closed = True
            made = list(self._made.values())
        self._prober.close()
        for connection in made:
            connection.close()
