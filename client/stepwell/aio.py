"""The async client: the same as `stepwell.connect`, awaited.

    async with stepwell.aio.connect("127.0.0.1:50051") as client:
        async with client.open_session("forecast") as session:
            y = await session.step(x)

Steps awaited at the same time, by `asyncio.gather` or by many tasks, leave together as one message.

The examples of classes are whole programs. Those of methods are as one types them into `python -m asyncio`, with an
open `client` and `session`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """A client of the server at `address`. The connection itself is made by the first call.

    Args:
        address: HOST:PORT, [IPv6]:PORT, unix:PATH, dns:///HOST:PORT, grpc://HOST:PORT (without TLS) or
            grpcs://HOST:PORT (with TLS). None: the environment variable STEPWELL_SERVER, else 127.0.0.1:50051.
            Several, in a list or with commas between, are replicas that share a store, and so is each address of a
            name after dns:///. Each session has one of them; when that is gone it continues at another one.
        timeout_s: Time limit of each call over all its attempts, in seconds, unless the call is given
            another; `math.inf` for none.
        connect_timeout_s: Time limit of a call as long as this client has never reached the server, in
            seconds; `math.inf`: as `timeout_s`. Once it has, calls are tried again up to their own limit. None:
            the environment variable STEPWELL_CONNECT_TIMEOUT_S, else 1 second.
        max_message_bytes: Largest message to send or receive.
        coalesce: Steps awaited at the same time leave together as one message, which is where throughput
            comes from. False: each step is a call of its own.
        tls: How to speak TLS; True: with the CAs of the system. None: not at all, unless the address says so.
        metadata: Pairs of key and value, or a mapping, to send with every call: headers, for a proxy on the
            way, say. Values are strings, or bytes where the key ends in "-bin".
        event_hooks: Functions to call at each event, by the name of the event, "request", "response" or
            "retry": `stepwell.events` says what they get, and that they may be coroutine functions.
        tracing: Make a span of OpenTelemetry of each operation, and send it to the server, which continues the trace.
            What becomes of spans is up to the provider that this process has set. Needs opentelemetry-api.
        token: The bearer token to send with every call, for servers that ask who calls; or a function without
            arguments that returns it, or a coroutine function. It is called for the first call, again shortly before its token expires, if
            that is a JWT, and when a server refuses its token: the call is then made once more. None: the environment
            variable STEPWELL_TOKEN, else none.
        allow_insecure_token: Send the token also over a plain connection to another machine, where anybody on the
            way can read it.
        tenant: The tenant to act in, for callers whose role is admin; "*" for all of them, where sessions are listed.
            None: the caller's own.

    Raises:
        InvalidInputError: An argument, or the variable, breaks its rule.

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
    """A connection to a server. Make one with `connect`, and share it.

    Every method takes `timeout_s`, the time limit of that call over all its attempts; None means the
    client's own. UNAVAILABLE and overload are retried within it (see `stepwell.errors`); a server that was never
    reached is given up after `connect_timeout_s`.

    Belongs to the event loop it is first used in; not for use from other threads or loops. Not fork-safe:
    gRPC's threads do not survive a fork, so connect in the child.

    A call that is cancelled may still be carried out by the server. The session stays usable, by the rule
    of `AsyncSession`.

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
        """All models of the server, in the order of their names.

        Example:
            >>> [model.name for model in await client.models()]
            ['forecast']
        """
        return await self._driver.run(self._core.models(self._core.deadline(timeout_s)))

    async def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """The server: what speaks to the network, and all models.

        Example:
            >>> (await client.server_info()).front in ("native", "python")
            True
        """
        return await self._driver.run(self._core.server_info(self._core.deadline(timeout_s)))

    async def slow_sessions(self, *, limit: int = 10, timeout_s: float | None = None) -> list[SlowSession]:
        """Sessions with the slowest steps of the last minute, the slowest first.

        The server looks at the slowest session of each pass, and keeps a hundred.

        Example:
            >>> (await client.slow_sessions(limit=1))[1:]
            []
        """
        return await self._driver.run(self._core.slow_sessions(limit, self._core.deadline(timeout_s)))

    async def model(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """One model.

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
        """Opens a session, or resumes the live session of that id.

        Arguments, result and errors are those of `Client.open_session`.

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
        """Opens many sessions of one model, to be stepped together: all of them or none.

        With `resume` it takes up those of `session_ids` that are live.

        Arguments, result and errors are those of `Client.open_sessions`.

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

    async def predict(
        self,
        model: str,
        x: Inputs,
        state: States | None = None,
        *,
        reset: Mask | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Outputs, State]:
        """Runs a model without a session: the same weights and the same bits.

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
        """One session as of its last completed change. Does not count as use of it.

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
        """Ends the connection; calls under way end with `ClosedError`. Sessions stay on the server.

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
