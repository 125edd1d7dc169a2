"""The first contact with a server, and the meaning of failed connections. No I/O."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from stepwell import errors
from stepwell._base.log import LOG

_RUNS = "is `stepwell serve` running there?"
# gRPC's text if no connection was made, so that nothing was sent, and the reason.
_FAILED = re.compile(
    r"failed to connect to all addresses(?:; last error: (?:[A-Z_]+: )?(?P<why>.*))?", re.DOTALL
)
# The address of the attempt, which precedes the reason.
_WHERE = re.compile(
    r"(?:(?:ipv4|ipv6|unix):\S+: )?(?:Failed to connect to remote host: |connect failed: addr: \S+ error: )?"
)
_UNRESOLVED = re.compile(r"errors resolving|DNS resolution failed|address lookup failed")
_NO_SUCH_NAME = (
    "Domain name not found",
    "answer with no data",
    "Name or service not known",
    "nodename nor servname",
)
# gRPC's texts for a peer that does not speak HTTP/2.
_NOT_HTTP2 = ("Failed parsing HTTP/2", "http1.x server")

# A peer that accepts connections but does not answer may be a server on a busy machine.
_SILENT = "before receiving SETTINGS frame"
_PATIENCE = 10

# Parts of gRPC's text of a failed handshake, and their meaning. No retry fixes these.
_LASTING = {
    "WRONG_VERSION_NUMBER": "the client uses TLS, but the server does not",
    "CERTIFICATE_VERIFY_FAILED": (
        "the server's certificate is not trusted: TlsConfig.ca must contain the CA that signed it"
    ),
    "Hostname Verification Check failed": (
        "the server's certificate is for another name than the address: set TlsConfig.server_name to a name "
        "in the certificate"
    ),
    "Failed to create security handshaker": (
        "TlsConfig.ca, TlsConfig.cert or TlsConfig.key cannot be used: all must be PEM, and the key must belong to the "
        "certificate"
    ),
}
# A server that stops does the same.
_PERHAPS = (
    "if the server uses TLS, pass a TlsConfig; if it requires a client certificate, set TlsConfig.cert and "
    "TlsConfig.key to one that its CA has signed"
)
_CLOSED_EARLY = ("Socket closed", "Unwrap failed", "Connection reset", "ALERT_")


class ConnectError(errors.UnavailableError):
    """No connection was made, so nothing was sent. Never raised to users."""

    patience: int
    """Factor of the time limit before the first contact; 0: do not retry."""
    hint: str
    """What the user should check."""

    def __init__(self, message: str, *, patience: int = 1, hint: str = _RUNS) -> None:
        super().__init__(message, outcome="not_applied")
        self.patience = patience
        self.hint = hint


class HandshakeError(ConnectError):
    """A failed connection that no retry can fix. Never raised to users."""

    def __init__(self, message: str) -> None:
        super().__init__(message, patience=0, hint="")


def connect_error(message: str) -> ConnectError | None:
    """The error of a failed connection; None if gRPC's text describes another problem."""
    if _UNRESOLVED.search(message):
        what = f"its name cannot be resolved: {message.rpartition(': ')[2].rstrip(']')}"
        if any(sign in message for sign in _NO_SUCH_NAME):
            return ConnectError(what, patience=0, hint="is the name right?")
        return ConnectError(what)
    failed = _FAILED.search(message)
    if failed is None:
        return None
    for sign, meaning in _LASTING.items():
        if sign in message:
            return HandshakeError(f"{meaning}; {message}")
    why = _WHERE.sub("", failed["why"] or message, count=1)
    if any(sign in message for sign in _NOT_HTTP2):
        what = f"the service there does not speak HTTP/2, so it is not a Stepwell server: {why}"
        return ConnectError(
            what, patience=0, hint="is it the port of a web server, or of the server's metrics?"
        )
    if _SILENT in message:
        return ConnectError(f"something listens there but does not answer: {why}", patience=_PATIENCE)
    if any(sign in message for sign in _CLOSED_EARLY):
        return ConnectError(why, hint=f"{_RUNS} ({_PERHAPS})")
    return ConnectError(why)


class Contact:
    """Whether a client has ever reached its server. Until it has, calls have a shorter time limit.

    All calls of a client share one object, from many threads.
    """

    __slots__ = ("_reasons", "address", "limit_s", "made")

    def __init__(
        self,
        address: str,
        limit_s: float,
        *,
        made: bool = False,
        reasons: Callable[[], str] | None = None,
    ) -> None:
        """The contact of a client.

        Args:
            address: Address of the server.
            limit_s: How long a call tries before the first contact, in seconds.
            made: Whether there has been contact.
            reasons: For several replicas: why they cannot be reached; empty unless that is known for several.
        """
        self._reasons = reasons
        self.address = address
        self.limit_s = limit_s
        self.made = made

    def make(self) -> None:
        """Records that the server, or a proxy in front of it, has answered."""
        if not self.made:
            self.made = True
            LOG.info("connected to %s", self.address)

    def learn(self, error: errors.StepwellError) -> None:
        """Records the error of an attempt, which may show that there was contact."""
        by_peer = isinstance(error, errors.UnavailableError) and not isinstance(error, ConnectError)
        if error.reason or by_peer:
            self.make()

    def patience_s(self, error: errors.StepwellError) -> float:
        """How long a call may try after this error, counted from its start, in seconds."""
        if self.made or not isinstance(error, ConnectError):
            return math.inf
        return self.limit_s * error.patience if error.patience else 0.0

    def explain(self, error: errors.StepwellError, limit_s: float) -> str:
        """The message of the error that ends a call with that time limit."""
        if isinstance(error, ConnectError):
            return self._unreached(error, limit_s)
        if not self.made and isinstance(error, errors.DeadlineExceededError):
            return f"no answer at {self.address} within {limit_s:g} s (timeout_s): {error.message}; {_RUNS}"
        return error.message

    def _unreached(self, error: ConnectError, limit_s: float) -> str:
        hint = f"; {error.hint}" if error.hint else ""
        message = (self._reasons and self._reasons()) or error.message
        if self.made or isinstance(error, HandshakeError):
            return f"the server at {self.address} cannot be reached: {message}{hint}"
        within = ""
        if error.patience:
            limits = [(limit_s, "timeout_s"), (self.patience_s(error), "connect_timeout_s")]
            within = " within {:g} s ({})".format(*min(limits))
            if error.patience > 1:
                within = within.replace("connect_timeout_s", f"{error.patience} times connect_timeout_s")
        return f"no server was reached at {self.address}{within}: {message}{hint}"


ALREADY_MADE = Contact("", 0.0, made=True)
