"""A server with a console, callers of each role, and sessions to look at."""

from __future__ import annotations

import random
import re
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import stepwell
from stepwell._base.ports import reserved
from stepwell_server.auth import token_file
from stepwell_server.auth.tokens import Token, digest_of, new_token, time_text
from stepwell_server.core.callers import Caller, Role
from support.servers.served import local_server

TENANT = "acme"
HOSTILE = {
    "markup": "<img src=x onerror=alert(1)>",
    "script": "</script><script>alert(2)</script>",
    "quotes": "\"'`${7*7}{{7*7}}",
    "path": "../../v1/models",
    "percent": "100%25 %2F%zz?a=b&c#d",
    "colon": "user:42:step",
    "right-to-left": "\u05d0\u05d1\u05d2/abc",
    "emoji": "🚀 é e\u0301",
    "prototype": "__proto__",
    "spaces": "a  b",
    "longest": "x" * 256,
}
"""Ids of sessions that a page may take for something else, by what is hostile about them."""


class ConsoleServer:
    """A server of `seq` (an LSTM) and `gru` that asks for tokens. It keeps its ports and sessions over a restart."""

    def __init__(self, *names: str, options: tuple[str, ...] = (), store: str | None = None) -> None:
        """`names`: of the models, see `served.MODELS`. `store`: the URL of a store that others use too."""
        folder = Path(tempfile.mkdtemp(prefix="console-"))
        callers = {role.value: Caller(role.value, TENANT, role) for role in Role}
        callers |= {name: Caller(name, TENANT, Role.USER) for name in ("leaver", "guest")}
        far = datetime.now(UTC) + timedelta(days=1)
        self.tokens = {name: new_token() for name in callers}
        """Tokens by the name of the caller: a role, a user whose token a test may revoke, or one whose token may expire."""
        self.token_file = folder / "tokens.toml"
        for name, text in self.tokens.items():
            expires = far if name == "guest" else None
            token_file.add(self.token_file, Token(callers[name], digest_of(text), expires=expires))
        held = reserved("127.0.0.1")
        assert held is not None, "this system cannot reserve a port"
        self._held = held
        self.origin = f"http://127.0.0.1:{held.getsockname()[1]}"
        self.server = local_server(
            *(names or ("seq", "gru")),
            data_dir=None if store else folder / "data",
            extra_args=[
                *(("--store", store, "--durability", "async") if store else ()),
                *("--http-listen", self.origin.removeprefix("http://")),
                *("--auth-tokens", str(self.token_file), *options),
            ],
        )

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.__exit__(kind, error, trace)
        self._held.close()

    def connect(self, caller: str = "user") -> stepwell.Client:
        """The SDK, as a caller."""
        return stepwell.connect(self.server.address, token=self.tokens[caller], allow_insecure_token=True)

    def revoke(self, caller: str) -> None:
        """Take a caller's token out of the file."""
        digest = digest_of(self.tokens[caller])
        assert token_file.remove(self.token_file, lambda one: one.digest == digest)

    def expire(self, caller: str, after_s: float) -> None:
        """Let a caller's token expire soon; it has an end already."""
        soon = time_text(datetime.now(UTC) + timedelta(seconds=after_s))
        lines = self.token_file.read_text().splitlines()
        found = [line for line in lines if line.startswith(f"{caller} ")]
        assert len(found) == 1
        changed = re.sub(r"expires=\S+", f"expires={soon}", found[0])
        assert changed != found[0]
        new = self.token_file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text("".join(f"{changed if line == found[0] else line}\n" for line in lines))
        new.replace(self.token_file)


def new_id(prefix: str = "user") -> str:
    """An id of a session that no other test has."""
    return f"{prefix}-{random.getrandbits(48):012x}"
