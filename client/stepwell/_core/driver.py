"""Runs the operations of a sync client, its sessions and its groups on the client's connections."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from stepwell._base.flow import Flow, Notify, drive
from stepwell._batching.sender import Sender
from stepwell._batching.steps import Step, Stepped, read
from stepwell._core.core import Core
from stepwell._core.finisher import Finisher
from stepwell._core.lanes import Ask, Exchange, exchange
from stepwell._core.observer import notify
from stepwell._routing.lookup import Lookup, look_up
from stepwell._routing.probing import Prober
from stepwell._routing.router import Router
from stepwell._transport.call import Call, Endpoint
from stepwell._transport.channel import SyncTransport, closed, dropped, tokens
from stepwell._transport.stream import Link
from stepwell._transport.tokens import Tokens
from stepwell.config import ClientConfig
from stepwell.errors import StepwellError

T = TypeVar("T")


class Connection:
    """A channel, its stream, and the sender of its steps. Thread-safe."""

    def __init__(
        self, config: ClientConfig, known: Tokens, endpoint: Endpoint | None, *, coalesce: bool
    ) -> None:
        self.transport = transport = SyncTransport(config, known, endpoint)
        self.link = Link(self.transport.stream, config.address if endpoint is None else endpoint.address)

        def unary(step: Step) -> Stepped:
            return read(transport.invoke(step.call(config.max_message_bytes)))

        self.sender = Sender(self.link, unary, config.max_message_bytes)
        self.step: Callable[[Step], Stepped] = self.sender.step if coalesce else unary
        """Makes one attempt of a step."""

    def close(self, ended: Callable[[], StepwellError] = closed) -> None:
        """Ends the active calls with these errors, then the channel."""
        self.transport.end(ended)
        self.sender.close(ended)
        self.link.close(ended)
        self.transport.close()


class Connections:
    """The connections of a client, each opened when it is first needed. Thread-safe."""

    def __init__(self, config: ClientConfig, *, coalesce: bool) -> None:
        self._config = config
        self._tokens = tokens(config)
        self._coalesce = coalesce
        self._made: dict[Endpoint | None, Connection] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def to(self, endpoint: Endpoint | None) -> Connection:
        """The connection to an endpoint; None: the client has one server."""
        return self._made.get(endpoint) or self._make(endpoint)

    def _make(self, endpoint: Endpoint | None) -> Connection:
        with self._lock:
            if self._is_closed:
                raise closed()
            if endpoint not in self._made:
                self._made[endpoint] = Connection(
                    self._config, self._tokens, endpoint, coalesce=self._coalesce
                )
            return self._made[endpoint]

    def check(self, endpoint: Endpoint, timeout_s: float) -> StepwellError | None:
        """Checks whether an endpoint accepts calls. Returns why not, or None if it does."""
        return self.to(endpoint).transport.check(timeout_s)

    def drop(self, endpoint: Endpoint) -> None:
        """Closes the connection to an endpoint that is no longer used. Active calls are retried elsewhere."""
        with self._lock:
            connection = self._made.pop(endpoint, None)
        if connection is not None:
            connection.close(dropped)

    def renew(self) -> None:
        """Abandons all connections, so that the next calls connect again; active calls are retried there.

        Threads close the old connections. They may wait forever if a lock of gRPC's was left locked.
        """
        with self._lock:
            made, self._made = self._made, {}
        for connection in made.values():
            threading.Thread(
                target=connection.close, args=(dropped,), name="stepwell-drop", daemon=True
            ).start()

    def close(self) -> None:
        """Closes all connections."""
        with self._lock:
            self._is_closed = True
            made = list(self._made.values())
        for connection in made:
            connection.close()


class Driver:
    """Runs the flows of a client. Thread-safe."""

    def __init__(self, config: ClientConfig, *, coalesce: bool) -> None:
        self.connections = connections = Connections(config, coalesce=coalesce)
        probers: list[Prober] = []

        def watch(router: Router) -> Prober:
            probers.append(Prober(router, connections.check, connections.drop, config.connect_timeout_s))
            return probers[0]

        self._probers = probers
        self._closing = threading.Event()
        self._connect_timeout_s = config.connect_timeout_s
        self._finisher = Finisher(self.answer, self._end)
        self.core = Core(config, finish=self._finisher.add, watch=watch)
        if self.core.router is None:
            connections.to(None)

    @property
    def is_closed(self) -> bool:
        """Whether the client is closed."""
        return self._closing.is_set()

    def run(self, flow: Flow[T]) -> T:
        """Runs a flow of the core to its result."""
        return drive(self.core.watched(flow), self.answer)

    def answer(self, ask: Ask) -> Any:
        """Answers an ask of a flow.

        An interrupt (Ctrl-C, or any exception that is not the SDK's) costs the connections, never a session: it may
        have occurred anywhere in gRPC or in the sending of frames, so neither is used again. The outcome of the
        session's change is then unknown, and the same call completes it.
        """
        try:
            if isinstance(ask, Step):
                return self.connections.to(ask.to).step(ask)
            if isinstance(ask, Call):
                return self.connections.to(ask.to).transport.invoke(ask)
            if isinstance(ask, Exchange):
                return exchange(ask, self._link_to)
        except StepwellError:
            raise
        except BaseException:
            self.connections.renew()
            raise
        if isinstance(ask, Notify):
            return notify(ask)
        if isinstance(ask, Lookup):
            return look_up(ask, self._connect_timeout_s)
        if self._closing.wait(ask.seconds if ask.is_waited else 0.0):
            raise closed()
        return None

    def _link_to(self, endpoint: Endpoint | None) -> Link:
        return self.connections.to(endpoint).link

    def close(self) -> None:
        """Ends the connections; active calls raise `ClosedError`."""
        self._finisher.close()

    def _end(self) -> None:
        self._closing.set()
        for prober in self._probers:
            prober.close()
        self.connections.close()
