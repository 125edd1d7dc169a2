"""The sync client."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from stepwell._watch.core import ServerWatch, SessionWatch
from stepwell._watch.events import ServerActivity, SessionEvent
from stepwell._watch.watch import Watch
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
    """Returns a client of the server at `address`. The first call makes the connection.

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
        coalesce: Send the steps that several threads make at the same time as one message, which gives the highest
            throughput. A step made alone is still a call of its own. False: every step is a call of its own.
        tls: A `TlsConfig`, or True for TLS with the CAs of the system. None: no TLS, unless the address asks for it.
        metadata: Headers to send with every call: a mapping, or pairs, of key and value. Values are strings, or
            bytes if the key ends in "-bin".
        event_hooks: Functions to call at each event, by the name of the event: "request", "response", "retry",
            "model_version" or "replica". `stepwell.events` describes them and their arguments.
        tracing: Create an OpenTelemetry span for each operation and let the server continue its trace. The tracer
            provider of this process decides where spans go. Needs opentelemetry-api.
        token: The bearer token to send with every call, or a function without arguments that returns it. The
            function is called before the first call, shortly before its token expires if that is a JWT, and when the
            server rejects its token; that call is then made once more. None: the environment variable
            STEPWELL_TOKEN, or no token if it is not set.
        allow_insecure_token: Send the token to another machine even without TLS, where anybody on the network path
            can read it.
        tenant: The tenant to act in, for admins; "*" lists the sessions of all tenants. None: the caller's own.

    Raises:
        InvalidInputError: An argument or environment variable breaks a rule; the message names it.

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
    """A connection to a server. Create one with `connect`, and share it.

    Every method takes `timeout_s`, the time limit of the call over all its attempts, in seconds. None means the
    client's default. Within it, the client retries calls that fail because the server is unavailable or overloaded;
    see `stepwell.errors`. Calls to a server that this client has never reached fail after `connect_timeout_s`.

    Safe to use from many threads at once. Not fork-safe, because gRPC's threads do not survive a fork: connect in
    the child process.

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
        """Returns all models of the server, sorted by name.

        Example:
            >>> [model.name for model in client.models()]
            ['forecast']
        """
        return self._driver.run(self._core.models(self._core.deadline(timeout_s)))

    def server_info(self, *, timeout_s: float | None = None) -> ServerInfo:
        """Describes the server: its id, its network front and all its models.

        Example:
            >>> client.server_info().front in ("native", "python")
            True
        """
        return self._driver.run(self._core.server_info(self._core.deadline(timeout_s)))

    def slow_sessions(self, *, limit: int = 10, timeout_s: float | None = None) -> list[SlowSession]:
        """Returns the sessions with the slowest steps of the last minute, slowest first.

        The server records the slowest session of each pass and keeps the last 100.

        Args:
            limit: How many sessions to return at most.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Example:
            >>> client.slow_sessions(limit=1)[1:]
            []
        """
        return self._driver.run(self._core.slow_sessions(limit, self._core.deadline(timeout_s)))

    def model(self, name: str, *, timeout_s: float | None = None) -> ModelInfo:
        """Describes one model.

        Args:
            name: Name of the model, for its default version; `NAME@2` for version 2, `NAME:canary` for a label.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            ModelNotFoundError: The server has no model of that name, or the model has no such version or label.

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
        """Opens a session, or resumes the live session with that id. `Session.resumed` shows which.

        If the call fails without an answer, the server may have opened the session. If you gave no id, nobody can
        find that session again, so the client closes it in the background as soon as it reaches the server. The same
        holds for `open_sessions` and `Session.fork`.

        Args:
            model: Name of the model, for its default version; `NAME@2` for version 2, `NAME:canary` for a label. A
                session opened by the name alone may move to later versions: see `load_model`.
            batch_size: Number of rows of the session. It cannot change later.
            session_id: 1 to 256 printable characters. A named session outlives its `with` block. None: the server
                creates an unguessable id, and the end of the `with` block closes the session.
            state: Initial state, with tensors of shape (batch_size, ...): a mapping of name to array, a list in the
                model's order, or a `State`. None: the model's initial state. Ignored for a resumed session.
            must_be_new: Raise `SessionExistsError` instead of resuming a session.
            max_idle_s: Expire the session after this many seconds without use, from 1 second to ten years; 0 for no
                limit of its own. The server's `max_session_idle_s` still applies. None: the server's
                `unnamed_session_idle_s` (one hour by default) for a session without an id, and no limit of its own
                for a named one. Ignored for a resumed session.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            ModelNotFoundError: The server has no model of that name, or the model has no such version or label.
            ModelMismatchError: The state, or the resumed session, belongs to another model.
            SessionExistsError: The session exists although it must be new, or it has another batch size.

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
        """Opens many sessions of one model to step together. The call opens all of them or none.

        Args:
            model: Name of the model, with a version or label as in `open_session`.
            n: Number of sessions, 1 to 65536.
            batch_size: Number of rows of each session.
            session_ids: n ids. Without `resume`, none of them may be in use. None: the server creates the ids, and
                the end of the group's `with` block closes the sessions.
            resume: Resume the live sessions among `session_ids`, with their states, revisions and positions, and open
                the others. `SessionGroup.resumed` shows which. A trainer that restarts can repeat the same call
                safely.
            max_idle_s: Idle limit of each newly opened session, in seconds, as in `open_session`.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

        Raises:
            ModelNotFoundError: The server has no model of that name, or the model has no such version or label.
            SessionExistsError: An id is in use. With `resume`: by a session of another model or batch size, or of
                another version than `model` names. The message names those sessions.
            SessionLostError: The store has lost one of the sessions. It never restarts silently from the initial
                state.

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
    ) -> Watch[SessionEvent]:
        """Watches sessions: reports their changes, whoever makes them, once the server has stored them.

        The first event of each session is the session as it is. A watch never delays a session, and does not count as
        use for its idle limit. A session that has ended, or never existed, has a last event of the kind "ended".

        Args:
            session_ids: Their ids.
            inputs: Whether events have the inputs of the last time step.
            outputs: Whether events have the outputs of the last time step.
            states: Whether events have the state after the change.
            state_names: State tensors to report, with `states=True`; None: all.
            every: Report a change when the session has made this many since its last event.
            interval_s: Report a change when this time has passed since the session's last event, 0.01 to 3600
                seconds. When the session rests, its last state follows. None: by `every`.

        Raises:
            InvalidInputError: An argument breaks a rule; the message names it.

        Example:
            >>> with client.watch_sessions([session.id], states=True) as watch:
            ...     first = next(watch)
            ...     y = session.step(np.ones((1, 3), np.float32))
            ...     next(watch).revision
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
        return Watch(self._driver, core)

    def watch_server(self, *, interval_s: float = 1.0) -> Watch[ServerActivity]:
        """Watches the server: reports its rates, latencies, models and sessions, as `stepwell top` shows them.

        A client of several replicas watches one of them.

        Args:
            interval_s: Time between two reports, 0.2 to 3600 seconds.

        Example:
            >>> with client.watch_server() as watch:
            ...     next(watch).is_ready
            True
        """
        return Watch(self._driver, ServerWatch(self._core, interval_s))

    def predict(
        self,
        model: str,
        x: Inputs,
        state: States | None = None,
        *,
        reset: Mask | None = None,
        timeout_s: float | None = None,
    ) -> tuple[Outputs, State]:
        """Runs a model without a session. Its outputs have the same bits as those of a session.

        Args:
            model: Name of the model, with a version or label as in `open_session`.
            x: Array of shape (batch, features...) or (batch, T, features...), for any batch size; a mapping of name
                to array for several inputs.
            state: Initial state, with tensors of shape (batch, ...). None: the model's initial state.
            reset: Rows that restart from the model's initial state: booleans of shape (batch,), or (batch, T) for
                every time step.
            timeout_s: Time limit of this call over all its attempts, in seconds; None: the client's.

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
        """Describes a session as of its last completed change. This does not count as use of the session.

        Raises:
            SessionGoneError: There is no such session; the subclass tells why.

        Example:
            >>> client.session_info(session.id).model
            'forecast'
        """
        return self._driver.run(self._core.session_info(session_id, self._core.deadline(timeout_s)))

    def close_session(self, session_id: str, *, timeout_s: float | None = None) -> None:
        """Deletes a session and its state.

        Raises:
            SessionGoneError: There is no such session; the subclass tells why.

        Example:
            >>> client.close_session(client.open_session("forecast").id)
        """
        self._driver.run(self._core.close_session(session_id, self._core.deadline(timeout_s)))

    def close(self) -> None:
        """Closes the connection. Active calls raise `ClosedError`. Sessions stay on the server.

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
