"""A server with TLS and tokens that answers JSON over HTTP."""

from __future__ import annotations

import datetime as dt
import json
import ssl
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from stepwell_server.auth import token_file
from stepwell_server.auth.tokens import Token, digest_of, new_token
from stepwell_server.core.callers import Caller, Role
from stepwell_server.rpc.http.routes import WATCH_PATH
from support.certificates import Authority
from support.peers.json_client import EventStream, JsonClient

ISSUER = "https://issuer.example"
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
        quotas.write_text("[tenants.zeta]\nsessions = 1\n[tenants.slow]\nsteps_per_second = 1\nburst = 60\n")
        self._key = ec.generate_private_key(ec.SECP256R1())
        jwks = folder / "jwks.json"
        public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self._key.public_key()))
        jwks.write_text(json.dumps({"keys": [public | {"kid": "k1", "use": "sig"}]}))
        self.audit = folder / "audit.jsonl"
        self.options = (
            *("--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--auth-tokens", str(tokens)),
            *("--audit-log", str(self.audit), "--quotas", str(quotas), *HTTP),
            *("--auth-jwks", str(jwks), "--auth-jwt-audience", "stepwell", "--auth-jwt-issuer", ISSUER),
        )
        self.address = ""

    def web_token(self, tenant: str, role: str = "user", valid_s: float = 3600.0, **changes: Any) -> str:
        """A JWT that the server accepts, but for the changes. Use it as the token of a name: `tokens[name]`."""
        now = dt.datetime.now(dt.UTC)
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "aud": "stepwell",
            "sub": f"web-of-{tenant}",
            "tenant": tenant,
            "role": role,
        }
        claims |= {"exp": now + dt.timedelta(seconds=valid_s), **changes}
        return jwt.encode(claims, self._key, "ES256", headers={"kid": "k1"})

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
