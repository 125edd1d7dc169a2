"""What sessions must do while versions come and go, in plain Python: one session at a time. Knows no engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.program import Program
from support.engine.fake_executor import PLAIN
from support.engine.versions import WIDE, weights

Array = npt.NDArray[Any]
Move = Callable[["OneSession"], None]

#: Versions by number. 3 and 6 have other tensors than the rest, and the same weights; so have 1 and 5.
PROGRAMS: Mapping[int, Program] = {
    1: PLAIN, 2: weights(2), 3: WIDE, 4: weights(4), 5: PLAIN, 6: WIDE,
}  # fmt: skip


def is_wide(version: int) -> bool:
    return PROGRAMS[version] is WIDE


def to_wide(states: dict[str, Array]) -> Mapping[str, Array]:
    """A migration to wide states from any."""
    state = states.get("sum")
    return {"wide": -states["wide"] if state is None else np.concatenate([state, -state], axis=1)}


def to_plain(states: dict[str, Array]) -> Mapping[str, Array]:
    """A migration to plain states from any."""
    state = states.get("sum")
    return {"sum": states["wide"][:, 2:] if state is None else state + np.float32(1)}


def migrated(state: Array, target: int) -> Array:
    """The state after the right migration, `(rows, 2)` or `(rows, 4)`."""
    named = {"wide" if state.shape[1] == 4 else "sum": state}
    return next(iter((to_wide if is_wide(target) else to_plain)(named).values()))


def initial(version: int, rows: int) -> Array:
    return np.repeat(PROGRAMS[version].initial[0][None], rows, axis=0)


def run(version: int, state: Array, x: Array) -> tuple[dict[str, Array], Array]:
    """Outputs of all time steps and the state after the last; `x` is `(rows, T, 2)`."""
    outputs: list[Array] = []
    weight = np.float32({2: 2, 4: 4}.get(version, 1))
    for time in range(x.shape[1]):
        before = state
        if is_wide(version):
            state = before * np.float32(0.5) + np.tile(x[:, time], 2)
            outputs.append(state + np.float32(1))
        else:
            state = before * np.float32(0.5) + x[:, time] * weight
            outputs.append(state * np.float32(2) - before)
    return {"z" if is_wide(version) else "y": np.stack(outputs, axis=1)}, state


@dataclasses.dataclass
class SentChange:
    """A change as it is sent."""

    kind: str
    """step or reset."""
    x: Array
    """`(rows, T, 2)`; of a reset, nothing."""
    select: str = "ALL"
    timed: bool = True
    request: int = 0


@dataclasses.dataclass
class OneSession:
    """A session, and what its state may be."""

    batch_size: int
    version: int
    is_pinned: bool
    states: list[Array]
    """One, but for what nobody used since a move let it begin anew: that has the initial state of a version that it has been on
    since, whichever was looked at."""
    revision: int = 0
    position: int = 0
    last: SentChange | None = None
    """Its last change, if that may be sent again."""
    outputs: list[Mapping[str, Array]] = dataclasses.field(default_factory=list)
    """What may have been answered to it."""
    is_anew: bool = False
    positions: set[int] = dataclasses.field(default_factory=set)
    """Where it is known for no one of several which it has; empty: `position`."""

    def copy(self) -> OneSession:
        return dataclasses.replace(
            self, states=list(self.states), outputs=list(self.outputs), positions=set(self.positions)
        )

    def apply(self, said: SentChange) -> None:
        """Make a change; the state may be what any of those before lead to."""
        if said.kind == "reset":
            self.states, self.outputs = [initial(self.version, self.batch_size)], [{}]
            self.position = 0
        else:
            ran = [run(self.version, state, said.x) for state in self.states]
            self.states, self.outputs = [after for _, after in ran], [_shown(y, said) for y, _ in ran]
            self.position += said.x.shape[1]
        self.revision += 1
        self.last = said if said.request else None
        self.is_anew = False

    def move(self, how: str, target: int) -> None:
        """Go to a version."""
        anew = initial(target, self.batch_size)
        if how == "reset":
            self.states, self.position, self.is_anew = [anew], 0, True
        else:
            if how == "migrate":
                self.states = [migrated(state, target) for state in self.states]
            if self.is_anew:
                self.states.append(anew)
        self.version = target

    def see(self, outputs: Mapping[str, Array], *, again: bool = False) -> None:
        """Something was answered to its last change: that leaves the states that lead to it.

        Raises:
            AssertionError: none does.
        """
        fits = [i for i, own in enumerate(self.outputs) if same(own, outputs)]
        assert fits, f"answered {outputs}, must be one of {self.outputs}"
        if not again:
            self.states = [self.states[i] for i in fits]
        self.outputs = [self.outputs[i] for i in fits]


def same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Whether tensors are the same bits."""
    return one.keys() == other.keys() and all(
        one[name].shape == other[name].shape and one[name].tobytes() == other[name].tobytes() for name in one
    )


