"""The tests' own certificates: an authority and the certificates that it signs. Only their makers trust them.

They have what RFC 5280 asks of them: Python verifies that since 3.13.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import itertools
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = dt.timedelta(days=1)
_numbers = itertools.count()
_SIGNS = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=True,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)
HERE = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


class Pair(NamedTuple):
    """A certificate and its key: two files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates, and writes them into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"authority {next(_numbers)}")
        builder = self._builder(self._name, self._key.public_key())
        for extension in (x509.BasicConstraints(ca=True, path_length=None), _SIGNS):
            builder = builder.add_extension(extension, critical=True)
        self._own = builder.sign(self._key, hashes.SHA256())
        self.cert = self._write("pem", self._own.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str = "server",
        alternatives: tuple[x509.GeneralName, ...] = HERE,
        curve: type[ec.EllipticCurve] = ec.SECP256R1,
        password: bytes | None = None,
    ) -> Pair:
        """A certificate of a common name, with alternatives if there are any."""
        key = ec.generate_private_key(curve())
        builder = self._builder(_name(name), key.public_key())
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        pem = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        secrecy: serialization.KeySerializationEncryption = (
            serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        )
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secrecy)
        return Pair(self._write("pem", pem), self._write("key", private))

    def _builder(self, name: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder(
            issuer_name=self._name,
            subject_name=name,
            public_key=key,
            serial_number=x509.random_serial_number(),
            not_valid_before=now - _DAY,
            not_valid_after=now + _DAY,
        )
        own = x509.SubjectKeyIdentifier.from_public_key(key)
        signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return builder.add_extension(own, critical=False).add_extension(signed_by, critical=False)

    def _write(self, kind: str, contents: bytes) -> Path:
        path = self._folder / f"{next(_numbers)}.{kind}"
        path.write_bytes(contents)
        return path


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
