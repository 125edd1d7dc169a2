"""Authenticates callers: by a bearer token if the call has one, else by the client certificate."""

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
_UNKNOWN = "the bearer token must be known to this server; it was revoked, or belongs to another server"


class Credentials(Protocol):
    """The part of a call that identifies its caller."""

    @property
    def certificate_names(self) -> Sequence[str]:
        """Names in the client certificate, if the server asks for one."""

    @property
    def metadata(self) -> Mapping[str, str | bytes]:
        """The call's metadata, by lower-case key."""


class Callers:
    """Authenticates callers by the operator's files. Lives on the event loop.

    Args:
        clock: The time, for expiry.
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
        """Set it on the event loop to have the files read at once."""
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
            ways.append("present a certificate that the server knows")
        self._rule = f"callers must {' or '.join(ways)}"

    def identify(self, call: Credentials) -> KnownCaller:
        """Return the caller of a call.

        Raises:
            Unauthenticated: the credentials are missing or unknown. A valid certificate does not make up for a wrong token.
        """
        header = call.metadata.get("authorization")
        if header is not None:
            return self._by_token(header)
        if self._certificates is not None:
            return self._by_names(tuple(call.certificate_names))
        raise Unauthenticated(f"{self._rule}; got none")

    def renewed(self, known: KnownCaller) -> KnownCaller | None:
        """Look up the credential of an authenticated caller again; None: it is no longer valid."""
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
        """Reload changed files, and return whether the known callers have changed.

        A file that cannot be used is logged once, and the old callers stay.

        Args:
            at_once: Read the files even if they seem unchanged.
        """
        return await asyncio.to_thread(self._look, at_once)

    def _look(self, at_once: bool) -> bool:
        changed = False
        for file in self._files:
            try:
                changed |= file.changed(at_once=at_once)
            except StartError as error:
                _log.warning("the changed callers cannot be used, the old ones stay valid", reason=str(error))
        return changed

    def _by_token(self, header: str | bytes) -> KnownCaller:
        token = header[len(_SCHEME) :].strip() if isinstance(header, str) else ""
        if not token or not str(header).lower().startswith(_SCHEME):
            raise Unauthenticated(f"{self._rule}; got another kind of authorization")
        # The time of this look-up depends only on the digest, from which nobody can derive a token.
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
            raise Unauthenticated(f"{self._rule}; got {'an unknown one' if names else 'none'}")
        if len(found) > 1:
            raise Unauthenticated(
                "a certificate must have the names of one caller; got one with the names of several"
            )
        return KnownCaller(found.pop(), Credential("names", names=names))
