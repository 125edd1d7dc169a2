"""TLS credentials of the client."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from stepwell.config import TlsConfig

#: Files with the CAs of Debian and Alpine, and of Fedora, for systems where OpenSSL's default does not exist.
_SYSTEM_ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


def credentials(config: TlsConfig) -> grpc.ChannelCredentials:
    """The credentials of a connection, for gRPC."""
    ca, cert, key = config.contents()
    return grpc.ssl_channel_credentials(_system_roots() if ca is None else ca, key, cert)


def _system_roots() -> bytes | None:
    """The CAs of this system; None, which means those of gRPC, if there is no such file."""
    own: str | None = ssl.get_default_verify_paths().cafile  # may be None, which its type does not tell
    found = [path for path in (own or "", *_SYSTEM_ROOTS) if Path(path).is_file()]
    return Path(found[0]).read_bytes() if found else None
