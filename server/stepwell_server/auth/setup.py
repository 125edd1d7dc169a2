"""Creates the authentication that the settings configure."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from stepwell_server.auth.callers import Callers
from stepwell_server.clock import Clock


class AuthSettings(Protocol):
    """The settings of a server that concern authentication (`settings.Settings`)."""

    @property
    def auth_tokens(self) -> Path | None:
        """See `--auth-tokens`."""

    @property
    def auth_certificates(self) -> Path | None:
        """See `--auth-certificates`."""

    @property
    def auth_jwks(self) -> Path | None:
        """See `--auth-jwks`."""

    @property
    def auth_jwt_audience(self) -> str | None:
        """See `--auth-jwt-audience`."""

    @property
    def auth_jwt_issuer(self) -> str | None:
        """See `--auth-jwt-issuer`."""

    @property
    def auth_jwt_tenant_claim(self) -> str:
        """See `--auth-jwt-tenant-claim`."""

    @property
    def auth_jwt_role_claim(self) -> str:
        """See `--auth-jwt-role-claim`."""

    @property
    def asks_callers(self) -> bool:
        """Whether any way of authentication is configured."""


def open_callers(settings: AuthSettings, clock: Clock) -> Callers | None:
    """Return the authentication from the configured files; None: callers are not authenticated.

    Raises:
        StartError: a file cannot be used.
    """
    if not settings.asks_callers:
        return None
    web_tokens = None
    if settings.auth_jwks is not None:
        # Imported here: only JWTs need the cryptography package.
        from stepwell_server.auth.web_tokens import Claims, WebTokens

        audience, issuer = settings.auth_jwt_audience, settings.auth_jwt_issuer
        assert audience is not None
        assert issuer is not None
        claims = Claims(audience, issuer, settings.auth_jwt_tenant_claim, settings.auth_jwt_role_claim)
        web_tokens = WebTokens(settings.auth_jwks, claims, clock)
    return Callers(
        clock,
        token_file=settings.auth_tokens,
        certificate_file=settings.auth_certificates,
        web_tokens=web_tokens,
    )
