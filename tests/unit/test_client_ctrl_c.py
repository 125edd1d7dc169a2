"""Ctrl-C at any moment of a change leaves no lock behind: another thread can change the session at once.

Python runs the handler of a signal when a function of its own begins and when a call of C returns. That is where
`sys.setprofile` calls a function, whose exception comes from the same place: so each of these moments is tried in turn.
"""

from __future__ import annotations

import functools
import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from types import FrameType
from typing import Any

import numpy as np
import pytest

from stepwell._base.flow import Flow, drive
from stepwell._batching.exchange import Exchange
from stepwell._batching.frames import Part
from stepwell._batching.sender import Sender
from stepwell._batching.steps import Step, Stepped
from stepwell._core.core import Core
from stepwell._core.group_core import GroupCore
from stepwell._core.group_tracker import GroupTracker
from stepwell._core.lanes import Ask
from stepwell._core.tracker import SessionTracker
from stepwell._transport.call import Call
from stepwell.config import ClientConfig
from stepwell.group import SessionGroup
from stepwell.session import Session
from stepwell.v1 import sessions_pb2

X = np.ones((1, 2), np.float32)
IDS = ["a", "b"]


class AnsweringClient:
    """A client whose server answers at once: what a session and a group need of one."""

    def __init__(self) -> None:
        self.core = Core(ClientConfig("nowhere:1"))
        self.unaries = 0
        self._sender = Sender(NoLink(), self.unary, 1 << 20)

    def unary(self, step: Step) -> Stepped:
        self.unaries += 1
        return Stepped(1, 1, {"y": X})

    def run(self, flow: Flow[Any]) -> Any:
        return drive(flow, self.answer)

    def answer(self, ask: Ask) -> Any:
        if isinstance(ask, Step):
            return self._sender.step(ask)
        if isinstance(ask, Exchange):
            count = len(IDS)
            ones = np.ones(count, np.uint64)
            y = np.ones((count, 1), np.float32)
            return ask.on_part(Part(np.arange(count), ones, ones, {"y": y}, {}))
        assert isinstance(ask, Call)
        if ask.rpc == "GetSession":
            return sessions_pb2.GetSessionResponse(session=sessions_pb2.Session(session_id="a", batch_size=1))
        return sessions_pb2.ResetStatesResponse(revision=1)


class NoLink:
    def post(self, *_: object) -> Any:
        raise AssertionError("the step is alone, so it must be a call of its own")


def interrupted(call: Callable[[], object], moment: int) -> bool:
    """Makes a call with Ctrl-C at one of its moments. False: it has fewer."""
    moments = itertools.count()

    def profile(_frame: FrameType, event: str, _arg: object) -> None:
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


def of_session(client: Any) -> Session:
    info = sessions_pb2.Session(session_id="a", model="m", batch_size=1)
    return Session(client, SessionTracker(info), owned=False)


def of_group(client: Any) -> SessionGroup:
    return SessionGroup(client, GroupCore(client.core, GroupTracker("m", "f00d", 1, IDS)), owned=False)


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], object]]] = {
    "step": (of_session, lambda one: one.step(X, timeout_s=10)),
    "reset": (of_session, lambda one: one.reset_states()),
    "refresh": (of_session, lambda one: one.refresh()),
    "step of a group": (of_group, lambda one: one.step(np.ones((2, 2), np.float32), timeout_s=10)),
}


@pytest.fixture
def nothing_is_collected() -> Iterator[None]:
    """Python ignores what is raised in a finalizer."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("nothing_is_collected")
@pytest.mark.parametrize("name", CHANGES)
def test_ctrl_c_leaves_nothing_locked(name: str) -> None:
    make, change = CHANGES[name]
    clients = []  # kept, so that no finalizer runs in the middle of a call
    with futures.ThreadPoolExecutor(1) as others:
        for moment in itertools.count():
            clients.append(client := AnsweringClient())
            handle = make(client)
            if not interrupted(functools.partial(change, handle), moment):
                break
            client.unaries = 0
            others.submit(handle.reset_states, timeout_s=0.02).result()
            if name == "step":
                others.submit(handle.step, X).result()
                assert client.unaries == 1
        assert moment > 20
