"""Ctrl-C at any moment of a change costs the connections at most: another thread can change the session at once.

Python runs the handler of a signal when a function of its own begins and when a call of C returns. That is where
`sys.setprofile` calls a function, whose exception comes from the same place: so each of these moments is tried in turn.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from concurrent import futures
from types import FrameType
from typing import Any

import numpy as np
import pytest

from stepwell._batching.sender import Sender
from stepwell._batching.steps import Step, Stepped, stepped_of
from stepwell._core.driver import Driver
from stepwell._core.group_core import GroupCore
from stepwell._core.group_tracker import GroupTracker
from stepwell._core.tracker import SessionTracker
from stepwell._state.tensors import pack, to_messages
from stepwell._transport.call import Call
from stepwell._transport.stream import MakeRequest, Sink
from stepwell.config import ClientConfig
from stepwell.group import SessionGroup
from stepwell.session import Session
from stepwell.v1 import sessions_pb2

_PROBES = "slipcover.probe"
"""Whose functions note the lines that run, for `make coverage`: a moment more on each line."""
X = np.ones((1, 2), np.float32)
IDS = ["a", "b"]


class AnsweringConnections:
    """Connections whose server answers at once. After an interrupt they are as bad as it may have left them."""

    def __init__(self, *_: object, **__: object) -> None:
        self.unaries = 0
        self.renew()

    def renew(self) -> None:
        self.transport, self.link = AnsweringTransport(), AnsweringLink()
        self.step = Sender(self.link, self._unary, 1 << 20).step

    def to(self, _: object) -> AnsweringConnections:
        return self

    def _unary(self, _: Step) -> Stepped:
        self.unaries += 1
        return stepped_of(1, 1, {"y": X})


class AnsweringTransport:
    def invoke(self, call: Call) -> Any:
        if call.rpc == "GetSession":
            return sessions_pb2.GetSessionResponse(session=sessions_pb2.Session(session_id="a", batch_size=1))
        return sessions_pb2.ResetStatesResponse(revision=1)


class AnsweringLink:
    def post(self, make: MakeRequest, sink: Sink) -> Callable[[], None]:
        make(1)
        y = to_messages([pack("y", "y", np.ones((len(IDS), 1), np.float32))])
        sink(sessions_pb2.StepStreamResponse(all_members=True, revision=1, position=1, outputs=y, last=True))
        return lambda: None


def interrupted(call: Callable[[], object], moment: int) -> bool:
    """Makes a call with Ctrl-C at one of its moments. False: it has fewer."""
    moments = itertools.count()

    def profile(_frame: FrameType, event: str, argument: object) -> None:
        if getattr(argument, "__module__", "") == _PROBES:
            return
        if event in {"call", "c_return"} and next(moments) == moment:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        call()
        sys.setprofile(None)
    except KeyboardInterrupt:
        return True
    return False


def of_session(driver: Driver) -> Session:
    info = sessions_pb2.Session(session_id="a", model="m", batch_size=1)
    return Session(driver, SessionTracker(info), owned=False)


def of_group(driver: Driver) -> SessionGroup:
    return SessionGroup(driver, GroupCore(driver.core, GroupTracker("m", "f00d", 1, IDS)), owned=False)


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], object]]] = {
    "step": (of_session, lambda one: one.step(X, timeout_s=10)),
    "reset": (of_session, lambda one: one.reset_states()),
    "refresh": (of_session, lambda one: one.refresh()),
    "step of a group": (of_group, lambda one: one.step(np.ones((2, 2), np.float32), timeout_s=10)),
}


@pytest.mark.usefixtures("without_collector")  # Python ignores what is raised in a finalizer
@pytest.mark.parametrize("name", CHANGES)
def test_after_ctrl_c_the_session_can_be_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepwell._core.driver.Connections", AnsweringConnections)
    make, change = CHANGES[name]
    drivers = []  # kept, so that no finalizer runs in the middle of a call
    with futures.ThreadPoolExecutor(1) as others:
        for moment in itertools.count():
            drivers.append(driver := Driver(ClientConfig("nowhere:1"), coalesce=True))
            handle = make(driver)
            if not interrupted(functools.partial(change, handle), moment):
                break
            connections: Any = driver.connections
            connections.unaries = 0
            others.submit(handle.reset_states, timeout_s=60).result()
            if name == "step":
                others.submit(handle.step, X).result()
                assert connections.unaries == 1
        assert moment > 20
