"""Checks of the bearer token of a caller."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from stepwell.errors import InvalidInputError

Token: TypeAlias = str | Callable[[], str]
"""A bearer token, or a function that returns it."""
AsyncToken: TypeAlias = str | Callable[[], str | Awaitable[str]]
"""A bearer token, or a function or coroutine function that returns it."""

PLAIN = re.compile(r"[!-~]+")
RULE = "must be a string of printable ASCII characters without spaces"


def checked(token: object) -> Any:
    """Checks a token, or a function that returns one. No message shows the token.

    Raises:
        InvalidInputError: It is neither.
    """
    if token is None or callable(token):
        return token
    if not isinstance(token, str):
        raise InvalidInputError(f"token {RULE}, or a function without arguments; got {type(token).__name__}")
    if not PLAIN.fullmatch(token):
        raise InvalidInputError(f"token {RULE}; got {described(token)}")
    return token


def described(token: str) -> str:
    """An invalid token, without its text."""
    return f"{len(token)} characters, some of which are not allowed" if token else "an empty string"


def require_sync(token: object) -> None:
    """Rejects a coroutine function, which a sync client cannot await.

    Raises:
        InvalidInputError: It is one.
    """
    if inspect.iscoroutinefunction(token):
        raise InvalidInputError(f"token of a sync client must not be a coroutine function; got {token!r}")
