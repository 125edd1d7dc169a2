"""The certificate files for TLS: reads and checks them, and reloads them when they change."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from stepwell_server.errors import StartError
from stepwell_server.files.private_files import NotPrivateError, require_secret
from stepwell_server.files.stamp import Stamp, stamp
from stepwell_server.logs import Log

_log = Log("rpc.tls")
_LOOK_S = 0.5
#: OpenSSL's errors for a certificate and a key that do not belong together.
_NOT_ITS_KEY = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}
_BEGIN_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"

Option = Literal["--tls-cert", "--tls-key", "--tls-client-ca"]


class Unusable(Exception):
    """A front does not support a valid certificate or key."""

    def __init__(self, option: Option, reason: str) -> None:
        super().__init__(option, reason)
        self.option: Option = option
        self.reason = reason


@dataclasses.dataclass(frozen=True, slots=True)
class Certificates:
    """The server's certificates and key, and the CAs of its clients, in PEM."""

    chain: bytes
    """The server's own certificate comes first."""
    key: bytes = dataclasses.field(repr=False)
    client_ca: bytes | None
    """CAs that sign client certificates; None: clients need no certificate."""

    def ends(self) -> dict[str, float]:
        """Return the earliest expiry in each file, in seconds since the epoch, by the name of its option."""
        from cryptography import x509

        files = {"tls-cert": self.chain, "tls-client-ca": self.client_ca}
        return {
            option: min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(pem)).timestamp()
            for option, pem in files.items()
            if pem is not None
        }


class CertificateFiles:
    """The files of `--tls-cert`, `--tls-key` and `--tls-client-ca`. For one thread at a time.

    Raises:
        StartError: a file cannot be used.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self.asked = asyncio.Event()
        """Set it on the event loop to have the files read at once."""
        self._used = self._seen = self._stamp()
        self.at_start = self._checked()
        self.used = self.at_start
        """The certificates for new connections."""
        self.failures = 0
        """How often changed files could not be used."""

    @property
    def are_mutual(self) -> bool:
        """Whether clients need a certificate."""
        return self._client_ca is not None

    def refused(self, problem: Unusable) -> StartError:
        """Return the error for files that a front does not support."""
        files = {"--tls-cert": self._certificate, "--tls-key": self._key, "--tls-client-ca": self._client_ca}
        return StartError(
            f"{problem.option}: must be supported by this server; {files[problem.option]}: {problem.reason}"
        )

    def changed(self) -> Certificates | None:
        """Return the new certificates if the files have changed, once two looks have found the same; else None.

        Raises:
            StartError: the changed files cannot be used. Raised once for each change.
        """
        stamp, seen = self._stamp(), self._seen
        self._seen = stamp
        if stamp == self._used or stamp != seen:
            return None
        found: Certificates | StartError
        try:
            found = self._checked()
        except StartError as error:
            found = error
        if self._stamp() != stamp:
            return None  # the files may have changed between the check and the read
        self._used = stamp
        if isinstance(found, StartError):
            raise found
        return found

    def reread(self) -> Certificates:
        """Read the files now, because the operator says that they are complete.

        Raises:
            StartError: the files cannot be used.
        """
        self._used = self._seen = self._stamp()
        return self._checked()

    def _stamp(self) -> tuple[Stamp, ...]:
        """Return a stamp that changes with the files' contents."""
        return tuple(stamp(path) for path in (self._certificate, self._key, self._client_ca) if path)

    def _checked(self) -> Certificates:
        chain = _read("--tls-cert", self._certificate)
        try:
            require_secret(self._key, may_be_read=True)
        except NotPrivateError as error:
            raise StartError(f"--tls-key: {error}") from error
        key = _read("--tls-key", self._key)
        client_ca = None if self._client_ca is None else _read("--tls-client-ca", self._client_ca)
        _check_certificates("--tls-cert", self._certificate, chain)
        if client_ca is not None and self._client_ca is not None:
            _check_certificates("--tls-client-ca", self._client_ca, client_ca)
        self._check_pair()
        return Certificates(chain, key, client_ca)

    def _check_pair(self) -> None:
        asked = False

        def password() -> str:
            nonlocal asked
            asked = True
            return ""

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key, password)
        except ssl.SSLError as error:
            if error.reason in _NOT_ITS_KEY:
                raise StartError(
                    f"--tls-key: must be the key of the first certificate in {self._certificate}, which is the server's own; "
                    f"the key in {self._key} belongs to another certificate"
                ) from error
            problem = "is encrypted" if asked else f"is not such a key ({error.reason or 'no PEM'})"
            raise StartError(
                f"--tls-key: must be a private key in PEM that is not encrypted; {self._key} {problem}"
            ) from error
        except OSError as error:  # the file has just disappeared
            raise StartError(f"--tls-cert, --tls-key: {error.strerror}") from error


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{option}: must be a readable file; {path}: {error.strerror}") from error


def _check_certificates(option: str, path: Path, pem: bytes) -> None:
    rule = f"{option}: must contain certificates in PEM; {path}"
    if _BEGIN_CERTIFICATE not in pem:
        raise StartError(f"{rule} contains none")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "ignore"))
    except ssl.SSLError as error:
        raise StartError(
            f"{rule} contains an unreadable one ({error.reason or 'it is cut off or not PEM'})"
        ) from error


async def follow(files: CertificateFiles, use: Callable[[Certificates], None]) -> None:
    """Use changed certificates for new connections, until cancelled. Unusable files are logged once and change nothing.

    The files are checked regularly, and read when `asked` is set. `use` raises `Unusable` for unsupported certificates.
    """
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(files.asked.wait(), _LOOK_S)
        read = files.reread if files.asked.is_set() else files.changed
        files.asked.clear()
        try:
            found = await asyncio.to_thread(read)
            if found is None:
                continue
            use(found)
            files.used = found
        except (StartError, Unusable) as error:
            files.failures += 1
            known = files.refused(error) if isinstance(error, Unusable) else error
            _log.warning("the changed certificates cannot be used, the old ones stay", reason=str(known))
        except Exception as error:
            _log.defect("the certificates could not be checked", error)
        else:
            _log.info("new connections get the changed certificates")
