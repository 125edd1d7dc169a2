"""When to retry, and how long to wait before that. No I/O: the clock and random numbers are passed in."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable
from typing import Self

from stepwell import errors
from stepwell._base.log import LOG
from stepwell._transport.connecting import ConnectError, Contact, HandshakeError

# An attempt that the time limit cuts short has an unknown outcome, so none is made with less time than this.
_MIN_ATTEMPT_S = 0.02
_LASTING_QUOTAS = frozenset({"sessions", "bytes", "models"})
"""Quotas that stay exhausted until somebody closes or unloads something, so that waiting does not help."""

_MAX_SHARED_S = 1e-3
"""How long calls that begin one after the other may share a deadline."""

Clock = Callable[[], float]


class Deadline:
    """A time limit, counted from its construction. It covers all attempts of a call. It never changes."""

    __slots__ = ("_began_s", "_clock", "at_s", "limit_s", "shared_until_s")

    def __init__(self, limit_s: float, clock: Clock = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._began_s = clock()
        self.at_s = self._began_s + limit_s
        """When it passes, on its clock."""
        self.shared_until_s = self._began_s + min(_MAX_SHARED_S, limit_s / 1000)
        """Until then, on its clock, a call with the same limit may share it: for a thousandth of the limit at most."""

    def remaining_s(self) -> float:
        """Seconds left, never below 0; `math.inf` without a limit."""
        remaining_s = self.at_s - self._clock()
        return remaining_s if remaining_s > 0 else 0.0

    def elapsed_s(self) -> float:
        """Seconds since its construction."""
        return self._clock() - self._began_s

    def grpc_timeout_s(self) -> float | None:
        """Seconds left, as gRPC takes them."""
        return None if self.limit_s == math.inf else self.remaining_s()


class RepliesTooLargeError(errors.UnavailableError):
    """The replies to the steps of a frame together exceeded the message limit. Never raised to users.

    A reply that is too large ends the stream, and so every frame on it, whichever of them caused it.
    """

    members = 0
    """Number of steps in the frame."""

    @classmethod
    def of(cls, members: int, error: errors.StepwellError) -> Self:
        """The error of a frame with this many members."""
        made = cls(f"the replies to {members} steps together: {error}")
        made.members = members
        return made


@dataclasses.dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter.

    Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015: of the variants
    compared there, a uniform draw from the whole interval made the fewest calls and nearly the least delay.
    """

    base_s: float = 0.05
    """Upper end of the first delay."""
    cap_s: float = 2.0
    """Upper end of every later delay."""
    down_cap_s: float = 0.25
    """Upper end of the first delays while a server is down or starting. Such an attempt costs the server almost nothing."""
    down_attempts: int = 20
    """Number of these delays per call, about three seconds in total."""
    draw: Callable[[float, float], float] = random.uniform
    """Draws from an interval."""

    def delay_s(self, attempt: int, error: errors.StepwellError) -> float | None:
        """Seconds to wait after this many attempts; None if another attempt would not help."""
        cap_s = self.down_cap_s if attempt <= self.down_attempts and _is_down(error) else self.cap_s
        backoff_s = min(cap_s, self.base_s * 2 ** min(attempt - 1, 30))
        if isinstance(error, RepliesTooLargeError):
            return 0.0  # the next frames are smaller: waiting would not help
        if isinstance(error, HandshakeError):
            return None
        if isinstance(error, errors.OverloadedError) and error.quota in _LASTING_QUOTAS:
            return None
        if isinstance(error, errors.OverloadedError) and error.retry_after_s > 0:
            # Not before the server's delay, and with jitter after it.
            return error.retry_after_s + self.draw(0.0, min(backoff_s, error.retry_after_s))
        if isinstance(error, errors.OverloadedError | errors.UnavailableError):
            return self.draw(0.0, backoff_s)
        return None


def _is_down(error: errors.StepwellError) -> bool:
    """Whether no server took the attempt, because none listens or it is starting."""
    return isinstance(error, ConnectError) or (
        isinstance(error, errors.UnavailableError) and error.reason == "STARTING"
    )