def _shown(outputs: Mapping[str, Array], said: SentChange) -> Mapping[str, Array]:
    if said.select == "NONE":
        return {}
    return {
        name: array if said.timed and said.select == "ALL" else array[:, -1]
        for name, array in outputs.items()
    }


@dataclasses.dataclass
class ModelOfVersions:
    """The versions of one name and its sessions."""

    loaded: set[int]
    default: int
    wanted: int = 0
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    sessions: dict[str, OneSession] = dataclasses.field(default_factory=dict)
    is_shared: bool = False
    """Other servers use the store: nothing stands in for the default where it is not loaded."""
    first: dict[str, int] = dataclasses.field(default_factory=dict)
    """With which revision the next session of an id begins, where there was one before."""

    def version_of(self, ref: str) -> int | None:
        """The version that a reference names; None: no loaded one."""
        _, at, number = ref.partition("@")
        _, colon, label = ref.partition(":")
        default = self.wanted or self.default if self.is_shared else self.default
        version = int(number) if at else self.labels.get(label, 0) if colon else default
        return version if version in self.loaded else None

    def open(self, name: str, ref: str, batch_size: int) -> OneSession:
        version = self.version_of(ref)
        assert version is not None
        session = OneSession(batch_size, version, ref != "plain", [initial(version, batch_size)])
        session.revision = self.first.pop(name, 0)
        self.sessions[name] = session
        return session

    def close(self, name: str) -> None:
        self.first[name] = self.sessions.pop(name).revision + 1

    def fork(self, name: str, new: str) -> None:
        twin = self.sessions[name].copy()
        twin.last, twin.outputs = None, []
        twin.revision = max(twin.revision, self.first.pop(new, 0))
        self.sessions[new] = twin

    def load(self, version: int) -> None:
        self.loaded.add(version)
        if not self.default or self.wanted == version:
            self.default = version
        if self.wanted == version:
            self.wanted = 0

    def unload(self, version: int) -> None:
        self.loaded.remove(version)
        if not self.is_shared:
            self.labels = {label: at for label, at in self.labels.items() if at != version}
        if self.default == version:
            is_wanted = self.is_shared and not self.wanted
            self.default = max(self.loaded, default=0)
            if not self.wanted:
                self.wanted = version if is_wanted or not self.loaded else 0

    def why_not_unload(self, version: int) -> str:
        """The error of an unload without force; empty: none."""
        if version not in self.loaded:
            return "VersionNotFound"
        if (self.default == version and len(self.loaded) > 1) or self.count().get(version):
            return "ModelInUse"
        return ""

    @property
    def previous(self) -> int:
        """The default that sessions follow, loaded or not."""
        return self.wanted or self.default

    def why_not_default(self, version: int, how: str) -> str:
        """The error of a change of the default; empty: none."""
        if version not in self.loaded:
            return "VersionNotFound"
        if how == "carry" and is_wide(version) != is_wide(self.previous):
            return "SpecsDiffer"
        return ""

    def movers(self) -> Sequence[str]:
        """Sessions that go with the default."""
        return [n for n, s in self.sessions.items() if not s.is_pinned and s.version == self.previous]

    def set_default(self, version: int, how: str, *, but: Sequence[str] = ()) -> None:
        """Move the default and what goes with it, `but` those that have gone already."""
        if self.previous != version:
            if how != "keep":
                for name in self.movers():
                    if name not in but:
                        self.sessions[name].move(how, version)
            self.default, self.wanted = version, 0

    def restart(self, loaded: set[int]) -> None:
        """Begin again with these versions."""
        wanted = self.previous
        self.loaded = set(loaded)
        self.default = wanted if wanted in loaded else max(loaded)
        self.wanted = 0 if wanted in loaded else wanted

    def count(self) -> dict[int, int]:
        """Sessions by version."""
        found: dict[int, int] = {}
        for session in self.sessions.values():
            found[session.version] = found.get(session.version, 0) + 1
        return found
