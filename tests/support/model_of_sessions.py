"""What sessions must do, in plain Python: one session at a time, one row at a time. Knows no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from support.fake_executor import BAD, PLAIN, advance

Array = npt.NDArray[Any]


@dataclasses.dataclass
class Reply:
    """The answer to a change."""

    revision: int
    position: int
    outputs: Mapping[str, Array]
    replayed: bool = False


@dataclasses.dataclass
class Refused:
    """A change that is not applied; `why` is the name of the error."""

    why: str


@dataclasses.dataclass
class ModelSession:
    """One session of the plain program."""

    batch_size: int
    state: Array
    used: float
    revision: int = 0
    position: int = 0
    request: int = 0
    outputs: Mapping[str, Array] = dataclasses.field(default_factory=dict)


def initial(batch_size: int) -> Array:
    return np.stack([PLAIN.initial[0]] * batch_size)


def run(state: Array, x: Array) -> tuple[Array, Array] | None:
    """Outputs `(rows, T, 2)` and the state after T steps; None if the program refuses a row of them."""
    if np.any(x[..., 0] == BAD):
        return None
    outputs = np.empty(x.shape, np.float32)
    after = np.empty_like(state)
    for row in range(len(state)):
        one = state[row : row + 1]
        for time in range(x.shape[1]):
            (y,), (one,) = advance([x[row : row + 1, time]], [one])
            outputs[row, time] = y[0]
        after[row] = one[0]
    return outputs, after


def ran(state: Array, x: Array) -> tuple[Array, Array]:
    """As `run`, with or without a time axis, of inputs that the program does not refuse."""
    found = run(state, x if x.ndim == 3 else x[:, None])
    assert found is not None
    outputs, after = found
    return outputs if x.ndim == 3 else outputs[:, 0], after


class ModelOfSessions:
    """Sessions by name."""

    def __init__(self, max_idle_s: float) -> None:
        self.sessions: dict[str, ModelSession] = {}
        self.expired: set[str] = set()
        self.first: dict[str, int] = {}
        """With which revision the next session of an id begins, where there was one before."""
        self._max_idle_s = max_idle_s

    def open(self, name: str, batch_size: int, state: Array | None, now: float) -> str:
        """`opened` or `resumed`."""
        found = self.sessions.get(name)
        if found is not None:
            found.used = now
            return "resumed"
        start = initial(batch_size) if state is None else state.copy()
        self.sessions[name] = ModelSession(batch_size, start, now, self.first.pop(name, 0))
        self.expired.discard(name)
        return "opened"

    def expire(self, now: float) -> None:
        if not self._max_idle_s:
            return
        for name in [n for n, s in self.sessions.items() if s.used < now - self._max_idle_s]:
            self.first[name] = self.sessions.pop(name).revision + 1
            self.expired.add(name)

    def gone(self, name: str) -> Refused:
        return Refused("SessionExpired" if name in self.expired else "SessionNotFound")

    def close(self, name: str) -> bool | Refused:
        closed = self.sessions.pop(name, None)
        if closed is None:
            return self.gone(name)
        self.first[name] = closed.revision + 1
        return True

    def fork(self, name: str, new: str, now: float) -> ModelSession | Refused:
        if new in self.sessions:
            return Refused("SessionExists")
        source = self.sessions.get(name)
        if source is None:
            return self.gone(name)
        source.used = now
        twin = dataclasses.replace(source, state=source.state.copy(), request=0, outputs={}, used=now)
        twin.revision = max(source.revision, self.first.pop(new, 0))
        self.sessions[new] = twin
        self.expired.discard(new)
        return twin

    def step(
        self,
        name: str,
        x: Array,
        select: str,
        expected: int | None,
        request: int,
        now: float,
        reset: Array | None = None,
    ) -> Reply | Refused:
        """`x` is `(rows, 2)` or `(rows, T, 2)`; `reset` says for each row whether it begins anew."""
        session = self._judge(name, expected, request)
        if not isinstance(session, ModelSession):
            return session
        timed = x.ndim == 3
        state = session.state
        if reset is not None:
            state = np.where(reset[:, None], initial(len(state)), state)
        ran = run(state, x if timed else x[:, None])
        if ran is None:
            return Refused("InvalidInput")
        outputs, session.state = ran
        if reset is not None and reset.all():
            session.position = 0
        session.position += outputs.shape[1]
        shown = {"ALL": outputs if timed else outputs[:, 0], "LAST": outputs[:, -1], "NONE": None}[select]
        return self._changed(session, request, {} if shown is None else {"y": shown}, now)

    def reset(
        self,
        name: str,
        state: Array | None,
        rows: Sequence[int] | None,
        expected: int | None,
        request: int,
        now: float,
    ) -> Reply | Refused:
        session = self._judge(name, expected, request)
        if not isinstance(session, ModelSession):
            return session
        chosen = list(range(session.batch_size)) if rows is None else list(rows)
        values = initial(len(chosen)) if state is None else state
        session.state = session.state.copy()
        for value, row in zip(values, chosen, strict=True):
            session.state[row] = value
        if rows is None:
            session.position = 0
        return self._changed(session, request, {}, now)

    def _judge(self, name: str, expected: int | None, request: int) -> ModelSession | Reply | Refused:
        session = self.sessions.get(name)
        if session is None:
            return self.gone(name)
        again = request != 0 and request == session.request
        if expected is None:
            apply, replay = not again, again
        else:
            apply = expected == session.revision
            replay = not apply and again and expected == session.revision - 1
        if apply:
            return session
        if replay:
            return Reply(session.revision, session.position, session.outputs, replayed=True)
        return Refused("RevisionConflict")

    @staticmethod
    def _changed(session: ModelSession, request: int, outputs: Mapping[str, Array], now: float) -> Reply:
        session.revision += 1
        session.request = request
        session.outputs = outputs
        session.used = now
        return Reply(session.revision, session.position, outputs)
