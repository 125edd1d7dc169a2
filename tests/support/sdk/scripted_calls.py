"""Runs the flows of a client whose attempts end as scripted, without I/O. The clock moves with pauses and attempts only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from stepwell._base.flow import Flow, Notify, Pause, drive
from stepwell._core.observer import notify
from stepwell._transport import status
from stepwell._transport.call import Call
from stepwell.errors import StepwellError


class ScriptedCalls:
    """Attempts of calls, and how each of them ends.

    Args:
        script: An error; a text of gRPC's, with which it reports UNAVAILABLE; or None for a reply. The last one is that
            of all further attempts.
        attempt_s: How long each attempt takes.
    """

    def __init__(self, script: Sequence[str | StepwellError | None], attempt_s: float = 0.0) -> None:
        self.script = script
        self.attempt_s = attempt_s
        self.now_s = 100.0
        self.attempts = 0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def run(self, flow: Flow[object]) -> object:
        """Run a flow to its result, which is "reply" for a call."""
        return drive(flow, self._answer)

    def _answer(self, ask: Any) -> object:
        if isinstance(ask, Notify):
            notify(ask)
            return None
        if isinstance(ask, Pause):
            self.pauses.append(ask.seconds)
            self.now_s += ask.seconds
            return None
        assert isinstance(ask, Call)
        self.now_s += self.attempt_s
        ended = self.script[min(self.attempts, len(self.script) - 1)]
        self.attempts += 1
        if isinstance(ended, str):
            ended = status.from_rpc(grpc.StatusCode.UNAVAILABLE, ended, ())
        if ended is not None:
            raise ended
        return "reply"
