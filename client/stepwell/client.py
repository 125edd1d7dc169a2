"""The sync client."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

from stepwell._admin.calls import AdminCalls
from stepwell._admin.model_calls import ModelCalls
from stepwell._base import bearer
from stepwell._base.bearer import Token
from stepwell._base.hooks import require_sync
from stepwell._base.metadata import Metadata
from stepwell._base.tracebacks import end_here, ends_here
from stepwell._core.driver import Driver
from stepwell._core.group_core import GroupCore
from stepwell._core.handles import ClientFacts
from stepwell._state.infos import Inputs, Mask, ModelInfo, Outputs, ServerInfo, SessionInfo, SlowSession
from stepwell._state.state import State, States
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
from stepwell.group import SessionGroup
from stepwell.session import Session

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
    token: Token | None = None,
    allow_insecure_token: bool = False,
    tenant: str | None = None,
) -> Client:
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
        coalesce: Steps that several threads make at the same time leave together as one message, which is
            where throughput comes from; a step made alone is a call of its own. False: each step is a call
            of its own.
        tls: How to speak TLS; True: with the CAs of the system. None: not at all, unless the address says so.
        metadata: Pairs of key and value, or a mapping, to send with every call: headers, for a proxy on the
            way, say. Values are strings, or bytes where the key ends in "-bin".
        event_hooks: Functions to call at each event, by the name of the event, "request", "response" or
            "retry": `stepwell.events` says what they get.
        tracing: Make a span of OpenTelemetry of each operation, and send it to the server, which continues the trace.
            What becomes of spans is up to the provider that this process has set. Needs opentelemetry-api.
        token: The bearer token to send with every call, for servers that ask who calls; or a function without
            arguments that returns it. It is called for the first call, again shortly before its token expires, if
            that is a JWT, and when a server refuses its token: the call is then made once more. None: the environment
            variable STEPWELL_TOKEN, else none.
        allow_insecure_token: Send the token also over a plain connection to another machine, where anybody on the
            way can read it.
        tenant: The tenant to act in, for callers whose role is admin; "*" for all of them, where sessions are listed.
            None: the caller's own.

    Raises:
        InvalidInputError: An argument, or the variable, breaks its rule.

    Example:
        >>> with stepwell.connect(address) as client:
        ...     [model.name for model in client.models()]
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
    return Client(config, coalesce=coalesce)


@end_here
class Client(AdminCalls, ModelCalls, ClientFacts):
    """A connection to a server. Make one with `connect`, and share it.

    Every method takes `timeout_s`, the time limit of that call over all its attempts; None means the
    client's own. UNAVAILABLE and overload are retried within it (see `stepwell.errors`); a server that was never
    reached is given up after `connect_timeout_s`.

    Safe to use from many threads at once. Not fork-safe: gRPC's threads do not survive a fork, so connect
    in the child.

    Example:
        >>> with stepwell.connect(address) as client:
        ...     with client.open_session("forecast") as session:
        ...         session.step(np.ones((1, 3), np.float32)).shape
        (1, 1)
    """

    def __init__(self, config: ClientConfig, *, coalesce: bool = True) -> None:
        check_switch("coalesce", coalesce)
        require_sync(config.event_hooks)
        bearer.require_sync(config.token)
        self._config = config
        self._driver = Driver(config, coalesce=coalesce)
        self._core = self._driver.core

    def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """All models of the server, in the order of their names.

        Example:
            >>> [model.name for model in client.models()]
            ['forecast']
        """
        return self._driver.run(self._core.models(self._core.deadline(timeout_s)))

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """The server: what speaks to the network, and all models.

        Example:
            >>> client.server_info().front in ("native", "python")
            True
        """
        return self._driver.run(self._core.server_info(self._core.deadline(timeout_s)))

    def slow_sessions(self, *, limit: int = 10, timeout_s: float | None = None) -> list[SlowSession]:
        """Sessions with the slowest steps of the last minute, the slowest first.

        The server looks at the slowest session of each pass, and keeps a hundred.

        Example:
            >>> client.slow_sessions(limit=1)[1:]
            []
        """
        return self._driver.run(self._core.slow_sessions(limit, self._core.deadline(timeout_s)))

    def model(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """One model: its default version, or with `NAME@2` or `NAME:canary` another one.

        Raises:
            ModelNotFoundError: No model is served under that name, or not that version or label of it.

        Example:
            >>> [tensor.shape for tensor in client.model("forecast").inputs]
            [(3,)]
        """
        return self._driver.run(self._core.model(name, self._core.deadline(timeout_s)))

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
    ) -> Session:
        """Opens a session, or resumes the live session of that id: `Session.resumed` says which.

        If the call ends without an answer, the session may be there all the same. One without an id, which
        nobody could find again, is then closed in the background as soon as the server can be reached, as
        long as the client is open. The same holds for `open_sessions` and `Session.fork`.

        Args:
            model: Name of the model, for its default version; `NAME@2` for that version, `NAME:canary` for the one that
                has that label. By its name alone a session may go on to later versions: see `load_model`.
            batch_size: Rows of the session, fixed from now on.
            session_id: 1 to 256 printable characters. None: the server makes an unguessable one, and the
                session is closed when its `with` block ends. A named session outlives its block.
            state: Initial state, each tensor (batch_size, ...); a mapping of name to array, a list in the
                model's order, or a `State`. None: the model's own. Not used when a session is resumed.
            must_be_new: Refuse instead of resuming.
            max_idle_s: The session expires when it was not used for this many seconds: 1 to ten years, or 0 for no limit of
                its own. The server's `max_session_idle_s` is an upper bound all the same. None: a session without an id
                has the server's `unnamed_session_idle_s`, an hour by default; one with an id has no limit of its own.
                Not used when a session is resumed.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            ModelNotFoundError: No model is served under that name, or not that version of it.
            ModelMismatchError: The state, or the session resumed, belongs to another model.
            SessionExistsError: The session is there and must be new, or has another batch size.

        Example:
            >>> session = client.open_session("forecast", session_id="user-42")
            >>> session.id, session.batch_size
            ('user-42', 1)
            >>> session.close()
        """
        deadline = self._core.deadline(timeout_s)
        tracker = self._driver.run(
            self._core.open_session(model, batch_size, session_id, state, must_be_new, max_idle_s, deadline)
        )
        return Session(self._driver, tracker, owned=session_id is None)

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
    ) -> SessionGroup:
        """Opens many sessions of one model, to be stepped together: all of them or none.

        Args:
            model: Name of the model, with a version or a label as in `open_session`.
            n: How many, 1 to 65536.
            batch_size: Rows of each.
            session_ids: n ids, none of them in use unless `resume` is given. None: the server makes them, and the
                sessions are closed when the group's `with` block ends.
            resume: Take up the sessions of `session_ids` that are live, with their states, revisions and positions, and
                open the others: `SessionGroup.resumed` says which. For trainers that restart. The same call again
                succeeds and changes nothing.
            max_idle_s: Of each session that is opened, as in `open_session`.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Raises:
            ModelNotFoundError: No model is served under that name, or not that version of it.
            SessionExistsError: One of the ids is in use; with `resume`: by a session of another model or batch size, or of
                another version if `model` names one. The message names those sessions, and nothing is opened.
            SessionLostError: The store lost one of them; it does not begin anew unnoticed.

        Example:
            >>> with client.open_sessions("forecast", 8) as group:
            ...     group.step(np.ones((8, 3), np.float32)).shape
            (8, 1)
            >>> first = client.open_sessions("forecast", 2, session_ids=["env-0", "env-1"])
            >>> again = client.open_sessions(
            ...     "forecast", 3, session_ids=["env-0", "env-1", "env-2"], resume=True
            ... )
            >>> again.resumed.tolist()
            [True, True, False]
            >>> again.close()
        """
        deadline = self._core.deadline(timeout_s)
        tracker = self._driver.run(
            self._core.open_sessions(
                model, n, batch_size, session_ids, deadline, resume=resume, max_idle_s=max_idle_s
            )
        )
        return SessionGroup(self._driver, GroupCore(self._core, tracker), owned=session_ids is None)

    def predict(
        self,
        model: str,
        x: Inputs,
        state: States | None = None,
        *,
        reset: Mask | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Outputs, State]:
        """Runs a model without a session: the same weights and the same bits.

        Args:
            model: Name of the model, with a version or a label as in `open_session`.
            x: (batch, features...) or (batch, T, features...), any batch size; by name for several inputs.
            state: Initial state, each tensor (batch, ...). None: the model's own.
            reset: Rows that begin anew, with the model's own initial state: booleans of shape (batch,), or
                (batch, T) for every time step.
            timeout_s: Time limit of this call over all its attempts; None: the client's.

        Returns:
            The outputs, in the model's own shape, and the state after the last time step.

        Raises:
            InvalidInputError: An input or a state breaks a rule.
            ModelMismatchError: The state belongs to another model.

        Example:
            >>> y, state = client.predict("forecast", np.ones((5, 3), np.float32))
            >>> y.shape, state.batch_size
            ((5, 1), 5)
        """
        return self._driver.run(self._core.predict(model, x, state, self._core.deadline(timeout_s), reset))

    def session_info(self, session_id: str, *, timeout_s: float | None = None) -> SessionInfo:
        """One session as of its last completed change. Does not count as use of it.

        Raises:
            SessionNotFoundError, SessionExpiredError, SessionLostError: It is not there, and why.

        Example:
            >>> client.session_info(session.id).model
            'forecast'
        """
        return self._driver.run(self._core.session_info(session_id, self._core.deadline(timeout_s)))

    def close_session(self, session_id: str, *, timeout_s: float | None = None) -> None:
        """Deletes a session and its state.

        Raises:
            SessionNotFoundError, SessionExpiredError, SessionLostError: It is not there, and why.

        Example:
            >>> client.close_session(client.open_session("forecast").id)
        """
        self._driver.run(self._core.close_session(session_id, self._core.deadline(timeout_s)))

    def close(self) -> None:
        """Ends the connection; calls under way end with `ClosedError`. Sessions stay on the server.

        Example:
            >>> stepwell.connect(address).close()
        """
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
