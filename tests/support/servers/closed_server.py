"""A server with TLS and tokens that answers JSON over HTTP."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from stepwell_server.auth import token_file
from stepwell_server.auth.tokens import Token, digest_of, new_token
from stepwell_server.core.callers import Caller, Role
from stepwell_server.rpc.http.routes import WATCH_PATH
from support.certificates import Authority
from support.peers.json_client import EventStream, JsonClient

HTTP = ("--http-listen", "127.0.0.1:0")


class Secured:
    """A server with TLS and tokens, its authority, and a token of each caller."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder)
        pair = self.pair = self.authority.issue()
        callers = {
            "ann": Caller("ann", "acme", Role.USER),
            "bob": Caller("bob", "zeta", Role.USER),
            "eye": Caller("eye", "acme", Role.VIEWER),
            "ops": Caller("ops", "ops", Role.ADMIN),
        }
        self.tokens = {name: new_token() for name in callers}
        tokens = self.token_file = folder / "tokens.toml"
        for name, text in self.tokens.items():
            token_file.add(tokens, Token(callers[name], digest_of(text)))
        quotas = folder / "quotas.toml"
        quotas.write_text("[tenants.zeta]\nsessions = 1\n")
        self.audit = folder / "audit.jsonl"
        self.options = (
            *("--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--auth-tokens", str(tokens)),
            *("--audit-log", str(self.audit), "--quotas", str(quotas), *HTTP),
        )
        self.address = ""

    def events(self, name: str, body: object, **headers: str) -> EventStream:
        """A watch of a caller."""
        bearer = {"authorization": f"Bearer {self.tokens[name]}"}
        return self.client.events(WATCH_PATH, body, bearer | headers)

    @property
    def client(self) -> JsonClient:
        context = ssl.create_default_context(cafile=str(self.authority.cert))
        return JsonClient(self.address, context)

    def json(self, name: str, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """A call of a caller."""
        bearer = {"authorization": f"Bearer {self.tokens[name]}"}
        shown = {key.replace("_", "-"): value for key, value in headers.items()}
        return self.client.json(method, path, body, bearer | shown)
