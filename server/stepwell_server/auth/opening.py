"""Who finds callers, as the settings say."""

from __future__ import annotations

from pathlib import Path

from stepwell_server.auth.callers import Callers
from stepwell_server.clock import Clock


def open_callers(
    clock: Clock,
    *,
    token_file: Path | None,
    certificate_file: Path | None,
    jwks_file: Path | None,
    audience: str | None,
    issuer: str | None,
    tenant_claim: str,
    role_claim: str,
) -> Callers | None:
    """Who finds callers by these files; None without any: nobody is asked.

    Raises:
        WatchedFileError: a file cannot be used.
    """
    if token_file is None and certificate_file is None and jwks_file is None:
        return None
    web_tokens = None
    if jwks_file is not None:
        # Here: it brings the cryptography, which nobody else needs.
        from stepwell_server.auth.web_tokens import Claims, WebTokens

        assert audience is not None
        assert issuer is not None
        web_tokens = WebTokens(jwks_file, Claims(audience, issuer, tenant_claim, role_claim), clock)
    return Callers(clock, token_file=token_file, certificate_file=certificate_file, web_tokens=web_tokens)