class Attempts:
    """The attempts of one call: decides after each failure whether to retry."""

    def __init__(
        self,
        rpc: str,
        policy: RetryPolicy,
        deadline: Deadline,
        contact: Contact,
        *,
        changes: bool,
        renews_tokens: bool = False,
    ) -> None:
        self.made = 0
        """Attempts so far."""
        self._rpc = rpc
        self._policy = policy
        self._deadline = deadline
        self._contact = contact
        self._changes = changes
        self._renews_token = renews_tokens
        """Whether to retry with a new token after a rejection."""
        self._unknown = False
        self._last: errors.StepwellError | None = None
        self._is_elsewhere = False

    def failed(self, error: errors.StepwellError, *, elsewhere: bool = False) -> float:
        """Seconds to wait before the next attempt; 0 if it goes to another replica (`elsewhere`).

        Raises:
            StepwellError: `error`, if it is final, with the combined outcome of all attempts.
        """
        self.made += 1
        self._contact.learn(error)
        self._unknown |= self._changes and getattr(error, "outcome", "not_applied") == "unknown"
        delay_s = self._policy.delay_s(self.made, error)
        if isinstance(error, errors.UnauthenticatedError) and self._renews_token:
            self._renews_token, delay_s = False, 0.0
        self._is_elsewhere = elsewhere
        if elsewhere:
            delay_s = 0.0
        remaining_s = self._remaining_s(error)
        if delay_s is None or remaining_s <= 0:
            raise self._final(error)
        if isinstance(error, errors.OverloadedError) and delay_s >= remaining_s:
            raise self._final(error)
        self._last = self._clearer(error)
        delay_s = min(delay_s, remaining_s)
        LOG.info(
            "%s at %s: attempt %d failed, retrying in %.3f s: %s",
            self._rpc, self._contact.address, self.made, delay_s, error.message,
        )  # fmt: skip
        return delay_s

    @property
    def last(self) -> errors.StepwellError | None:
        """The error of the last attempt."""
        return self._last

    def _limit_s(self, error: errors.StepwellError) -> float:
        return min(self._deadline.limit_s, self._contact.patience_s(error))

    def _remaining_s(self, error: errors.StepwellError) -> float:
        if self._is_elsewhere:  # another replica has its own time limit before the first contact
            return self._deadline.remaining_s()
        return min(self._deadline.remaining_s(), self._limit_s(error) - self._deadline.elapsed_s())

    def require_time(self) -> None:
        """Checks after the wait that there is time for another attempt.

        Raises:
            StepwellError: The last error, if there is not.
        """
        last = self._last
        if last is not None and self._remaining_s(last) < min(_MIN_ATTEMPT_S, self._limit_s(last) / 10):
            raise self._final(last)

    def _clearer(self, error: errors.StepwellError) -> errors.StepwellError:
        """`error`, or the last one if that has a better hint.

        A name may have several addresses: gRPC reports one of them, and not always the one where a server listens.
        """
        last = self._last
        if (
            isinstance(error, ConnectError)
            and isinstance(last, ConnectError)
            and not self._contact.made
            and len(last.hint) > len(error.hint) > 0
            and last.patience == error.patience
        ):
            return last
        return error

    def _final(self, error: errors.StepwellError) -> errors.StepwellError:
        error = self._clearer(error)
        if isinstance(error, errors.DeadlineExceededError):
            return self._ended(errors.DeadlineExceededError, error)
        if isinstance(error, errors.UnavailableError):
            return self._ended(errors.UnavailableError, error)
        if isinstance(error, errors.UnauthenticatedError) and self._unknown:
            error.outcome = "unknown"
        if isinstance(error, errors.OverloadedError) and self._unknown:
            # This attempt was refused, but an earlier one may have been applied.
            return self._ended(errors.UnavailableError, error)
        return error

    def _ended(
        self,
        kind: type[errors.UnavailableError | errors.DeadlineExceededError],
        error: errors.StepwellError,
    ) -> errors.StepwellError:
        outcome: errors.Outcome = "unknown" if self._unknown else "not_applied"
        message = self._contact.explain(error, self._deadline.limit_s)
        if self._last is not None and self._last is not error and self._last.message != error.message:
            message += f"; before that: {self._last.message}"
        message += f" (attempts: {self.made}"
        if self._contact.made:
            message += f", time limit: {self._deadline.limit_s:g} s"
        message += f", outcome: {outcome})" if self._changes else ")"
        LOG.info("%s: gave up: %s", self._rpc, message)
        return kind(message, outcome=outcome, reason=error.reason)
