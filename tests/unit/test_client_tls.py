"""What the SDK is told of TLS, and what it says of connections that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

import stepwell
from stepwell import config
from stepwell._transport import status
from stepwell._transport.connecting import Contact
from stepwell._transport.retry import Attempts, Deadline, RetryPolicy
from stepwell.cli.toolkit import target
from support.certificates import Authority


def test_arguments_that_break_a_rule(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    good, secret = authority.issue(), authority.issue(password=b"secret")
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"ca": "nowhere.pem"}, "TlsConfig.ca must be a file that can be read; 'nowhere.pem': No such file"),
        ({"ca": b"junk"}, "TlsConfig.ca must hold certificates in PEM; got 4 bytes"),
        ({"ca": 5}, "TlsConfig.ca must be a path, or PEM as bytes; got 5"),
        ({"ca": good.key}, f"TlsConfig.ca must hold certificates in PEM; got {good.key}"),
        ({"cert": good.cert}, "TlsConfig.key must be given with TlsConfig.cert; got None"),
        ({"key": good.key}, "TlsConfig.cert must be given with TlsConfig.key; got None"),
        (
            {"cert": good.cert, "key": good.cert},
            f"TlsConfig.key must hold a private key in PEM that is not encrypted; got {good.cert}",
        ),
        ({"cert": secret.cert, "key": secret.key}, f"that is not encrypted; got {secret.key}"),
        ({"server_name": ""}, "TlsConfig.server_name must be a host's name; got ''"),
        ({"server_name": b"x"}, "TlsConfig.server_name must be a host's name; got b'x'"),
    ]
    for arguments, message in refusals:
        with pytest.raises(stepwell.InvalidInputError) as refused:
            stepwell.TlsConfig(**arguments)
        assert message in str(refused.value)
    tls: Any = "yes"
    with pytest.raises(stepwell.InvalidInputError, match="tls must be a TlsConfig, True or None; got 'yes'"):
        stepwell.connect("h:1", tls=tls)


def test_files_are_read_once_and_keys_are_not_shown(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue()
    told = config.ClientConfig("h:1", tls=stepwell.TlsConfig(authority.cert, str(pair.cert), pair.key))
    contents = tuple(path.read_bytes() for path in (authority.cert, *pair))
    for path in (authority.cert, *pair):
        path.unlink()
    assert told.tls is not None
    assert told.tls.contents() == contents
    assert "PRIVATE" not in repr(told)
    assert config.tls_config(True) == stepwell.TlsConfig()
    assert config.tls_config(False) is None


#: What gRPC 1.85 says of a connection, what is made of it, and whether it is tried again.
FAILURES = {
    "Tls handshake failed: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: expired": (
        "--tls-ca must contain the CA that signed it",
        False,
    ),
    "Custom verification check failed with error: UNAUTHENTICATED: Hostname Verification Check failed.": (
        "set --tls-server-name to a name in the certificate",
        False,
    ),
    "error:100000f7:SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER": ("client uses TLS", False),
    "Failed to create security handshaker.": ("--tls-ca, --tls-cert or --tls-key cannot be used", False),
    "Socket closed": ("pass --tls or another TLS option", True),
    "Unwrap failed (TSI_DATA_CORRUPTED)": ("set --tls-cert and --tls-key to one", True),
    "Connection refused": ("Connection refused", True),
}


@pytest.mark.parametrize("text", FAILURES)
def test_what_a_failed_connection_means_is_said_and_what_lasts_is_not_tried_again(text: str) -> None:
    meaning, is_tried_again = FAILURES[text]
    said = f"failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: {text}"
    error = status.from_rpc(grpc.StatusCode.UNAVAILABLE, said, ())
    contact = Contact("h:1", 0.0 if is_tried_again else 1000.0)
    with pytest.raises(stepwell.UnavailableError, match="attempts: 1") as final:
        Attempts("Step", RetryPolicy(), Deadline(1000.0), contact, changes=True).failed(error)
    assert meaning in target.as_options(final.value.message)
    assert text in final.value.message
    assert "h:1" in final.value.message
    assert type(final.value) is stepwell.UnavailableError
    assert final.value.outcome == "not_applied"
    contact.make()
    attempts = Attempts("Step", RetryPolicy(), Deadline(1000.0), contact, changes=True)
    if is_tried_again:
        assert attempts.failed(error) >= 0
    else:
        with pytest.raises(stepwell.UnavailableError, match="attempts: 1"):
            attempts.failed(error)
