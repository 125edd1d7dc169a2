"""Event hooks: functions of yours that a client calls before and after each attempt of a call, and before a retry.

    def slow(event: stepwell.events.ResponseEvent) -> None:
        if event.elapsed_s > 0.1:
            print(event.request.rpc, "took", event.elapsed_s, "s")

    client = stepwell.connect(event_hooks={"response": [slow]})

The hooks of an event are called one after the other, in the thread, or the task, that makes the call. Those of the
async client may be coroutine functions, which are awaited. What a hook raises goes to the caller of the call as it is,
and ends that call: nothing more is sent for it. If it was raised after the answer ("response"), the call has done its
work all the same; the same call again is answered with the first answer. A hook must not change the session whose
change it is called for. A client without hooks pays nothing for them.

Steps that leave together in one message are events of their own. What the SDK closes in the background is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypedDict

from stepwell.errors import StepwellError

__all__ = ["EventHooks", "ModelVersionEvent", "ReplicaEvent", "RequestEvent", "ResponseEvent", "RetryEvent"]


@dataclasses.dataclass(frozen=True, slots=True)
class RequestEvent:
    """An attempt of a call is about to be made.

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
    """Of the server; of a client of several replicas, of the one that is asked."""
    rpc: str
    """The method: "OpenSession", "Step", "GetState", ...; "StepStream" for a change of a `SessionGroup`."""
    attempt: int
    """1 for the first, 2 for the first retry, ..."""
    sessions: int
    """How many sessions a change of a group concerns; 1 for every other call."""


@dataclasses.dataclass(frozen=True, slots=True)
class ResponseEvent:
    """An attempt has ended.

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
    """Of the same attempt."""
    elapsed_s: float
    """From the request to the answer, in seconds."""
    error: StepwellError | None
    """How it failed; None: it did not. Of a change of a group: why the whole of it failed; see `StepwellError.failures`
    for what is said of single members."""


@dataclasses.dataclass(frozen=True, slots=True)
class RetryEvent:
    """An attempt has failed, and there will be another.

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
    """Of the attempt that failed."""
    error: StepwellError
    """How."""
    delay_s: float
    """Until the next, in seconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelVersionEvent:
    """An answer has told that sessions are on another version of their model than before.

    That happens where the default version of a model moves, and takes the sessions with it that were opened by the
    name alone. It comes once for each handle that learns of it.

    Example:
        >>> events = []
        >>> hooks = {"model_version": [events.append]}
        >>> with stepwell.connect(address, event_hooks=hooks) as client:
        ...     y = client.open_session("forecast").step(np.ones((1, 3), np.float32))
        >>> events
        []
    """

    address: str
    """Of the server."""
    model: str
    """Name of the model."""
    session_ids: tuple[str, ...]
    """The sessions: one, or those members of a group that this answer was for."""
    previous: int
    """The version that they were on."""
    version: int
    """The version that has answered, and that they are on now."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaEvent:
    """A replica is not asked any more, or is asked again: its sessions move to other replicas, or come back.

    Told by clients of several replicas, to whoever makes the call that finds it out, or the next one.

    Example:
        >>> events = []
        >>> with stepwell.connect(address, event_hooks={"replica": [events.append]}) as client:
        ...     client.models()[0].name
        'forecast'
        >>> events
        []
    """

    address: str
    """Of the replica."""
    is_up: bool
    """It is asked again. False: it is not, and its sessions go to the next replica in their order."""
    error: StepwellError | None
    """Why it is not."""


class EventHooks(TypedDict, total=False):
    """The hooks of a client, by event; each a list of functions of one argument. What they return is not looked at.

    Example:
        >>> hooks: stepwell.events.EventHooks = {"retry": [lambda event: print(event.error)]}
        >>> stepwell.connect(address, event_hooks=hooks).close()
    """

    request: Sequence[Callable[[RequestEvent], object]]
    response: Sequence[Callable[[ResponseEvent], object]]
    retry: Sequence[Callable[[RetryEvent], object]]
    model_version: Sequence[Callable[[ModelVersionEvent], object]]
    replica: Sequence[Callable[[ReplicaEvent], object]]
