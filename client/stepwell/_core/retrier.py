"""Turns single attempts into flows that retry, on the replica that routing chooses for each attempt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from stepwell._base.flow import Flow, Pause
from stepwell._batching.steps import Step, Stepped
from stepwell._routing.ranking import key_of, key_of_request
from stepwell._routing.router import Route, Router
from stepwell._transport.call import Call, Endpoint, Requests, check_size
from stepwell._transport.connecting import ALREADY_MADE, Contact
from stepwell._transport.retry import Attempts, Deadline, RepliesTooLargeError, RetryPolicy
from stepwell.errors import StepwellError


class Retrier:
    """Creates the flows of a client's calls.

    A `Step` as an ask means one attempt of it, in a frame with others or as a unary call; the answer is a `Stepped`.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        max_message_bytes: int,
        contact: Contact = ALREADY_MADE,
        *,
        renews_tokens: bool = False,
        router: Router | None = None,
    ) -> None:
        self.router = router
        """Chooses the replica of each attempt; None if there is one server."""
        self._renews_tokens = renews_tokens
        self._policy = policy
        self._max_message_bytes = max_message_bytes
        self._contact = contact

    def call(
        self,
        rpc: str,
        request: Message,
        deadline: Deadline,
        *,
        changes: bool = False,
        to: Endpoint | None = None,
    ) -> Flow[Any]:
        """Makes a unary call, with retries; the result is the response.

        Args:
            rpc: Name of the method.
            request: The same in every attempt.
            deadline: Covers all attempts.
            changes: The call changes something, so an error must tell whether it was applied.
            to: The only replica to ask; None: the replica of the request's session.
        """
        check_size(rpc, request, self._max_message_bytes)

        def ask(to: Endpoint | None) -> Call:
            return Call(rpc, request, deadline.grpc_timeout_s(), to=to)

        router = self.router
        key = 0 if router is None else key_of_request(request, router.home)
        attempts = self.attempts(rpc, deadline, changes=changes)
        return (yield from self._answered(ask, attempts, self._route(key, to)))

    def streamed(
        self,
        rpc: str,
        request: Message,
        deadline: Deadline,
        on_reply: Callable[[Any], object],
        *,
        to: Endpoint | None = None,
    ) -> Flow[None]:
        """Makes a call whose responses stream; `on_reply` is called with each.

        The call changes something, so it is not retried once the server may have received it.
        """
        check_size(rpc, request, self._max_message_bytes)

        def ask(to: Endpoint | None) -> Call:
            return Call(rpc, request, deadline.grpc_timeout_s(), on_reply=on_reply, to=to)

        attempts = self.attempts(rpc, deadline, changes=True)
        yield from self._answered(ask, attempts, self._route(0, to), once=True)

    def sent(
        self, rpc: str, requests: Requests, deadline: Deadline, *, to: Endpoint | None = None
    ) -> Flow[Any]:
        """Makes a call whose requests stream, with retries; the result is the response."""

        def ask(to: Endpoint | None) -> Call:
            return Call(rpc, requests, deadline.grpc_timeout_s(), to=to)

        return (yield from self._answered(ask, self.attempts(rpc, deadline), self._route(0, to)))

    def followed(
        self,
        rpc: str,
        request: Callable[[], Message | None],
        deadline: Callable[[float | None], Deadline],
        on_reply: Callable[[Any], object],
        on_open: Callable[[Callable[[], object]], object],
        *,
        key: int | None,
    ) -> Flow[None]:
        """Reads a call whose responses have no end, and resumes it after a failure.

        Args:
            rpc: Name of the method.
            request: Creates the request of each attempt; None: there is nothing left to ask for.
            deadline: Creates the time limit of the attempts to begin, and to resume.
            on_reply: Called with each response.
            on_open: Called at each attempt with a function that cancels it.
            key: Key of the session whose replica is asked; None: the call has no session.

        Raises:
            StepwellError: No attempt in this time was answered.
        """
        if self.router is not None and key is None:
            key = self.router.home
        while True:
            was_answered, limit = [False], deadline(None)

            def take(reply: Any, answered: list[bool] = was_answered) -> object:
                answered[0] = True
                self._contact.make()
                return on_reply(reply)

            message = request()
            if message is None:
                return
            call = Call(rpc, message, None, on_reply=take, on_open=on_open)

            def ask(to: Endpoint | None, call: Call = call) -> Call:
                return call._replace(to=to)

            try:
                yield from self._answered(ask, self.attempts(rpc, limit), self._route(key or 0))
            except StepwellError:
                if not was_answered[0]:
                    raise
            else:
                return

    def _route(self, key: int, only: Endpoint | None = None) -> Route | None:
        return None if self.router is None else Route(self.router, key, only)

    def attempts(self, rpc: str, deadline: Deadline, *, changes: bool = False) -> Attempts:
        """The attempts of a call."""
        return Attempts(
            rpc, self._policy, deadline, self._contact, changes=changes, renews_tokens=self._renews_tokens
        )

    def step(self, step: Step, failed: StepwellError | None = None) -> Flow[Stepped]:
        """Makes a step, with retries; `failed` is the error of a first attempt that was made before.

        The client may send each attempt in a frame with other steps.

        A reply that is too large ends the stream for every frame on it. So if a frame of one step ended that
        way, another frame's reply may be the cause. The next attempt is a unary call, whose error, if any, is
        about this step.
        """
        route = None if self.router is None else self._route(key_of(step.session_id))
        attempts = self.attempts("Step", step.deadline, changes=True)
        while True:
            if failed is None:
                try:
                    if route is not None:
                        step = dataclasses.replace(step, to=(yield from route.next()))
                    stepped: Stepped = yield step
                except StepwellError as error:
                    failed = error
                else:
                    if route is not None:
                        route.answered()
                    return stepped
            is_alone = isinstance(failed, RepliesTooLargeError) and failed.members == 1
            step = dataclasses.replace(step, is_alone=is_alone)
            pause = yield from _pause(attempts, route, failed)
            failed = None
            yield pause
            attempts.require_time()

    def _answered(
        self,
        ask: Callable[[Endpoint | None], Call],
        attempts: Attempts,
        route: Route | None,
        *,
        once: bool = False,
    ) -> Flow[Any]:
        """The answer to an attempt. `once`: do not retry an attempt of unknown outcome."""
        while True:
            try:
                to = None if route is None else (yield from route.next())
                answered = yield ask(to)
            except StepwellError as error:
                if once and getattr(error, "outcome", "not_applied") == "unknown":
                    raise
                pause = yield from _pause(attempts, route, error)
            else:
                if route is not None:
                    route.answered()
                self._contact.make()
                return answered
            yield pause
            attempts.require_time()


def _pause(attempts: Attempts, route: Route | None, error: StepwellError) -> Flow[Pause]:
    """The pause between a failed attempt and the next.

    Raises:
        StepwellError: There is no next attempt; the error has the combined outcome of all attempts.
    """
    elsewhere = False if route is None else (yield from route.failed(error))
    return Pause(attempts.failed(error, elsewhere=elsewhere), attempts.made, error)
