"""Event hooks without I/O: a flow that asks for the calls of hooks between the asks of another flow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any, TypeVar

from stepwell._base.flow import Flow, Notify, Pause
from stepwell._batching.exchange import Exchange
from stepwell._core.lanes import Ask, Exchanges, Lane
from stepwell._routing.lookup import Lookup
from stepwell._transport.call import Call
from stepwell._transport.retry import Clock
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
        self.address = address
        self.clock = clock

    def observed(self, flow: Flow[T]) -> Flow[T]:
        """The same flow, with `Notify` between its asks.

        What a hook raises, if it is an error of ours, is thrown in here, at a `Notify`, and not into the flow, which
        would take it for the answer to an attempt.
        """
        attempt, request = 1, None
        lanes = _Lanes(self)
        try:
            ask: Ask = next(flow)
            while True:
                yield from lanes.ended()
                if isinstance(ask, Notify | Lookup):  # what the flow itself has to tell, or to know
                    answer, error = yield from _answer(ask)
                elif isinstance(ask, Pause):
                    request = lanes.requests.get(ask.to, request)
                    if ask.is_reported and request is not None:  # else no replica was known yet
                        yield from _tell(self._retries, RetryEvent(request, ask.error, ask.seconds))
                    attempt = ask.attempt + 1
                    answer, error = yield from _answer(ask)
                elif isinstance(ask, Exchanges):
                    yield from lanes.begin(ask)
                    answer, error = yield from _answer(ask)
                else:
                    to = None if isinstance(ask, Exchange) else ask.to
                    address = self.address if to is None else to.address
                    request = RequestEvent(address, _rpc(ask), attempt, _sessions(ask))
                    attempt = 1
                    yield from _tell(self._requests, request)
                    began_s = self.clock()
                    answer, error = yield from _answer(ask)
                    response = ResponseEvent(request, self.clock() - began_s, error)
                    yield from _tell(self._responses, response)
                ask = flow.send(answer) if error is None else flow.throw(error)
        except StopIteration as stop:
            result: T = stop.value
            yield from lanes.ended()
            return result
        finally:
            flow.close()

    def request(self, event: RequestEvent) -> Flow[None]:
        """Tells of an attempt that is about to be made."""
        return _tell(self._requests, event)

    def response(self, event: ResponseEvent) -> Flow[None]:
        """Tells of one that has ended."""
        return _tell(self._responses, event)


class _Lanes:
    """The attempts of a call that asks several replicas at the same time."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._began: dict[Lane, tuple[RequestEvent, float]] = {}
        self.requests: dict[Hashable, RequestEvent] = {}
        """The last one to each."""

    def begin(self, ask: Exchanges) -> Flow[None]:
        """Some are about to be sent."""
        for lane in ask.lanes:
            if lane not in self._began:
                event = RequestEvent(
                    lane.to.address, "StepStream", lane.rest.attempts.made + 1, len(lane.members)
                )
                self.requests[lane.to] = event
                self._began[lane] = event, self._observer.clock()
                yield from self._observer.request(event)

    def ended(self) -> Flow[None]:
        """Some may be over."""
        for lane in [each for each in self._began if each.is_over]:
            event, began_s = self._began.pop(lane)
            elapsed_s = self._observer.clock() - began_s
            yield from self._observer.response(ResponseEvent(event, elapsed_s, lane.error))


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
