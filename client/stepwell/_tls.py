"""TLS of the client: its credentials, and what to make of a handshake that fails."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from stepwell import errors

if TYPE_CHECKING:
    from stepwell.config import TlsConfig

#: Where systems keep all CAs in one file, if OpenSSL's own place has none: Debian and Alpine, Fedora.
_SYSTEM_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")

# What gRPC's text of a failed connection holds, and what that means. None of it passes by itself.
_LASTING = {
    "WRONG_VERSION_NUMBER": "the server does not speak TLS, and this client does",
    "CERTIFICATE_VERIFY_FAILED": (
        "the server's certificate is not one to trust: TlsConfig.ca must hold the CA that has signed it"
    ),
    "Hostname Verification Check failed": (
        "the server's certificate is for another name than that of the address: TlsConfig.server_name says which "
        "one it must have"
    ),
    "Failed to create security handshaker": (
        "TlsConfig.ca, TlsConfig.cert or TlsConfig.key cannot be used: all must be PEM, and the key that of the "
        "certificate"
    ),
}
# A server that goes away does the same.
_PERHAPS = (
    "if the server serves TLS, it must be connected to with a TlsConfig; if it demands a certificate, with one in "
    "TlsConfig.cert and TlsConfig.key that its own CA has signed"
)
_CLOSED_AT_ONCE = ("Socket closed", "Unwrap failed", "Connection reset", "ALERT_")


class HandshakeError(errors.UnavailableError):
    """No attempt to connect would succeed before somebody changes something. Never raised to users."""


def credentials(config: TlsConfig) -> grpc.ChannelCredentials:
    """What gRPC makes connections with."""
    ca, cert, key = config.contents()
    return grpc.ssl_channel_credentials(_system_roots() if ca is None else ca, key, cert)


def _system_roots() -> bytes | None:
    """The CAs of this system; None, those that gRPC brings, if there is no such file."""
    own: str | None = ssl.get_default_verify_paths().cafile  # None if it is not there, which its type forgets
    found = [path for path in (own or "", *_SYSTEM_ROOTS) if Path(path).is_file()]
    return Path(found[0]).read_bytes() if found else None


def unavailable(message: str) -> errors.UnavailableError | None:
    """The error of a connection that could not be made, if TLS, or the lack of it, may be the reason."""
    if "failed to connect" not in message:
        return None
    for sign, meaning in _LASTING.items():
        if sign in message:
            return HandshakeError(f"{meaning}; {message}", outcome="not_applied")
    if any(sign in message for sign in _CLOSED_AT_ONCE):
        return errors.UnavailableError(f"{message} ({_PERHAPS})")
    return None
