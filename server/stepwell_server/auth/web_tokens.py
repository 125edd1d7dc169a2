"""JWTs: who signs them is trusted, as a file of public keys (a JWKS) says. The cryptography is PyJWT's and cryptography's."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from stepwell_server.clock import Clock
from stepwell_server.core.callers import (
    MAX_SUBJECT_LENGTH,
    Caller,
    Credential,
    KnownCaller,
    Role,
    is_name,
    is_subject,
)
from stepwell_server.errors import Unauthenticated
from stepwell_server.files.watched import WatchedFile

LEEWAY_S = 10.0
"""By how much the clocks of the issuer and of this machine may differ."""
#: What a key may have signed with, by its type and curve. Never a shared secret: whoever reads the file could sign.
_ALGORITHMS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("RSA", ""): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
_MIN_RSA_BITS = 2048
_PRIVATE = {"d", "k", "p", "q"}
_MAX_KNOWN = 4096
"""Tokens of which it is remembered that they are in order."""
_ROLES = (Role.ADMIN, Role.USER, Role.VIEWER)


@dataclasses.dataclass(frozen=True, slots=True)
class Claims:
    """What a token must say, and where."""

    audience: str
    issuer: str
    tenant: str = "tenant"
    """The claim that names the tenant."""
    role: str = "role"
    """The claim that names the role, or has it in a list."""


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A key that is trusted."""

    public: Any
    algorithms: tuple[str, ...]
    thumbprint: str
    """Another one for another key, or one that may be used otherwise."""


class WebTokens:
    """Finds callers by their JWTs. Lives on the event loop.

    Raises:
        StartError: the file cannot be used.
    """

    def __init__(self, path: Path, claims: Claims, clock: Clock) -> None:
        self.file = WatchedFile("--auth-jwks", path, parse)
        self._claims = claims
        self._clock = clock
        self._known: collections.OrderedDict[bytes, KnownCaller] = collections.OrderedDict()

    def holds(self, known: KnownCaller) -> bool:
        """Whether the key that has signed it is still trusted."""
        return any(key.thumbprint == known.signer for key in self.file.value.values())

    def identify(self, token: str, digest: bytes) -> KnownCaller:
        """Whose token it is.

        Raises:
            Unauthenticated: nobody's, and why.
        """
        known = self._known.get(digest)
        if known is not None and self._clock.monotonic() < known.until and self.holds(known):
            return known
        try:
            known = self._verified(token, digest)
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the JWT has expired; send a new one") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Unauthenticated(f"the JWT must be one that this server takes: {_reason(error)}") from None
        while len(self._known) >= _MAX_KNOWN:
            self._known.popitem(last=False)
        self._known[digest] = known
        return known

    def _verified(self, token: str, digest: bytes) -> KnownCaller:
        key = self._key_of(jwt.get_unverified_header(token))
        claims = self._claims
        said = jwt.decode(
            token,
            key.public,
            algorithms=list(key.algorithms),
            audience=claims.audience,
            issuer=claims.issuer,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        left = float(said["exp"]) + LEEWAY_S - self._clock.now()
        until = self._clock.monotonic() + left
        return KnownCaller(self._caller_of(said), Credential("token", digest), until, key.thumbprint)

    def _key_of(self, header: Mapping[str, Any]) -> Key:
        keys, kid = self.file.value, header.get("kid")
        if kid is None and len(keys) == 1:
            return next(iter(keys.values()))
        if not isinstance(kid, str) or kid not in keys:
            raise _Refused("its key (kid) is not trusted")
        return keys[kid]

    def _caller_of(self, said: Mapping[str, Any]) -> Caller:
        names = self._claims
        name, tenant, role = (said.get(claim) for claim in ("sub", names.tenant, names.role))
        if not isinstance(name, str) or not is_subject(name):
            raise _Refused(
                f"the claim sub must be 1 to {MAX_SUBJECT_LENGTH} printable characters without spaces"
            )
        if not isinstance(tenant, str) or not is_name(tenant):
            raise _Refused(
                f"the claim {names.tenant} must name the tenant, in letters, digits and '._@-', at most 64"
            )
        said_roles = role if isinstance(role, list) else [role]
        found = next((role for role in _ROLES if role.value in said_roles), None)
        if found is None:
            raise _Refused(f"the claim {names.role} must be or hold one of user, viewer, admin")
        return Caller(name, tenant, found)


class _Refused(ValueError):
    """Why a token is not taken, in our words."""


def _reason(error: Exception) -> str:
    """Why a token is not taken: never what it holds."""
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (jwt.InvalidAudienceError, "its audience (aud) is another server's"),
        (jwt.InvalidIssuerError, "its issuer (iss) is not trusted"),
        (jwt.ImmatureSignatureError, "it does not hold yet (nbf, iat)"),
        (jwt.InvalidSignatureError, "its signature is wrong"),
        (jwt.InvalidAlgorithmError, "its algorithm (alg) is not one of its key"),
    )
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"it has no claim {error.claim}"
    return next((reason for kind, reason in kinds if isinstance(error, kind)), "it cannot be read as one")


