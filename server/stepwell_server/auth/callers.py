"""Finds out who calls by what calls show: a bearer token first, else a certificate."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stepwell_server.auth import certificate_map, tokens
from stepwell_server.clock import Clock
from stepwell_server.core.callers import Credential, KnownCaller
from stepwell_server.errors import StartError, Unauthenticated
from stepwell_server.files.watched import WatchedFile
from stepwell_server.logs import Log

if TYPE_CHECKING:
    from stepwell_server.auth.web_tokens import WebTokens

_log = Log("auth")
_SCHEME = "bearer "
_UNKNOWN = "the bearer token must be one that this server knows: it was revoked, or is another server's"


class Shown(Protocol):
    """What a call shows of who makes it."""

    @property
    def certificate_names(self) -> Sequence[str]:
        """Of the certificate, if one is asked for."""

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """By lower-case key."""


class Callers:
    """Those whom the operator's files know. Lives on the event loop.

    Args:
        clock: For what expires.
        token_file: `--auth-tokens`.
        certificate_file: `--auth-certificates`.
        web_tokens: `--auth-jwks`.

    Raises:
        StartError: a file cannot be used.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        token_file: Path | None = None,
        certificate_file: Path | None = None,
        web_tokens: WebTokens | None = None,
    ) -> None:
        self._clock = clock
        self.asked = asyncio.Event()
        """Set by whoever wants the files to be read at once, on the event loop."""
        self._tokens = (
            None
            if token_file is None
            else WatchedFile("--auth-tokens", token_file, tokens.parse, is_private=True)
        )
        self._certificates = (
            None
            if certificate_file is None
            else WatchedFile("--auth-certificates", certificate_file, certificate_map.parse)
        )
        self._web_tokens = web_tokens
        known = (self._tokens, self._certificates, None if web_tokens is None else web_tokens.file)
        self._files: list[WatchedFile[Any]] = [file for file in known if file is not None]
        ways = []
        if self._tokens is not None or web_tokens is not None:
            ways.append(
                "send a token in the metadata, 'authorization: Bearer TOKEN' (STEPWELL_TOKEN for the SDK)"
            )
        if self._certificates is not None:
            ways.append("show a certificate that the server knows")
        self._rule = f"callers must {' or '.join(ways)}"

    def identify(self, call: Shown) -> KnownCaller:
        """Who makes a call.

        Raises:
            Unauthenticated: nobody who is known, or nothing says who. A token that is wrong is not made good by a certificate.
        """
        header = call.metadata.get("authorization")
        if header is not None:
            return self._by_token(header)
        if self._certificates is not None:
            return self._by_names(tuple(call.certificate_names))
        raise Unauthenticated(f"{self._rule}; got none")

    def renewed(self, known: KnownCaller) -> KnownCaller | None:
        """What is known now of a caller who was found before, by the same credential; None: it does not hold any more."""
        now = self._clock.monotonic()
        if known.signer:
            assert self._web_tokens is not None
            return known if now < known.until and self._web_tokens.holds(known) else None
        if known.credential.kind == "names":
            assert self._certificates is not None
            return (
                known
                if self._certificates.value.callers_of(known.credential.names) == {known.caller}
                else None
            )
        assert self._tokens is not None
        token = self._tokens.value.get(known.credential.digest)
        if token is None or token.caller != known.caller or token.has_expired(self._clock.now()):
            return None
        return self._known(token)

    async def refresh(self, *, at_once: bool = False) -> bool:
        """Look whether the files have changed; whether there are others now who are known.

        What cannot be used is said once, and changes nothing.

        Args:
            at_once: Read them anyhow.
        """
        return await asyncio.to_thread(self._look, at_once)

    def _look(self, at_once: bool) -> bool:
        changed = False
        for file in self._files:
            try:
                changed |= file.changed(at_once=at_once)
            except StartError as error:
                _log.warning("the changed callers cannot be used, the old ones stay", reason=str(error))
        return changed

    def _by_token(self, header: str | bytes) -> KnownCaller:
        token = header[len(_SCHEME) :].strip() if isinstance(header, str) else ""
        if not token or not str(header).lower().startswith(_SCHEME):
            raise Unauthenticated(f"{self._rule}; got another authorization")
        # Found by its digest. How long that takes says something of the digest only, and nobody can choose a token by that.
        digest = tokens.digest_of(token)
        known = None if self._tokens is None else self._tokens.value.get(digest)
        if known is not None:
            return self._known(known)
        if self._web_tokens is not None and token.count(".") == 2:
            return self._web_tokens.identify(token, digest)
        raise Unauthenticated(_UNKNOWN)

    def _known(self, token: tokens.Token) -> KnownCaller:
        until = math.inf
        if token.expires is not None:
            now = self._clock.now()
            if token.has_expired(now):
                raise Unauthenticated(f"the bearer token has expired, at {tokens.time_text(token.expires)}")
            until = self._clock.monotonic() + token.expires.timestamp() - now
        return KnownCaller(token.caller, Credential("token", token.digest), until)

    def _by_names(self, names: tuple[str, ...]) -> KnownCaller:
        assert self._certificates is not None
        found = self._certificates.value.callers_of(names)
        if not found:
            raise Unauthenticated(f"{self._rule}; got {'one of nobody' if names else 'none'}")
        if len(found) > 1:
            raise Unauthenticated(
                "a certificate must have names of one caller; got one with those of several"
            )
        return KnownCaller(found.pop(), Credential("names", names=names))
