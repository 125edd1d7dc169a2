"""What the sessions of a mixture of calls have answered, and the replay that judges it.

`Predict` runs without sessions and without compiled steps: it replays the changes of each session in the order of their
revisions. Each output and each state must have the same bits, and each revision must come from one change.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stepwell.v1 import models_pb2, tensors_pb2
from stepwell.v1 import sessions_pb2 as pb
from support.peers import wire
from support.peers.wire import Array, tensors
from support.servers import served

ROWS_PER_REPLAY = 256
CARRIED = "seq"
"""The model whose sessions move between its versions."""
Values = Mapping[str, Array]
Place = tuple[str, int]
"""A session id and a revision."""


class Wrong(Exception):
    """An answer that no rule of the protocol allows."""


@dataclasses.dataclass
class Change:
    """A step or a reset of a session, and its answer."""

    inputs: Values | None
    """None: a reset."""
    steps: int = 0
    """0: without a time axis."""
    state: Values | None = None
    """Of a reset; None: the initial one."""
    mask: Sequence[bool] = ()
    select: pb.OutputSelection.ValueType = pb.OUTPUT_SELECTION_UNSPECIFIED
    names: Sequence[str] = ()
    outputs: Values = dataclasses.field(default_factory=dict)
    states: Values | None = None
    """The state after it, if the answer has it."""
    version: int = 0
    """That ran it; 0: it may be either."""
    position: int = 0


@dataclasses.dataclass
class Session:
    """A session id, and the answers of all its sessions. Revisions of an id never repeat."""

    session_id: str
    model: str
    batch_size: int
    is_exclusive: bool
    """One call at a time: calls may be cancelled then, because the order of the changes is known."""
    is_taken: bool = False
    """Of an exclusive one: a task uses it."""
    may_expire: bool = False
    begins: dict[int, Values | Place | None] = dataclasses.field(default_factory=dict)
    """States by the revision at which a session began: given, that of another session, or the initial one."""
    positions: dict[int, int] = dataclasses.field(default_factory=dict)
    changes: dict[int, Change] = dataclasses.field(default_factory=dict)
    reads: dict[int, Values] = dataclasses.field(default_factory=dict)
    revision: int = 0
    """The latest one known."""
    is_open: bool = False
    last: tuple[Any, pb.StepResponse] | None = None
    """Of an exclusive session: the last request and its answer."""

    def applied(self, revision: int, change: Change) -> None:
        """Record the change that made a revision."""
        if revision in self.changes:
            raise Wrong(f"{self.session_id}: revision {revision} came from two changes")
        self.changes[revision] = change
        self.revision = max(self.revision, revision)

    def read(self, revision: int, state: Values) -> None:
        """Record a state that was read."""
        before = self.reads.setdefault(revision, state)
        if any(before[name].tobytes() != array.tobytes() for name, array in state.items()):
            raise Wrong(f"{self.session_id}: two reads of revision {revision} differ")

    def ended(self) -> None:
        """Record that it was closed, or has expired."""
        self.is_open, self.last = False, None


@dataclasses.dataclass(frozen=True)
class Model:
    """The inputs of a model, and the names of its outputs."""

    name: str
    inputs: Sequence[tensors_pb2.TensorSpec]
    outputs: Sequence[tensors_pb2.TensorSpec]
    state: Sequence[tensors_pb2.TensorSpec]

    def draw(self, rng: np.random.Generator, rows: int, steps: int) -> dict[str, Array]:
        """Random inputs."""
        drawn = {}
        for spec in self.inputs:
            temporal = spec.temporal and steps
            shape = (rows, *((steps,) if temporal else ()), *spec.shape)
            dtype = wire.dtype_of_number(spec.dtype)
            is_index = dtype.kind in "iub"
            values = rng.integers(0, served.VOCABULARY, shape) if is_index else rng.standard_normal(shape)
            drawn[spec.name] = values.astype(dtype)
        return drawn

    def draw_state(self, rng: np.random.Generator, rows: int) -> dict[str, Array]:
        """A random state."""
        return {
            spec.name: np.tanh(rng.standard_normal((rows, *spec.shape))).astype(
                wire.dtype_of_number(spec.dtype)
            )
            for spec in self.state
        }


class Replay:
    """Replays the changes of all sessions, each as soon as the state before it is known."""

    def __init__(
        self,
        sessions: Sequence[Session],
        models: Mapping[str, Model],
        predict: Callable[[models_pb2.PredictRequest], Awaitable[models_pb2.PredictResponse]],
        initial: Callable[[str, int], Awaitable[Values]],
    ) -> None:
        """`initial` returns the initial state of a model for some rows."""
        self._models, self._predict, self._initial = models, predict, initial
        self.wrong: list[str] = []
        self.replayed = self.checked_reads = 0
        self._of = {one.session_id: one for one in sessions}
        self._known: dict[Place, tuple[Values, int]] = {}
        """States and positions."""
        self._left = {(one.session_id, revision) for one in sessions for revision in one.changes}
        self._ready: list[Place] = []
        self._children: dict[Place, list[Place]] = collections.defaultdict(list)
        self._differing: set[str] = set()

    async def run(self) -> None:
        """Replay; `wrong` then has the differences."""
        begun: list[tuple[Place, Values | None]] = []
        for one in self._of.values():
            for revision, state in one.begins.items():
                place = (one.session_id, revision)
                if isinstance(state, tuple):
                    self._children[state].append(place)
                else:
                    begun.append((place, state))
        for place, state in begun:
            one = self._of[place[0]]
            known = state or await self._initial(one.model, one.batch_size)
            self._reached(place, known, one.positions[place[1]])
        while self._ready:
            now, self._ready = self._ready, []
            await self._replay(now)
        self.replayed = len(self._known)
        if self._left:
            shown = sorted(self._left)[:10]
            self.wrong.append(f"{len(self._left)} changes follow revisions that nobody made: {shown}")

    def _reached(self, place: Place, state: Values, position: int) -> None:
        self._known[place] = (state, position)
        session = self._of[place[0]]
        read = session.reads.get(place[1])
        if read is not None:
            self.checked_reads += 1
            self._require_same(place, "the state", read, state)
        after = (place[0], place[1] + 1)
        if after in self._left and after[1] not in session.begins:
            self._ready.append(after)
        for child in self._children[place]:
            self._reached(child, state, position)

    async def _replay(self, places: Sequence[Place]) -> None:
        groups: dict[tuple[str, int, int], list[Place]] = collections.defaultdict(list)
        for place in places:
            self._left.discard(place)
            session = self._of[place[0]]
            change = session.changes[place[1]]
            if change.inputs is None:
                state = change.state or await self._initial(session.model, session.batch_size)
                self._reached(place, state, change.position)
                continue
            if not change.version:
                change.version = await self._version_of(place, change)
            groups[session.model, change.version, change.steps].append(place)
        for (model, version, steps), found in groups.items():
            for low in range(0, len(found), ROWS_PER_REPLAY):
                await self._replay_together(model, version, steps, found[low : low + ROWS_PER_REPLAY])

    async def _replay_together(self, model: str, version: int, steps: int, places: Sequence[Place]) -> None:
        """Replay steps of one form by one call."""
        sessions = [self._of[session_id] for session_id, _ in places]
        changes = [one.changes[place[1]] for one, place in zip(sessions, places, strict=True)]
        before = [self._known[session_id, revision - 1] for session_id, revision in places]
        sizes = [one.batch_size for one in sessions]
        masks = [one.mask or [False] * size for one, size in zip(changes, sizes, strict=True)]
        request = models_pb2.PredictRequest(
            model=f"{model}@{version}",
            inputs=tensors(_joined([one.inputs for one in changes if one.inputs])),
            state=tensors(_joined([state for state, _ in before])),
            reset_mask=[reset for mask in masks for reset in mask],
        )
        answer = await self._predict(request)
        outputs, after = wire.arrays(answer.outputs), wire.arrays(answer.state)
        low = 0
        for place, change, (_, started), size in zip(places, changes, before, sizes, strict=True):
            rows = slice(low, low + size)
            low += size
            own = self._selected(model, change, {name: array[rows] for name, array in outputs.items()})
            self._require_same(place, f"the outputs of {model}@{version}", change.outputs, own)
            state = {name: array[rows] for name, array in after.items()}
            if change.states is not None:
                self._require_same(place, "the returned state", change.states, state)
            expected = (0 if change.mask and all(change.mask) else started) + max(1, steps)
            if change.position != expected:
                self.wrong.append(f"{place}: its position is {change.position} instead of {expected}")
            self._reached(place, state, change.position)

    def _selected(self, model: str, change: Change, outputs: Values) -> Values:
        """The outputs that the step asked for."""
        if change.select == pb.OUTPUT_SELECTION_NONE:
            return {}
        if change.select == pb.OUTPUT_SELECTION_LAST and change.steps:
            temporal = {spec.name: spec.temporal for spec in self._models[model].outputs}
            outputs = {name: array[:, -1] if temporal[name] else array for name, array in outputs.items()}
        return {name: outputs[name] for name in change.names} if change.names else outputs

    async def _version_of(self, place: Place, change: Change) -> int:
        """The version that gives a step its outputs: the answer to a retry does not have it."""
        assert change.inputs is not None
        state, _ = self._known[place[0], place[1] - 1]
        for version in (1, 2):
            request = models_pb2.PredictRequest(
                model=f"{CARRIED}@{version}",
                inputs=tensors(change.inputs),
                state=tensors(state),
                reset_mask=change.mask,
            )
            answer = await self._predict(request)
            if wire.data(answer.outputs) == wire.data(tensors(change.outputs)):
                return version
        self.wrong.append(f"{place}: no version gives these outputs")
        return 1

    def _require_same(self, place: Place, what: str, found: Values, expected: Values) -> None:
        """Compare bits. Only the first difference of a session counts: others follow from it."""
        both = [
            {name: (array.shape, array.tobytes()) for name, array in values.items()}
            for values in (found, expected)
        ]
        if both[0] == both[1] or place[0] in self._differing:
            return
        self._differing.add(place[0])
        session = self._of[place[0]]
        near = {
            revision: dataclasses.replace(change, inputs=None, outputs={}, state=None, states=None)
            for revision, change in sorted(session.changes.items())
            if abs(revision - place[1]) < 4
        }
        shapes = [{name: array.shape for name, array in values.items()} for values in (found, expected)]
        self.wrong.append(
            f"{place}: {what} differ: {shapes}; batch size {session.batch_size}, is_exclusive"
            f" {session.is_exclusive}, begins {list(session.begins)}, changes {near}"
        )


def _joined(values: Sequence[Values]) -> dict[str, Array]:
    return {name: np.concatenate([one[name] for one in values]) for name in values[0]}
