"""Flows: operations as generators that do no I/O, and the loops that drive them.

A flow yields an *ask* (make a call, attempt a step, pause) and receives the answer, or has the error thrown into it.
The sync and the async client drive the same flows, each with its own way of waiting. Each layer defines its own kinds
of asks; `_core.lanes.Ask` lists them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Generator, Hashable, Sequence
from typing import Any, TypeAlias, TypeVar

from stepwell.errors import StepwellError

T = TypeVar("T")
Flow: TypeAlias = Generator[Any, Any, T]


@dataclasses.dataclass(frozen=True, slots=True)
class Pause:
    """Wait before the next attempt; the answer is None."""

    seconds: float
    attempt: int
    """Number of the failed attempt, from 1."""
    error: StepwellError
    """Why it failed."""
    is_waited: bool = True
    """False: only event hooks run, and other attempts continue."""
    is_reported: bool = True
    """False: event hooks have already seen it."""
    to: Hashable = None
    """Target of the attempt, if several endpoints are asked concurrently."""


@dataclasses.dataclass(frozen=True, slots=True)
class Notify:
    """Call event hooks, one after the other; the answer is None. Exceptions of a hook reach the caller."""

    hooks: Sequence[Callable[[Any], object]]
    event: object


def drive(flow: Flow[T], answer: Callable[[Any], Any]) -> T:
    """Drives a flow to its result; `answer` blocks."""
    try:
        ask = next(flow)
        while True:
            try:
                answered = answer(ask)
            except StepwellError as error:
                ask = flow.throw(error)
            else:
                ask = flow.send(answered)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()  # an interrupted flow gets GeneratorExit


async def drive_async(flow: Flow[T], answer: Callable[[Any], Awaitable[Any]]) -> T:
    """Drives a flow to its result; `answer` is awaited."""
    try:
        ask = next(flow)
        while True:
            try:
                answered = await answer(ask)
            except StepwellError as error:
                ask = flow.throw(error)
            else:
                ask = flow.send(answered)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()  # a cancelled flow gets GeneratorExit
