"""Authenticates callers by JWTs, whose signing keys are in a JWKS file. Uses PyJWT and cryptography."""

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
"""Allowed difference between the clocks of the issuer and of this machine."""
#: Accepted algorithms by key type and curve. Never a shared secret: every reader of the file could sign tokens.
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
"""Number of verified tokens to remember."""
_ROLES = (Role.ADMIN, Role.USER, Role.VIEWER)


@dataclasses.dataclass(frozen=True, slots=True)
class Claims:
    """The required claims of a token."""

    audience: str
    issuer: str
    tenant: str = "tenant"
    """The claim that names the tenant."""
    role: str = "role"
    """The claim that contains the role, alone or in a list."""


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """A trusted key."""

    public: Any
    algorithms: tuple[str, ...]
    thumbprint: str
    """Identifies the key and its permitted use."""


class WebTokens:
    """Authenticates callers by their JWTs. Lives on the event loop.

    Raises:
        StartError: the file cannot be used.
    """

    def __init__(self, path: Path, claims: Claims, clock: Clock) -> None:
        self.file = WatchedFile("--auth-jwks", path, parse)
        self._claims = claims
        self._clock = clock
        self._known: collections.OrderedDict[bytes, KnownCaller] = collections.OrderedDict()

    def holds(self, known: KnownCaller) -> bool:
        """Whether the key that signed the caller's token is still trusted."""
        return any(key.thumbprint == known.signer for key in self.file.value.values())

    def identify(self, token: str, digest: bytes) -> KnownCaller:
        """Return the caller of a token.

        Raises:
            Unauthenticated: the token is not accepted. The message contains the reason.
        """
        known = self._known.get(digest)
        if known is not None and self._clock.monotonic() < known.until and self.holds(known):
            return known
        try:
            known = self._verified(token, digest)
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the JWT has expired; send a new one") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise Unauthenticated(f"the JWT must be acceptable to this server: {_reason(error)}") from None
        while len(self._known) >= _MAX_KNOWN:
            self._known.popitem(last=False)
        self._known[digest] = known
        return known

    def _verified(self, token: str, digest: bytes) -> KnownCaller:
        key = self._key_of(jwt.get_unverified_header(token))
        claims = self._claims
        claimed = jwt.decode(
            token,
            key.public,
            algorithms=list(key.algorithms),
            audience=claims.audience,
            issuer=claims.issuer,
            leeway=LEEWAY_S,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        left = float(claimed["exp"]) + LEEWAY_S - self._clock.now()
        until = self._clock.monotonic() + left
        return KnownCaller(self._caller_of(claimed), Credential("token", digest), until, key.thumbprint)

    def _key_of(self, header: Mapping[str, Any]) -> Key:
        keys, kid = self.file.value, header.get("kid")
        if kid is None and len(keys) == 1:
            return next(iter(keys.values()))
        if not isinstance(kid, str) or kid not in keys:
            raise _Refused("its key (kid) is not trusted")
        return keys[kid]

    def _caller_of(self, claimed: Mapping[str, Any]) -> Caller:
        names = self._claims
        name, tenant, role = (claimed.get(claim) for claim in ("sub", names.tenant, names.role))
        if not isinstance(name, str) or not is_subject(name):
            raise _Refused(
                f"the claim sub must be 1 to {MAX_SUBJECT_LENGTH} printable characters without spaces"
            )
        if not isinstance(tenant, str) or not is_name(tenant):
            raise _Refused(
                f"the claim {names.tenant} must name the tenant, in letters, digits and '._@-', at most 64"
            )
        roles = role if isinstance(role, list) else [role]
        found = next((role for role in _ROLES if role.value in roles), None)
        if found is None:
            raise _Refused(f"the claim {names.role} must be or contain one of user, viewer, admin")
        return Caller(name, tenant, found)


class _Refused(ValueError):
    """A token is not accepted, for the reason in the message."""


def _reason(error: Exception) -> str:
    """Return the reason why a token is not accepted, without any of its content."""
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (jwt.InvalidAudienceError, "its audience (aud) is another server"),
        (jwt.InvalidIssuerError, "its issuer (iss) is not trusted"),
        (jwt.ImmatureSignatureError, "it is not valid yet (nbf, iat)"),
        (jwt.InvalidSignatureError, "its signature is wrong"),
        (jwt.InvalidAlgorithmError, "its algorithm (alg) does not fit its key"),
    )
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"it has no claim {error.claim}"
    return next((reason for kind, reason in kinds if isinstance(error, kind)), "it is not a JWT")


def parse(text: str) -> dict[str, Key]:
    """Return the keys of a JWKS, by their ids.

    Raises:
        ValueError: it is not a JWKS, or contains a forbidden key. The message names the key and the rule.
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
    other = "must have a key that verifies signatures; it has none"
    for number, given in enumerate(keys, 1):
        if isinstance(given, dict) and given.get("use", "sig") != "sig":
            continue  # for encryption
        try:
            kid, key = _key(given, is_only=len(keys) == 1)
            if kid in found:
                raise ValueError(f"its kid must be unique; an earlier key has {kid!r}")
        except _UnsupportedKey as error:  # issuers may start to use unknown kinds of keys: RFC 7517, 5
            other = f"key {number}: {error}"
            continue
        except ValueError as error:
            raise ValueError(f"key {number}: {error}") from None
        found[kid] = key
    if not found:
        raise ValueError(other)
    return found


class _UnsupportedKey(ValueError):
    """A key of a kind that this server does not use."""


def _key(given: object, *, is_only: bool) -> tuple[str, Key]:
    if not isinstance(given, dict):
        raise ValueError("must be an object")
    kind, curve, alg = (given.get(name, "") for name in ("kty", "crv", "alg"))
    kid = given.get("kid", "" if is_only else None)
    if not isinstance(kid, str):
        raise ValueError("must have a kid, a string, because there are several keys")
    if _PRIVATE & given.keys():
        raise ValueError(
            "must be a public key, without d, p, q or k: this file must not contain keys that can sign"
        )
    allowed = _ALGORITHMS.get((kind, curve)) if isinstance(kind, str) and isinstance(curve, str) else None
    if allowed is None:
        raise _UnsupportedKey(
            f"must be RSA, EC (P-256, P-384, P-521) or OKP (Ed25519); its kty is {kind!r}, crv {curve!r}"
        )
    if alg:
        if alg not in allowed:
            raise _UnsupportedKey(f"its alg must be one of {', '.join(allowed)}; got {alg!r}")
        allowed = (alg,)
    try:
        public = jwt.PyJWK(given, allowed[0]).key
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise ValueError(f"must be a complete key: {type(error).__name__}") from None
    if isinstance(public, RSAPublicKey) and public.key_size < _MIN_RSA_BITS:
        raise ValueError(f"must have at least {_MIN_RSA_BITS} bits; it has {public.key_size}")
    raw = json.dumps({name: given.get(name) for name in ("kty", "crv", "n", "e", "x", "y", "alg", "kid")})
    return kid, Key(public, allowed, hashlib.sha256(raw.encode()).hexdigest())
