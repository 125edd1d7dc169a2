"""Channels, and single attempts of calls. gRPC's exceptions are caught only here and in the links."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from stepwell._base import addresses, metadata
from stepwell._base.metadata import Pairs
from stepwell._transport import status, tls
from stepwell._transport.call import Call, Endpoint
from stepwell._transport.tokens import Tokens
from stepwell.config import ClientConfig, TlsConfig
from stepwell.errors import (
    ClosedError,
    DeadlineExceededError,
    StepwellError,
    UnauthenticatedError,
    UnavailableError,
)
from stepwell.v1 import models_pb2_grpc, sessions_pb2, sessions_pb2_grpc, watch_pb2_grpc

#: gRPC's own time limit of an attempt to connect, in seconds.
_LONGEST_CONNECT_S = 20.0
#: If calls wait and a replica has sent nothing for the first of these times, gRPC sends it a ping; the second is the time
#: limit of the answer. gRPC sends at most two such pings without a message in between, which every server accepts.
_KEEPALIVE_MS, _KEEPALIVE_TIMEOUT_MS = 2000, 3000
_STEPS = "/stepwell.v1.SessionService"
_HEALTH = "/grpc.health.v1.Health/Check"
#: grpc.health.v1.HealthCheckResponse with the status SERVING.
_SERVING = b"\x08\x01"
#: Services of the calls that do not belong to SessionService.
_SERVICES = {
    **dict.fromkeys(("ListModels", "GetModel", "ListSlowSessions", "Predict"), "ModelService"),
    **dict.fromkeys(
        ("LoadModel", "UploadModel", "UnloadModel", "SetDefault", "SetLabel"), "ModelAdminService"
    ),
    **dict.fromkeys(("WatchSessions", "WatchServer"), "WatchService"),
}
#: Types of a single request; otherwise a call streams its requests.
_ONE = (bytes, Message)
# If a message could not be written, grpc.aio ends the call with a status of its own, INTERNAL, instead of
# the real one, usually UNAVAILABLE (`_StreamRequestMixin._write` in grpc.aio). Such a status is recognized by this
# beginning of its debug string; that of a received status begins with its code.
_FAILED_WRITE = 'Failed "execute_batch"'


def open_channel(config: ClientConfig, endpoint: Endpoint | None = None) -> grpc.Channel:
    """A channel of the sync client. The first call makes the connection.

    Args:
        config: The configuration of the client.
        endpoint: The replica; None: the client has one server.
    """
    config, options = _for(config, endpoint)
    if config.tls is None:
        return grpc.insecure_channel(config.address, options=options)
    return grpc.secure_channel(config.address, tls.credentials(config.tls), options=options)


def open_async_channel(config: ClientConfig, endpoint: Endpoint | None = None) -> grpc.aio.Channel:
    """The same for the running event loop. Channels are opened nowhere else, not even for `stepwell bench`."""
    config, options = _for(config, endpoint)
    if config.tls is None:
        return grpc.aio.insecure_channel(config.address, options=options)
    return grpc.aio.secure_channel(config.address, tls.credentials(config.tls), options=options)


def _for(config: ClientConfig, endpoint: Endpoint | None) -> tuple[ClientConfig, list[tuple[str, Any]]]:
    """The configuration and the gRPC options of a channel: for the client's server, or for one of its endpoints."""
    if endpoint is None:
        return config, _options(config)
    tls = config.tls
    if tls is not None and endpoint.host and tls.server_name is None:
        tls = TlsConfig(tls.ca, tls.cert, tls.key, endpoint.host)
    config = dataclasses.replace(config, address=endpoint.address, tls=tls)
    options = _options(config)
    if endpoint.authority and tls is None:
        options.append(("grpc.default_authority", endpoint.authority))
    # detects a hung or disconnected replica while calls wait for it, so that they go to another one
    options.append(("grpc.keepalive_time_ms", _KEEPALIVE_MS))
    options.append(("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS))
    # also for gRPC's bandwidth pings: it sends no others while it waits for one of these, by default for a minute
    options.append(("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS))
    return config, options


def _options(config: ClientConfig) -> list[tuple[str, Any]]:
    attempt_ms = int(1000 * min(max(config.connect_timeout_s, 0.01), _LONGEST_CONNECT_S))
    is_on_this_machine = addresses.is_on_this_machine(config.address)
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        # The SDK decides what to retry, and when.
        ("grpc.enable_retries", 0),
        # Reconnects within a second to a server that comes back; sooner on this machine, where attempts are cheap.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 200 if is_on_this_machine else 1000),
        # Despite its name, the time limit of one attempt to connect, and of a name server's answer.
        ("grpc.min_reconnect_backoff_ms", attempt_ms),
        ("grpc.dns_ares_query_timeout", attempt_ms),
        # One client's failed connections are not another's.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if is_on_this_machine:
        # Otherwise a proxy of the environment (http_proxy) would get calls to this machine, including tokens.
        options.append(("grpc.enable_http_proxy", 0))
    if config.tls is not None and config.tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", config.tls.server_name))
    elif config.address.startswith("unix:"):
        # gRPC would use the path, which is not a host name and is rejected by many servers
        options.append(("grpc.default_authority", "localhost"))
    return options


def tokens(config: ClientConfig) -> Tokens:
    """The metadata of a client's calls."""
    tenant = () if config.tenant is None else (("stepwell-tenant", config.tenant),)
    # An Envoy in front of replicas sends calls with the same value to the same replica (`stepwell envoy-config`). So the
    # stream and calls of a client find its sessions in memory there, also after it has reconnected.
    affinity = ("stepwell-session", secrets.token_hex(8))
    return Tokens(config.token, (affinity, *tenant, *metadata.checked(config.metadata)))


def service_of(rpc: str) -> str:
    """The service of a method, without its package."""
    return _SERVICES.get(rpc, "SessionService")


def _methods(channel: Any) -> dict[str, Any]:
    """The calls by name, on a channel of either kind. Those of steps take encoded requests."""
    sessions = sessions_pb2_grpc.SessionServiceStub(channel)
    models, admin = models_pb2_grpc.ModelServiceStub(channel), models_pb2_grpc.ModelAdminServiceStub(channel)
    return {
        **vars(sessions),
        **vars(models),
        **vars(admin),
        **vars(watch_pb2_grpc.WatchServiceStub(channel)),
        "Step": channel.unary_unary(
            f"{_STEPS}/Step",
            response_deserializer=sessions_pb2.StepResponse.FromString,
            _registered_method=True,
        ),
        "StepStream": channel.stream_stream(
            f"{_STEPS}/StepStream",
            response_deserializer=sessions_pb2.StepStreamResponse.FromString,
            _registered_method=True,
        ),
    }


def closed() -> ClosedError:
    """The error for using a closed client."""
    return ClosedError("the client must be open; it was closed")


def dropped() -> UnavailableError:
    """The error of calls on a connection that the client abandons while it stays open."""
    return UnavailableError("the client has closed this connection")


def translate(error: grpc.RpcError) -> StepwellError:
    """The error of a failed call. Both kinds of call have code, details and trailing metadata."""
    failed: Any = error
    if failed.code() is grpc.StatusCode.INTERNAL and _is_failed_write(failed):
        return UnavailableError("the connection broke while a message was being sent")
    return status.from_rpc(failed.code(), failed.details(), failed.trailing_metadata())


def _is_failed_write(failed: Any) -> bool:
    debug: str | None = failed.debug_error_string()
    return debug is not None and debug.startswith(_FAILED_WRITE)


def _refused(error: StepwellError, known: Tokens, metadata: Pairs | None) -> StepwellError:
    """The error of a call. If its token was rejected, the next call uses another one."""
    if isinstance(error, UnauthenticatedError):
        known.refused(metadata)
    return error


class OpenedStream:
    """A call of StepStream, and its metadata."""

    def __init__(self, call: Any, known: Tokens, metadata: Pairs | None) -> None:
        self.call = call
        self._tokens = known
        self._metadata = metadata

    def error(self, failed: grpc.RpcError) -> StepwellError:
        """Why it has ended. A rejection may have come after some of its frames were applied."""
        error = _refused(translate(failed), self._tokens, self._metadata)
        if isinstance(error, UnauthenticatedError):
            error.outcome = "unknown"
        return error


def _unwell(answer: bytes) -> StepwellError | None:
    if answer == _SERVING:
        return None
    return UnavailableError("its health check reports that it accepts no calls", outcome="not_applied")


def _unwell_by(error: grpc.RpcError) -> StepwellError | None:
    """The meaning of a failed health check. If it was rejected, the server, or a proxy in front of it, did answer."""
    failed = translate(error)
    return failed if isinstance(failed, UnavailableError | DeadlineExceededError) else None


def _with(pairs: metadata.Pairs | None, call: Call) -> metadata.Pairs | None:
    """The metadata of every call, and of this one."""
    return (*(pairs or ()), *call.metadata) if call.metadata else pairs


def _read(replies: Any, on_reply: Callable[[Any], object]) -> None:
    """Reads the responses of a call that streams them, and always ends the call."""
    try:
        for reply in replies:
            on_reply(reply)
    finally:
        replies.cancel()


async def _read_async(replies: Any, on_reply: Callable[[Any], object]) -> None:
    """As `_read`."""
    try:
        async for reply in replies:
            taken = on_reply(reply)
            if inspect.isawaitable(taken):
                await taken
    finally:
        replies.cancel()


async def _awaited(requests: Iterator[Message]) -> AsyncIterator[Message]:
    """Requests whose creation takes time, such as reading a file, created in a thread."""
    while (request := await asyncio.to_thread(next, requests, None)) is not None:
        yield request


class _Transport:
    """The common part of a channel of both clients, to the server or to one of its replicas."""

    def __init__(
        self, channel: grpc.Channel | grpc.aio.Channel, config: ClientConfig, known: Tokens | None
    ) -> None:
        """`known`: tokens that it shares with other channels."""
        self._methods = _methods(channel)
        self._tokens = known or tokens(config)
        self._metadata = config.metadata
        self._ended: Callable[[], StepwellError] = closed
        self.is_closed = False

    def end(self, ended: Callable[[], StepwellError]) -> None:
        """Later calls end with these errors."""
        self._ended = ended
        self.is_closed = True

    def _check_open(self) -> None:
        if self.is_closed:
            raise self._ended()


class SyncTransport(_Transport):
    """A channel of the sync client."""

    def __init__(
        self, config: ClientConfig, known: Tokens | None = None, endpoint: Endpoint | None = None
    ) -> None:
        self._channel = open_channel(config, endpoint)
        super().__init__(self._channel, config, known)

    def stream(self, requests: Iterator[bytes]) -> OpenedStream:
        """Opens the stream of frames.

        Raises:
            UnauthenticatedError: There is no token.
        """
        metadata = self._tokens.metadata()
        return OpenedStream(self._methods["StepStream"](requests, metadata=metadata), self._tokens, metadata)

    def invoke(self, call: Call) -> Any:
        """One attempt of a call."""
        self._check_open()
        metadata = self._tokens.metadata()
        try:
            request = call.request if isinstance(call.request, _ONE) else call.request()
            answer = self._methods[call.rpc](request, timeout=call.timeout_s, metadata=_with(metadata, call))
            if call.on_open is not None:
                call.on_open(answer.cancel)
            return answer if call.on_reply is None else _read(answer, call.on_reply)
        except grpc.RpcError as error:
            raise (
                self._ended() if self.is_closed else _refused(translate(error), self._tokens, metadata)
            ) from None
        except ValueError:
            # gRPC raises this for a closed channel; otherwise it is a defect that must be seen.
            if self.is_closed:
                raise self._ended() from None
            raise

    def check(self, timeout_s: float) -> StepwellError | None:
        """Checks whether the server accepts calls. Returns why not, or None if it does."""
        check: Any = self._channel.unary_unary(_HEALTH)
        try:
            return _unwell(check(b"", timeout=timeout_s, metadata=self._metadata or None))
        except grpc.RpcError as error:
            return _unwell_by(error)
        except ValueError:  # the channel was closed meanwhile
            return closed()

    def close(self) -> None:
        """Ends the channel and the calls on it."""
        self.is_closed = True
        self._channel.close()


class AsyncTransport(_Transport):
    """A channel of the async client."""

    def __init__(
        self, config: ClientConfig, known: Tokens | None = None, endpoint: Endpoint | None = None
    ) -> None:
        self._channel = open_async_channel(config, endpoint)
        super().__init__(self._channel, config, known)

    async def stream(self, requests: AsyncIterator[bytes]) -> OpenedStream:
        """Opens the stream of frames.

        Raises:
            UnauthenticatedError: There is no token.
        """
        metadata = await self._tokens.metadata_async()
        self._check_open()
        return OpenedStream(self._methods["StepStream"](requests, metadata=metadata), self._tokens, metadata)

    async def invoke(self, call: Call) -> Any:
        """One attempt of a call."""
        self._check_open()
        metadata = await self._tokens.metadata_async()
        try:
            request = call.request if isinstance(call.request, _ONE) else _awaited(call.request())
            answer = self._methods[call.rpc](request, timeout=call.timeout_s, metadata=_with(metadata, call))
            return await (answer if call.on_reply is None else _read_async(answer, call.on_reply))
        except grpc.RpcError as error:
            raise (
                self._ended() if self.is_closed else _refused(translate(error), self._tokens, metadata)
            ) from None
        except grpc.aio.UsageError:
            if self.is_closed:
                raise self._ended() from None
            raise
        except asyncio.CancelledError:
            # gRPC cancels the calls of a closing channel; the task itself was not asked to stop.
            task = asyncio.current_task()
            if self.is_closed and not (task and task.cancelling()):
                raise self._ended() from None
            raise

    async def check(self, timeout_s: float) -> StepwellError | None:
        """Checks whether the server accepts calls. Returns why not, or None if it does."""
        check: Any = self._channel.unary_unary(_HEALTH)
        try:
            return _unwell(await check(b"", timeout=timeout_s, metadata=self._metadata or None))
        except grpc.RpcError as error:
            return _unwell_by(error)
        except grpc.aio.UsageError:  # the channel was closed meanwhile
            return closed()

    async def close(self) -> None:
        """Ends the channel and the calls on it."""
        self.is_closed = True
        await self._channel.close()
