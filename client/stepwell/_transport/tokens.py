"""The bearer token that a client sends with its calls, and when to renew it. No I/O."""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from stepwell._base.bearer import PLAIN, RULE, described
from stepwell._base.metadata import Pairs
from stepwell.errors import UnauthenticatedError

RENEWED_S = 30.0
"""A token is renewed at most this long before it expires, in seconds."""
Clock = Callable[[], float]


class Tokens:
    """The metadata of calls, with the current token. Thread-safe; the async methods belong to one event loop.

    A function is called for the first call, shortly before its token expires, if that is a JWT with an expiry, and
    when a server has rejected its token. Calls that need the token at the same time wait for one call of the
    function.

    Args:
        token: The token, a function that returns it, or None.
        others: Other metadata.
        now: Seconds since the epoch.
    """

    def __init__(self, token: Any, others: Pairs = (), now: Clock = time.time) -> None:
        self._function: Callable[[], Any] | None = token if callable(token) else None
        self._others = others
        self._now = now
        self._lock = threading.Lock()
        self._async_lock: asyncio.Lock | None = None
        self._token = ""
        self._renewed_at = 0.0 if self._function else float("inf")
        self._metadata: Pairs | None = self._with(token) if isinstance(token, str) else (others or None)

    @property
    def is_at_hand(self) -> bool:
        """Whether the current token can be used without calling the function."""
        return self._now() < self._renewed_at

    def metadata(self) -> Pairs | None:
        """The metadata of a call that is about to be made. It may call the function, which may take time.

        Raises:
            UnauthenticatedError: The function has failed.
        """
        if self._function is not None and not self.is_at_hand:
            with self._lock:
                if not self.is_at_hand:
                    self._take(_called(self._function))
        return self._metadata

    async def metadata_async(self) -> Pairs | None:
        """The same for an async client, whose function may be a coroutine function.

        Raises:
            UnauthenticatedError: The function has failed.
        """
        if self._function is not None and not self.is_at_hand:
            if self._async_lock is None:
                self._async_lock = asyncio.Lock()
            async with self._async_lock:
                if not self.is_at_hand:
                    given = _called(self._function)
                    if inspect.isawaitable(given):
                        given = await _awaited(given)
                    self._take(given)
        return self._metadata

    def refused(self, metadata: Pairs | None) -> None:
        """Records that a server has rejected a call with this metadata.

        Its token is not used again, unless a newer one is already in use.
        """
        if self._function is not None and metadata is self._metadata:
            self._renewed_at = 0.0

    def _take(self, given: Any) -> None:
        if inspect.iscoroutine(given):
            given.close()
        if not isinstance(given, str) or not PLAIN.fullmatch(given):
            got = described(given) if isinstance(given, str) else type(given).__name__
            raise UnauthenticatedError(f"the token function {RULE.replace('be', 'return', 1)}; got {got}")
        now, expires = self._now(), _expires(given)
        # If the function returns the same token again, it is used until it expires.
        early = 0.0 if given == self._token else min(RENEWED_S, max(0.0, expires - now) / 5)
        self._token = given
        self._metadata = self._with(given)
        self._renewed_at = expires - early

    def _with(self, token: str) -> Pairs:
        return (("authorization", f"Bearer {token}"), *self._others)


def _called(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise _failed(error) from error


async def _awaited(given: Awaitable[Any]) -> Any:
    try:
        return await given
    except Exception as error:
        raise _failed(error) from error


def _failed(error: Exception) -> UnauthenticatedError:
    # Its text may contain secrets, so it is only the cause of the error.
    return UnauthenticatedError(f"the token function raised {type(error).__name__}")


def _expires(token: str) -> float:
    """The expiry time of a token, in seconds since the epoch; infinity if it has none."""
    parts = token.split(".")
    if len(parts) != 3:
        return float("inf")
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        expires = claims["exp"]
    except (binascii.Error, ValueError, LookupError, TypeError, RecursionError):
        return float("inf")
    return float(expires) if isinstance(expires, int | float) else float("inf")
