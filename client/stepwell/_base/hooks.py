"""Checks of the event hooks of a caller."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from stepwell.errors import InvalidInputError
from stepwell.events import EventHooks

_EVENTS = ("request", "response", "retry", "model_version", "replica")


def checked(hooks: object) -> EventHooks | None:
    """Checks event hooks; returns None if there are none.

    Raises:
        InvalidInputError: They are not lists of functions by the names of events.
    """
    if hooks is None:
        return None
    if not isinstance(hooks, Mapping):
        raise InvalidInputError(f"event_hooks must be a mapping of event to functions; got {hooks!r}")
    made: dict[str, tuple[Any, ...]] = {}
    for event, functions in hooks.items():
        if event not in _EVENTS:
            raise InvalidInputError(f"keys of event_hooks must be among {list(_EVENTS)}; got {event!r}")
        if not isinstance(functions, list | tuple) or not all(callable(one) for one in functions):
            raise InvalidInputError(
                f"event_hooks[{event!r}] must be a list of functions of one argument; got {functions!r}"
            )
        if functions:
            made[event] = tuple(functions)
    return EventHooks(**made) if made else None  # type: ignore[typeddict-item]  # its keys were checked


def require_sync(hooks: EventHooks | None) -> None:
    """Rejects coroutine functions, which a sync client cannot await.

    Raises:
        InvalidInputError: There is one.
    """
    for event, functions in (hooks or {}).items():
        assert isinstance(functions, tuple)
        for one in functions:
            if inspect.iscoroutinefunction(one):
                raise InvalidInputError(
                    f"event_hooks[{event!r}] of a sync client must not be coroutine functions; got {one!r}"
                )
