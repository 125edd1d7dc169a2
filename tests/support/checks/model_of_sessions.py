"""What sessions must do, in plain Python: one session at a time, one row at a time. Knows no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from support.engine.fake_executor import BAD, PLAIN, advance

Array = npt.NDArray[Any]


@dataclasses.dataclass
class Reply:
    """The answer to a change."""

    revision: int
    position: int
    outputs: Mapping[str, Array]
    replayed: bool = False
    states: Mapping[str, Array] = dataclasses.field(default_factory=dict)


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
    said: object = None
    """The answer to the last change, which a call with its request id gets again."""
    outputs: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    states: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    """Of the reply to its last change."""
    max_idle_s: float = np.inf


def initial(batch_size: int) -> Array:
    return np.stack([PLAIN.initial[0]] * batch_size)


def run(state: Array, x: Array) -> tuple[Array, Array] | None:
    """Outputs `(rows, T, 2)` and the state after T steps; None if the program refuses a row of them."""
    if np.any(x[..., 0] == BAD):
        return None
    outputs, states = traced(state, x)
    return outputs, states[:, -1]


def traced(state: Array, x: Array, reset: Array | None = None) -> tuple[Array, Array]:
    """Outputs and the state after every time step, `(rows, T, 2)` each.

    `reset`: which rows begin anew before each of the first time steps, `(rows, up to T)`.
    """
    outputs, states = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    for row in range(len(state)):
        one = state[row : row + 1]
        for time in range(x.shape[1]):
            if reset is not None and time < reset.shape[1] and reset[row, time]:
                one = initial(1)
            (y,), (one,) = advance([x[row : row + 1, time]], [one])
            outputs[row, time], states[row, time] = y[0], one[0]
    return outputs, states


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
        self.closes: dict[str, tuple[int, ...]] = {}
        """Request ids of the last four calls that closed a session of an id."""
        self._max_idle_s = max_idle_s

    def open(self, name: str, batch_size: int, state: Array | None, now: float, max_idle_s: float = 0) -> str:
        """`opened` or `resumed`; `max_idle_s` 0: it has no limit of its own."""
        found = self.sessions.get(name)
        if found is not None:
            found.used = now
            return "resumed"
        start = initial(batch_size) if state is None else state.copy()
        self.sessions[name] = ModelSession(
            batch_size, start, now, self.first.pop(name, 0), max_idle_s=self._limit(max_idle_s)
        )
        self.expired.discard(name)
        return "opened"

    def expire(self, now: float) -> None:
        for name in [n for n, s in self.sessions.items() if s.used < now - s.max_idle_s]:
            self.first[name] = self.sessions.pop(name).revision + 1
            self.expired.add(name)

    def _limit(self, own_s: float) -> float:
        return min(own_s or np.inf, self._max_idle_s or np.inf)

    def gone(self, name: str) -> Refused:
        return Refused("SessionExpired" if name in self.expired else "SessionNotFound")

    def close(self, name: str, request: int = 0) -> bool | Refused:
        """Whether this very request closed a session of the id before."""
        closes = self.closes.get(name, ())
        if request in closes:
            return True
        closed = self.sessions.pop(name, None)
        if closed is None:
            return self.gone(name)
        self.first[name] = closed.revision + 1
        if request:
            self.closes[name] = (request, *closes)[:4]
        return False

    def fork(self, name: str, new: str, now: float) -> ModelSession | Refused:
        if new in self.sessions:
            return Refused("SessionExists")
        source = self.sessions.get(name)
        if source is None:
            return self.gone(name)
        source.used = now
        twin = dataclasses.replace(
            source,
            state=source.state.copy(),
            request=0,
            outputs={},
            states={},
            used=now,
            max_idle_s=self._limit(0),
        )
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
        *,
        rows: Sequence[int] | None = None,
        states: str = "NONE",
        state_rows: Sequence[int] | None = None,
    ) -> Reply | Refused:
        """`x` is `(rows, 2)` or `(rows, T, 2)`.

        Args:
            name: Of the session.
            x: Inputs.
            select: Which outputs come back.
            expected: The revision.
            request: Its id.
            now: The time.
            reset: Which rows begin anew, `(rows, up to T)`.
            rows: Those that advance.
            states: Which states come back.
            state_rows: Those rows whose.
        """
        marks = None if reset is None else reset.tobytes()
        said = ("step", x.shape, x.tobytes(), select, marks, rows, states, state_rows)
        session = self._judge(name, expected, request, said)
        if not isinstance(session, ModelSession):
            return session
        chosen = list(range(session.batch_size)) if rows is None else list(rows)
        timed = x.ndim == 3
        series = x if timed else x[:, None]
        if np.any(series[..., 0] == BAD):
            return Refused("InvalidInput")
        outputs, after = traced(session.state[chosen], series, reset)
        session.state = session.state.copy()
        session.state[chosen] = after[:, -1]
        for time in range(series.shape[1]):
            anew = reset is not None and time < reset.shape[1] and reset[:, time].all()
            if anew and len(chosen) == session.batch_size:
                session.position = 0
            session.position += 1
        after = after if state_rows is None else after[[chosen.index(row) for row in state_rows]]

        def shown(name: str, array: Array, which: str) -> dict[str, Array]:
            if which == "NONE" or not len(array):
                return {}
            return {name: array if timed and which == "ALL" else array[:, -1]}

        shown_states = shown("sum", after, states)
        return self._changed(session, request, said, shown("y", outputs, select), now, shown_states)

    def reset(
        self,
        name: str,
        state: Array | None,
        rows: Sequence[int] | None,
        expected: int | None,
        request: int,
        now: float,
    ) -> Reply | Refused:
        said = ("reset", None if state is None else state.tobytes(), rows)
        session = self._judge(name, expected, request, said)
        if not isinstance(session, ModelSession):
            return session
        chosen = list(range(session.batch_size)) if rows is None else list(rows)
        values = initial(len(chosen)) if state is None else state
        session.state = session.state.copy()
        for value, row in zip(values, chosen, strict=True):
            session.state[row] = value
        if rows is None:
            session.position = 0
        return self._changed(session, request, said, {}, now)

    def _judge(
        self, name: str, expected: int | None, request: int, said: object
    ) -> ModelSession | Reply | Refused:
        session = self.sessions.get(name)
        if session is None:
            return self.gone(name)
        again = request != 0 and request == session.request
        if expected is None:
            apply, replay = not again, again
        else:
            apply = expected == session.revision
            replay = not apply and again and expected == session.revision - 1
        if again and (apply or replay) and said != session.said:
            return Refused("InvalidInput")
        if apply:
            return session
        if replay:
            return Reply(
                session.revision, session.position, session.outputs, replayed=True, states=session.states
            )
        return Refused("RevisionConflict")

    @staticmethod
    def _changed(
        session: ModelSession,
        request: int,
        said: object,
        outputs: Mapping[str, Array],
        now: float,
        states: Mapping[str, Array] = MappingProxyType({}),
    ) -> Reply:
        session.revision += 1
        session.request, session.said = request, said
        session.outputs, session.states = outputs, states
        session.used = now
        return Reply(session.revision, session.position, outputs, states=states)
