"""Event hooks without I/O: a flow that asks for the calls of hooks between the asks of another flow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from stepwell._flow import Ask, Call, Exchange, Flow, Notify, Pause
from stepwell._retry import Clock
from stepwell.errors import StepwellError
from stepwell.events import EventHooks, RequestEvent, ResponseEvent, RetryEvent

T = TypeVar("T")


def notify(ask: Notify) -> None:
    """Calls the hooks of an event."""
    for hook in ask.hooks:
        hook(ask.event)


async def notify_async(ask: Notify) -> None:
    """Calls the hooks of an event, and awaits those that want it."""
    for hook in ask.hooks:
        result = hook(ask.event)
        if inspect.isawaitable(result):
            await result


class Observer:
    """Makes the events of a client's calls."""

    def __init__(self, hooks: EventHooks, address: str, clock: Clock) -> None:
        self._requests = hooks.get("request", ())
        self._responses = hooks.get("response", ())
        self._retries = hooks.get("retry", ())
        self._address = address
        self._clock = clock

    def observed(self, flow: Flow[T]) -> Flow[T]:
        """The same flow, with `Notify` between its asks.

        What a hook raises, if it is an error of ours, is thrown in here, at a `Notify`, and not into the flow, which
        would take it for the answer to an attempt.
        """
        attempt, request = 1, None
        try:
            ask = next(flow)
            while True:
                if isinstance(ask, Notify):  # what the flow itself has to tell
                    yield ask
                    answer, error = None, None
                elif isinstance(ask, Pause):
                    assert request is not None
                    yield from _tell(self._retries, RetryEvent(request, ask.error, ask.seconds))
                    attempt = ask.attempt + 1
                    answer, error = yield from _answer(ask)
                else:
                    request = RequestEvent(self._address, _rpc(ask), attempt, _sessions(ask))
                    attempt = 1
                    yield from _tell(self._requests, request)
                    began_s = self._clock()
                    answer, error = yield from _answer(ask)
                    response = ResponseEvent(request, self._clock() - began_s, error)
                    yield from _tell(self._responses, response)
                ask = flow.send(answer) if error is None else flow.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            flow.close()


def _answer(ask: Ask) -> Generator[Ask, Any, tuple[Any, StepwellError | None]]:
    """Passes an ask on; its answer, or how it failed."""
    try:
        return (yield ask), None
    except StepwellError as error:
        return None, error


def _tell(hooks: Sequence[Callable[[Any], object]], event: object) -> Flow[None]:
    if hooks:
        yield Notify(hooks, event)


def _rpc(ask: Ask) -> str:
    if isinstance(ask, Call):
        return ask.rpc
    return "StepStream" if isinstance(ask, Exchange) else "Step"


def _sessions(ask: Ask) -> int:
    return len(ask.frame) if isinstance(ask, Exchange) else 1
