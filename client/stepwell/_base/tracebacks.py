"""Tracebacks that end at the caller's line: the SDK's own frames say nothing to who called it.

With the environment variable STEPWELL_FULL_TRACEBACKS set to anything but an empty text all frames stay.
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
    """Drops the frames that an error has collected so far, unless it comes from code that is not the SDK's.

    A `raise` without an argument adds none for its own function, so that the next is that of the caller.
    """
    if os.environ.get(VARIABLE) or not _is_own(error.__traceback__):
        return
    if error.__cause__ is None:
        # What the SDK made the error of, such as that of one attempt.
        error.__suppress_context__ = True
    error.__traceback__ = None


def _is_own(trace: TracebackType | None) -> bool:
    """Whether an error was raised by the SDK: not by an event hook, say."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return name == "stepwell" or name.startswith("stepwell.")


def ends_here(function: F) -> F:
    """A function of the SDK's face: errors that leave it show none of the SDK's frames."""
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


def end_here(kind: C) -> C:
    """A class of the SDK's face: `ends_here` for each of its public methods, and for what `with` calls."""
    for name, member in list(vars(kind).items()):
        if inspect.isfunction(member) and (not name.startswith("_") or name in _BLOCK):
            setattr(kind, name, ends_here(member))
    return kind


_BLOCK = {"__aenter__", "__aexit__", "__enter__", "__exit__"}