def parse(text: str) -> dict[str, Key]:
    """The keys of a JWKS, by their ids.

    Raises:
        ValueError: it is none, or holds what must not be in it; the message names the key and the rule.
    """
    rule = 'must be a JWKS, {"keys": [...]} in JSON'
    try:
        document = json.loads(text)
    except RecursionError:
        document = None
    except ValueError as error:
        raise ValueError(f"{rule}: {error}") from None
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        raise ValueError(rule)
    found: dict[str, Key] = {}
    other = "must have a key to check signatures with; it has none"
    for number, given in enumerate(keys, 1):
        if isinstance(given, dict) and given.get("use", "sig") != "sig":
            continue  # for encryption
        try:
            kid, key = _key(given, is_only=len(keys) == 1)
            if kid in found:
                raise ValueError(f"its kid must be its own; {kid!r} came before")
        except _OtherKind as error:  # issuers may begin to use what is not known here: RFC 7517, 5
            other = f"key {number}: {error}"
            continue
        except ValueError as error:
            raise ValueError(f"key {number}: {error}") from None
        found[kid] = key
    if not found:
        raise ValueError(other)
    return found


class _OtherKind(ValueError):
    """A key that nobody's token is checked with here."""


def _key(given: object, *, is_only: bool) -> tuple[str, Key]:
    if not isinstance(given, dict):
        raise ValueError("must be an object")
    kind, curve, alg = (given.get(name, "") for name in ("kty", "crv", "alg"))
    kid = given.get("kid", "" if is_only else None)
    if not isinstance(kid, str):
        raise ValueError("must have a kid, a string, as there are others")
    if _PRIVATE & given.keys():
        raise ValueError(
            "must be a public key, without d, p, q or k: whoever can sign must not be in this file"
        )
    allowed = _ALGORITHMS.get((kind, curve)) if isinstance(kind, str) and isinstance(curve, str) else None
    if allowed is None:
        raise _OtherKind(
            f"must be RSA, EC (P-256, P-384, P-521) or OKP (Ed25519); its kty is {kind!r}, crv {curve!r}"
        )
    if alg:
        if alg not in allowed:
            raise _OtherKind(f"its alg must be one of {', '.join(allowed)}; got {alg!r}")
        allowed = (alg,)
    try:
        public = jwt.PyJWK(given, allowed[0]).key
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise ValueError(f"must be a whole key: {type(error).__name__}") from None
    if isinstance(public, RSAPublicKey) and public.key_size < _MIN_RSA_BITS:
        raise ValueError(f"must have at least {_MIN_RSA_BITS} bits; it has {public.key_size}")
    raw = json.dumps({name: given.get(name) for name in ("kty", "crv", "n", "e", "x", "y", "alg", "kid")})
    return kid, Key(public, allowed, hashlib.sha256(raw.encode()).hexdigest())
