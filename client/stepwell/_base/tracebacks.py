"""Tracebacks that end at the caller's line, without the frames of the SDK.

Set the environment variable STEPWELL_FULL_TRACEBACKS to a non-empty value to keep all frames.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar, cast

from stepwell.errors import StepwellError

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)

VARIABLE = "STEPWELL_FULL_TRACEBACKS"
"""Environment variable that keeps all frames."""


def shorten(error: StepwellError) -> None:
    """Drops the frames that an error has collected so far, unless the error comes from code outside the SDK.

    A `raise` without an argument adds no frame for its own function, so the next one is the caller's.
    """
    if os.environ.get(VARIABLE) or not _is_own(error.__traceback__):
        return
    if error.__cause__ is None:
        # Hides the error from which the SDK made this one, such as that of one attempt.
        error.__suppress_context__ = True
    error.__traceback__ = None


def _is_own(trace: TracebackType | None) -> bool:
    """Whether the SDK raised an error, and not an event hook, for example."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return name == "stepwell" or name.startswith("stepwell.")


def ends_here(function: F) -> F:
    """Decorates a public function: errors that leave it show no frames of the SDK."""
    made: Any
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def made(*args: Any, **kwargs: Any) -> Any:
            try:
                return await function(*args, **kwargs)
            except StepwellError as error:
                shorten(error)
                raise

    else:

        @functools.wraps(function)
        def made(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except StepwellError as error:
                shorten(error)
                raise

    return cast("F", made)


def shortens(function: F) -> F:
    """Decorates a public method that calls `shorten` itself, because a function around it would cost its calls too much."""
    _SHORTENING.add(function)
    return function


def end_here(kind: C) -> C:
    """Decorates a public class: applies `ends_here` to each public method, and to the methods that `with` calls."""
    for name, member in list(vars(kind).items()):
        is_public = inspect.isfunction(member) and (not name.startswith("_") or name in _BLOCK)
        if is_public and member not in _SHORTENING:
            setattr(kind, name, ends_here(member))
    return kind


_SHORTENING: set[Callable[..., Any]] = set()
_BLOCK = {"__aenter__", "__aexit__", "__enter__", "__exit__"}
