"""The async client: the same methods as those of `stepwell.connect`, awaited.

::

    async with stepwell.aio.connect("127.0.0.1:50051") as client:
        async with client.open_session("forecast") as session:
            y = await session.step(x)

Steps awaited at the same time, by `asyncio.gather` or by many tasks, are sent as one message.

The examples of classes are whole programs. Type those of methods into `python -m asyncio`, with an open `client` and
`session`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from stepwell._admin.aio_calls import AsyncAdminCalls
from stepwell._admin.aio_model_calls import AsyncModelCalls
from stepwell._base.bearer import AsyncToken
from stepwell._base.flow import Flow
from stepwell._base.metadata import Metadata
from stepwell._base.tracebacks import end_here, ends_here
from stepwell._core.aio_driver import AsyncDriver
from stepwell._core.group_core import GroupCore
from stepwell._core.group_tracker import GroupTracker
from stepwell._core.handles import ClientFacts
from stepwell._core.tracker import SessionTracker
from stepwell._state.infos import Inputs, Mask, ModelInfo, Outputs, ServerInfo, SessionInfo, SlowSession
from stepwell._state.state import State, States
from stepwell._watch.aio_watch import AsyncWatch
from stepwell._watch.core import ServerWatch, SessionWatch
from stepwell._watch.events import ServerActivity, SessionEvent
from stepwell.aio_group import AsyncSessionGroup
from stepwell.aio_session import AsyncSession, Opening
from stepwell.config import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TIMEOUT_S,
    ClientConfig,
    TlsConfig,
    check_switch,
    connect_timeout,
    server_address,
    tls_config,
    token_or_variable,
)
from stepwell.events import EventHooks

__all__ = ["AsyncClient", "AsyncSession", "AsyncSessionGroup", "connect"]

T = TypeVar("T")


@ends_here
def connect(
    address: str | Sequence[str] | None = None,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    connect_timeout_s: float | None = None,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    coalesce: bool = True,
    tls: TlsConfig | bool | None = None,
    metadata: Metadata = (),
    event_hooks: EventHooks | None = None,
    tracing: bool = False,
    token: AsyncToken | None = None,
    allow_insecure_token: bool = False,
    tenant: str | None = None,
) -> AsyncClient:
    """Returns an async client of the server at `address`. The first call makes the connection.

    Args:
        address: HOST:PORT, [IPv6]:PORT, unix:PATH, dns:///HOST:PORT, grpc://HOST:PORT (without TLS) or
            grpcs://HOST:PORT (with TLS). None: the environment variable STEPWELL_SERVER, or 127.0.0.1:50051 if it is
            not set. Several addresses, in a list or separated by commas, are replicas that share a store; so are all
            addresses of a name after dns:///. Each session is served by one replica. If that replica fails, another
            one continues the session.
        timeout_s: Default time limit of a call, over all its attempts, in seconds; `math.inf` for none.
        connect_timeout_s: Time limit of calls until this client has reached the server for the first time, in
            seconds; `math.inf`: the same as `timeout_s`. Later calls are retried up to their own limit. None: the
            environment variable STEPWELL_CONNECT_TIMEOUT_S, or 1 second if it is not set.
        max_message_bytes: Size of the largest message to send or receive, in bytes.
        coalesce: Send the steps that are awaited at the same time as one message, which gives the highest throughput.
            False: every step is a call of its own.
        tls: A `TlsConfig`, or True for TLS with the CAs of the system. None: no TLS, unless the address asks for it.
        metadata: Headers to send with every call: a mapping, or pairs, of key and value. Values are strings, or
            bytes if the key ends in "-bin".
        event_hooks: Functions or coroutine functions to call at each event, by the name of the event: "request",
            "response", "retry", "model_version" or "replica". `stepwell.events` describes them and their arguments.
        tracing: Create an OpenTelemetry span for each operation and let the server continue its trace. The tracer
            provider of this process decides where spans go. Needs opentelemetry-api.
        token: The bearer token to send with every call, or a function or coroutine function without arguments that
            returns it. The function is called before the first call, shortly before its token expires if that is a
            JWT, and when the server rejects its token; that call is then made once more. None: the environment
            variable STEPWELL_TOKEN, or no token if it is not set.
        allow_insecure_token: Send the token to another machine even without TLS, where anybody on the network path
            can read it.
        tenant: The tenant to act in, for admins; "*" lists the sessions of all tenants. None: the caller's own.

    Raises:
        InvalidInputError: An argument or environment variable breaks a rule; the message names it.

    Example:
        >>> import asyncio
        >>> async def main():
        ...     async with stepwell.aio.connect(address) as client:
        ...         return [model.name for model in await client.models()]
        >>> asyncio.run(main())
        ['forecast']
    """
    config = ClientConfig(
        server_address(address),
        timeout_s,
        max_message_bytes,
        tls_config(tls),
        connect_timeout(connect_timeout_s),
        metadata,
        event_hooks,
        tracing=tracing,
        token=token_or_variable(token),
        allow_insecure_token=allow_insecure_token,
        tenant=tenant,
    )
    return AsyncClient(config, coalesce=coalesce)


@end_here
class AsyncClient(AsyncAdminCalls, AsyncModelCalls, ClientFacts):
    """A connection to a server. Create one with `connect`, and share it.

    Every method takes `timeout_s`, the time limit of the call over all its attempts, in seconds. None means the
    client's default. Within it, the client retries calls that fail because the server is unavailable or overloaded;
    see `stepwell.errors`. Calls to a server that this client has never reached fail after `connect_timeout_s`.

    The client belongs to the event loop in which you first use it. Do not use it from other threads or loops. Not
    fork-safe, because gRPC's threads do not survive a fork: connect in the child process.

    The server may still carry out a call that you cancel. `AsyncSession` explains how to continue after that.

    Example:
        >>> import asyncio
        >>> async def main():
        ...     async with stepwell.aio.connect(address) as client:
        ...         async with client.open_session("forecast") as session:
        ...             steps = [session.step(np.ones((1, 3), np.float32)) for _ in range(2)]
        ...             return [y.shape for y in await asyncio.gather(*steps)]
        >>> asyncio.run(main())
        [(1, 1), (1, 1)]
    """

    def __init__(self, config: ClientConfig, *, coalesce: bool = True) -> None:
        check_switch("coalesce", coalesce)
        self._config = config
        self._driver = AsyncDriver(config, coalesce=coalesce)
        self._core = self._driver.core

    async def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Returns all models of the server, sorted by name.

        Example:
            >>> [model.name for model in await client.models()]
            ['forecast']
        """
        return await self._driver.run(self._core.models(self._core.deadline(timeout_s)))

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Describes the server: its id, its network front and all its models.

        Example:
            >>> (await client.server_info()).front in ("native", "python")
            True
        """
        return await self._driver.run(self._core.server_info(self._core.deadline(timeout_s)))

    async def slow_sessions(self, *, limit: int = 10, timeout_s: float | None = None) -> list[SlowSession]:
        """Returns the sessions with the slowest steps of the last minute, slowest first.

        Arguments, result and errors are those of `Client.slow_sessions`.

        Example:
            >>> (await client.slow_sessions(limit=1))[1:]
            []
        """
        return await self._driver.run(self._core.slow_sessions(limit, self._core.deadline(timeout_s)))

    async def model(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """Describes one model.

        Arguments, result and errors are those of `Client.model`.

        Example:
            >>> [tensor.shape for tensor in (await client.model("forecast")).inputs]
            [(3,)]
        """
        return await self._driver.run(self._core.model(name, self._core.deadline(timeout_s)))

    def open_session(
        self,
        model: str,
        *,
        batch_size: int = 1,
        session_id: str | None = None,
        state: States | None = None,
        must_be_new: bool = False,
        max_idle_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Opening[AsyncSession]:
        """Opens a session, or resumes the live session with that id.

        Arguments, result and errors are those of `Client.open_session`. Await the result, or use it in `async with`.

        Example:
            >>> session = await client.open_session("forecast", session_id="user-43")
            >>> session.id, session.batch_size
            ('user-43', 1)
            >>> await session.close()
        """
        deadline = self._core.deadline(timeout_s)
        flow = self._core.open_session(
            model, batch_size, session_id, state, must_be_new, max_idle_s, deadline
        )
        return Opening(self._session(flow, owned=session_id is None), "AsyncClient.open_session")

    @ends_here
    async def _session(self, flow: Flow[SessionTracker], owned: bool) -> AsyncSession:
        return AsyncSession(self._driver, await self._driver.run(flow), owned=owned)

    def open_sessions(
        self,
        model: str,
        n: int,
        *,
        batch_size: int = 1,
        session_ids: Sequence[str] | None = None,
        resume: bool = False,
        max_idle_s: float | None = None,
        timeout_s: float | None = None,
    ) -> Opening[AsyncSessionGroup]:
        """Opens many sessions of one model to step together. The call opens all of them or none.

        Arguments, result and errors are those of `Client.open_sessions`. Await the result, or use it in `async with`.

        Example:
            >>> async with client.open_sessions("forecast", 8) as group:
            ...     (await group.step(np.ones((8, 3), np.float32))).shape
            (8, 1)
        """
        deadline = self._core.deadline(timeout_s)
        flow = self._core.open_sessions(
            model, n, batch_size, session_ids, deadline, resume=resume, max_idle_s=max_idle_s
        )
        return Opening(self._group(flow, owned=session_ids is None), "AsyncClient.open_sessions")

    @ends_here
    async def _group(self, flow: Flow[GroupTracker], owned: bool) -> AsyncSessionGroup:
        return AsyncSessionGroup(
            self._driver, GroupCore(self._core, await self._driver.run(flow)), owned=owned
        )

    def watch_sessions(
        self,
        session_ids: Iterable[str],
        *,
        inputs: bool = False,
        outputs: bool = False,
        states: bool = False,
        state_names: Iterable[str] | None = None,
        every: int = 1,
        interval_s: float | None = None,
    ) -> AsyncWatch[SessionEvent]:
        """Watches sessions: reports their changes, whoever makes them, once the server has stored them.

        It makes no call itself: the watch begins with its block, or with its first event. Arguments and errors are
        those of `Client.watch_sessions`.

        Example:
            >>> async with client.watch_sessions([session.id], states=True) as watch:
            ...     first = await anext(watch)
            ...     y = await session.step(np.ones((1, 3), np.float32))
            ...     (await anext(watch)).revision
            1
        """
        core = SessionWatch(
            self._core,
            session_ids,
            inputs=inputs,
            outputs=outputs,
            states=states,
            state_names=state_names,
            every=every,
            interval_s=interval_s,
        )
        return AsyncWatch(self._driver, core)

    def watch_server(self, *, interval_s: float = 1.0) -> AsyncWatch[ServerActivity]:
        """Watches the server: reports its rates, latencies, models and sessions, as `stepwell top` shows them.

        Arguments are those of `Client.watch_server`.

        Example:
            >>> async with client.watch_server() as watch:
            ...     (await anext(watch)).is_ready
            True
        """
        return AsyncWatch(self._driver, ServerWatch(self._core, interval_s))

    async def predict(
        self,
        model: str,
        x: Inputs,
        state: States | None = None,
        *,
        reset: Mask | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Outputs, State]:
        """Runs a model without a session. Its outputs have the same bits as those of a session.

        Arguments, result and errors are those of `Client.predict`.

        Example:
            >>> y, state = await client.predict("forecast", np.ones((5, 3), np.float32))
            >>> y.shape, state.batch_size
            ((5, 1), 5)
        """
        return await self._driver.run(
            self._core.predict(model, x, state, self._core.deadline(timeout_s), reset)
        )

    async def session_info(self, session_id: str, *, timeout_s: float | None = None) -> SessionInfo:
        """Describes a session as of its last completed change. This does not count as use of the session.

        Arguments, result and errors are those of `Client.session_info`.

        Example:
            >>> (await client.session_info(session.id)).model
            'forecast'
        """
        return await self._driver.run(self._core.session_info(session_id, self._core.deadline(timeout_s)))

    async def close_session(self, session_id: str, *, timeout_s: float | None = None) -> None:
        """Deletes a session and its state.

        Arguments, result and errors are those of `Client.close_session`.

        Example:
            >>> await client.close_session((await client.open_session("forecast")).id)
        """
        await self._driver.run(self._core.close_session(session_id, self._core.deadline(timeout_s)))

    async def close(self) -> None:
        """Closes the connection. Active calls raise `ClosedError`. Sessions stay on the server.

        Example:
            >>> await stepwell.aio.connect(address).close()
        """
        await self._driver.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
