"""Event hooks: your functions that a client calls before and after each attempt of a call, and before a retry.

::

    def slow(event: stepwell.events.ResponseEvent) -> None:
        if event.elapsed_s > 0.1:
            print(event.request.rpc, "took", event.elapsed_s, "s")


    client = stepwell.connect(event_hooks={"response": [slow]})

The hooks of an event run one after the other, in the thread or task that makes the call. Hooks of the async client
may be coroutine functions, which are awaited.

If a hook raises an exception, the caller of the call gets it as it is, and the call ends without further attempts. If
a "response" hook raises it, the server may have applied the change; repeating the same call returns the first answer.
A hook must not change the session whose change it is called for. A client without hooks pays nothing for them.

Steps that are sent as one message are one event. There are no events for sessions that the SDK closes in the
background.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypedDict

from stepwell.errors import StepwellError

__all__ = ["EventHooks", "ModelVersionEvent", "ReplicaEvent", "RequestEvent", "ResponseEvent", "RetryEvent"]


@dataclasses.dataclass(frozen=True, slots=True)
class RequestEvent:
    """An attempt of a call is about to start.

    Example:
        >>> rpcs = []
        >>> hooks = {"request": [lambda event: rpcs.append(event.rpc)]}
        >>> with stepwell.connect(address, event_hooks=hooks) as client:
        ...     client.models()[0].name
        'forecast'
        >>> rpcs
        ['ListModels']
    """

    address: str
    """Address of the server, or of the replica that is asked."""
    rpc: str
    """Name of the method, such as "OpenSession", "Step" or "GetState"; "StepStream" for a change of a `SessionGroup`."""
    attempt: int
    """1 for the first attempt, 2 for the first retry, and so on."""
    sessions: int
    """Number of sessions that a change of a group concerns; 1 for every other call."""


@dataclasses.dataclass(frozen=True, slots=True)
class ResponseEvent:
    """An attempt of a call has ended.

    Example:
        >>> errors = []
        >>> hooks = {"response": [lambda event: errors.append(event.error)]}
        >>> with stepwell.connect(address, event_hooks=hooks) as client:
        ...     client.models()[0].name
        'forecast'
        >>> errors
        [None]
    """

    request: RequestEvent
    """The event of the same attempt."""
    elapsed_s: float
    """Time from the request to the answer, in seconds."""
    error: StepwellError | None
    """Why the attempt failed; None if it succeeded. For a change of a group, why the whole change failed; errors of
    single members are in `StepwellError.failures`.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class RetryEvent:
    """An attempt has failed, and the client will retry the call.

    Example:
        >>> retries = []
        >>> hooks = {"retry": [retries.append]}
        >>> with stepwell.connect(address, event_hooks=hooks) as client:
        ...     client.models()[0].name
        'forecast'
        >>> retries
        []
    """

    request: RequestEvent
    """The event of the failed attempt."""
    error: StepwellError
    """Why it failed."""
    delay_s: float
    """Time until the next attempt, in seconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelVersionEvent:
    """An answer shows that sessions have moved to another version of their model.

    Sessions opened by the model's name alone move when its default version moves. Each handle reports the move once,
    when it learns of it.

    Example:
        >>> events = []
        >>> hooks = {"model_version": [events.append]}
        >>> with stepwell.connect(address, event_hooks=hooks) as client:
        ...     y = client.open_session("forecast").step(np.ones((1, 3), np.float32))
        >>> events
        []
    """

    address: str
    """Address of the server."""
    model: str
    """Name of the model."""
    session_ids: tuple[str, ...]
    """Ids of the sessions: one, or the members of a group that this answer concerns."""
    previous: int
    """The version before the move."""
    version: int
    """The version after the move, which answered."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaEvent:
    """A client of several replicas stops or resumes sending calls to one of them.

    Its sessions move to other replicas, or move back. The event is reported in the call that detects the change, or
    in the next one.

    Example:
        >>> events = []
        >>> with stepwell.connect(address, event_hooks={"replica": [events.append]}) as client:
        ...     client.models()[0].name
        'forecast'
        >>> events
        []
    """

    address: str
    """Address of the replica."""
    is_up: bool
    """Whether the client sends calls to it again. If not, the next replica in their order serves its sessions."""
    error: StepwellError | None
    """Why the client sends no calls to it; None if it does."""


class EventHooks(TypedDict, total=False):
    """The hooks of a client: for each event a list of functions of one argument. Their results are ignored.

    Example:
        >>> hooks: stepwell.events.EventHooks = {"retry": [lambda event: print(event.error)]}
        >>> stepwell.connect(address, event_hooks=hooks).close()
    """

    request: Sequence[Callable[[RequestEvent], object]]
    response: Sequence[Callable[[ResponseEvent], object]]
    retry: Sequence[Callable[[RetryEvent], object]]
    model_version: Sequence[Callable[[ModelVersionEvent], object]]
    replica: Sequence[Callable[[ReplicaEvent], object]]
