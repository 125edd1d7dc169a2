"""Event hooks without I/O: a flow that inserts the calls of hooks between the asks of another flow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, TypeVar

from stepwell._base.flow import Flow, Notify, Pause
from stepwell._core.lanes import Ask, Exchange, Lane
from stepwell._routing.lookup import Lookup
from stepwell._transport.call import Call, Endpoint
from stepwell._transport.retry import Clock
from stepwell.errors import StepwellError
from stepwell.events import EventHooks, RequestEvent, ResponseEvent, RetryEvent

T = TypeVar("T")


def notify(ask: Notify) -> None:
    """Calls the hooks of an event."""
    for hook in ask.hooks:
        hook(ask.event)


async def notify_async(ask: Notify) -> None:
    """Calls the hooks of an event, and awaits coroutines."""
    for hook in ask.hooks:
        result = hook(ask.event)
        if inspect.isawaitable(result):
            await result


class Observer:
    """Creates the events of a client's calls."""

    def __init__(self, hooks: EventHooks, address: str, clock: Clock) -> None:
        self.requests = hooks.get("request", ())
        self.responses = hooks.get("response", ())
        self._retries = hooks.get("retry", ())
        self.address = address
        self.clock = clock

    def observed(self, flow: Flow[T]) -> Flow[T]:
        """The same flow, with `Notify` between its asks.

        If a hook raises an error of the SDK, it is thrown in here, at a `Notify`, and not into the flow, which would
        take it for the answer to an attempt.
        """
        attempt, request = 1, None
        lanes = _Lanes(self)
        try:
            ask: Ask = next(flow)
            while True:
                yield from lanes.ended()
                if isinstance(ask, Notify | Lookup):  # the flow's own events and lookups
                    answer, error = yield from _answer(ask)
                elif isinstance(ask, Pause):
                    request = lanes.requests.get(ask.to, request)
                    if ask.is_reported and request is not None:  # otherwise no replica was known yet
                        yield from _notify(self._retries, RetryEvent(request, ask.error, ask.seconds))
                    attempt = ask.attempt + 1
                    answer, error = yield from _answer(ask)
                elif isinstance(ask, Exchange):
                    yield from lanes.begin(ask)
                    answer, error = yield from _answer(ask)
                else:
                    rpc = ask.rpc if isinstance(ask, Call) else "Step"
                    request = RequestEvent(self.address_of(ask.to), rpc, attempt, 1)
                    attempt = 1
                    yield from _notify(self.requests, request)
                    began_s = self.clock()
                    answer, error = yield from _answer(ask)
                    response = ResponseEvent(request, self.clock() - began_s, error)
                    yield from _notify(self.responses, response)
                ask = flow.send(answer) if error is None else flow.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            yield from lanes.ended()
            return result
        finally:
            flow.close()

    def address_of(self, endpoint: Endpoint | None) -> str:
        """Address of the target of an attempt."""
        return self.address if endpoint is None else endpoint.address


class _Lanes:
    """The attempts of a call that asks several replicas at the same time."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._began: dict[Lane, tuple[RequestEvent, float]] = {}
        self.requests: dict[Hashable, RequestEvent] = {}
        """The last request to each."""

    def begin(self, ask: Exchange) -> Flow[None]:
        """Reports lanes that are about to be sent."""
        for lane in ask.lanes:
            if lane not in self._began:
                address, attempt = self._observer.address_of(lane.to), lane.attempts.made + 1
                event = RequestEvent(address, "StepStream", attempt, len(lane.members))
                self.requests[lane.to] = event
                self._began[lane] = event, self._observer.clock()
                yield from _notify(self._observer.requests, event)

    def ended(self) -> Flow[None]:
        """Reports lanes that are over."""
        for lane in [each for each in self._began if each.is_over]:
            event, began_s = self._began.pop(lane)
            elapsed_s = self._observer.clock() - began_s
            yield from _notify(self._observer.responses, ResponseEvent(event, elapsed_s, lane.error))


def _answer(ask: Ask) -> Generator[Ask, Any, tuple[Any, StepwellError | None]]:
    """Passes on an ask; returns its answer, or its error."""
    try:
        return (yield ask), None
    except StepwellError as error:
        return None, error


def _notify(hooks: Sequence[Callable[[Any], object]], event: object) -> Flow[None]:
    if hooks:
        yield Notify(hooks, event)
