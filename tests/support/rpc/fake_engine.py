"""Engines of a few lines: with the face that `rpc` sees, and with that which whoever loads models sees."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stepwell_server.engine.api import (
    DefaultChange,
    DefaultMove,
    ModelInfo,
    SessionInfo,
    SessionPolicy,
    VersionInfo,
)
from stepwell_server.engine.change import Change, Reply
from stepwell_server.engine.types import Members
from stepwell_server.engine.versions.registry import Versions
from stepwell_server.errors import (
    InvalidInput,
    MessageTooLarge,
    ModelInUse,
    ServerError,
    SessionNotFound,
)
from stepwell_server.program import Program, StateSpec, TensorSpec

MODEL = "sum"
FEATURES = 2


def program(outputs: int = FEATURES) -> Program:
    return Program(
        fingerprint="f00d",
        inputs=(TensorSpec("x", (FEATURES,), "float32", temporal=True),),
        outputs=(TensorSpec("y", (outputs,), "float32", temporal=True),),
        state=(StateSpec("sum", (FEATURES,), "float32"),),
        initial=(np.zeros(FEATURES, np.float32),),
        executor="litert",
        executor_reason="a fake",
        batch_sizes=(),
        files={},
    )


@dataclasses.dataclass
class _Session:
    info: SessionInfo
    state: np.ndarray[Any, np.dtype[np.float32]]


class FakeEngine:
    """Its one model adds its input to its state. Answers changes at once; those sent while `held` is true when `release` is called."""

    def __init__(self, outputs: int = FEATURES) -> None:
        self.program = program(outputs)
        self.held = False
        self.changes: list[Change] = []
        self.next_error: BaseException | None = None
        self._sessions: dict[str, _Session] = {}

    def open(self, *session_ids: str) -> None:
        """There are sessions of one row."""
        for name in session_ids:
            info = SessionInfo(name, MODEL, "f00d", 1, 0, 0, 1.5, 2.25, resident=True)
            self._sessions[name] = _Session(info, np.zeros((1, FEATURES), np.float32))

    async def session_info(self, session_id: str, *, usable: bool = False) -> SessionInfo:
        return self._find(session_id).info

    def submit(self, change: Change) -> Members:
        self._raise()
        if not change.session_ids:
            raise InvalidInput("session_ids must name a session; got none")
        if change.inputs:
            rows, steps = next(iter(change.inputs.values())).shape[:2]
            change.reply_bytes += rows * steps * self.program.output_bytes[0]
        if change.reply_bytes > change.reply_limit:
            raise MessageTooLarge(f"a reply of {change.reply_bytes} bytes")
        self.changes.append(change)
        if not self.held:
            self.release()
        return np.zeros(0, np.intp)

    def release(self) -> None:
        changes, self.changes = self.changes, []
        for change in changes:
            self._run(change)

    def cancelled(self) -> list[Change]:
        """Those that wait and whose caller does not."""
        first = np.zeros(1, np.intp)
        return [change for change in self.changes if len(change.replies.cancelled(first))]

    def _raise(self) -> None:
        if self.next_error is not None:
            error, self.next_error = self.next_error, None
            raise error

    def _find(self, session_id: str) -> _Session:
        if session_id not in self._sessions:
            raise SessionNotFound(session_id, f"no session {session_id!r}")
        return self._sessions[session_id]

    def _run(self, change: Change) -> None:
        members: list[int] = []
        outputs: list[Any] = []
        rows = iter(np.concatenate([*change.inputs.values()])) if change.inputs else itertools.repeat(None)
        for index, session_id in enumerate(change.session_ids):
            x = next(rows)
            try:
                outputs.append(self._step(session_id, x))
                members.append(index)
            except ServerError as error:
                change.replies.failed(np.array([index]), error)
        if members:
            infos = [self._sessions[change.session_ids[index]].info for index in members]
            change.replies.applied(
                np.array(members, np.intp),
                Reply(
                    np.array([info.revision for info in infos], np.uint64),
                    np.array([info.position for info in infos], np.uint64),
                    {"y": np.array(outputs, np.float32)} if change.inputs else {},
                    {},
                    version=1,
                ),
            )

    def _step(self, session_id: str, x: Any) -> Any:
        session = self._find(session_id)
        session.state = np.zeros_like(session.state) if x is None else session.state + x
        info = session.info
        session.info = dataclasses.replace(info, revision=info.revision + 1, position=info.position + 1)
        return session.state[0]


class FakeVersions:
    """An engine that has versions and no sessions but those that a test gives it."""

    def __init__(self) -> None:
        self.names: dict[str, dict[int, VersionInfo]] = {}
        self.highest: dict[str, int] = {}
        self.refusal: ServerError | MemoryError | None = None
        """The error of the next change of a default or of a label."""
        self.move_refusal: ServerError | None = None
        """With what moves of a default are judged impossible before a load."""
        self.told: list[tuple[Any, ...]] = []
        self.in_store: dict[int, int] = {}
        """By version, how many sessions are in the store alone."""

    def models(self) -> list[ModelInfo]:
        return [
            ModelInfo(name, program(), 0, 1, [found[version] for version in sorted(found)])
            for name, found in sorted(self.names.items())
            if found
        ]

    def catalogue(self) -> dict[str, Versions]:
        return {}

    def defaults_elsewhere(self) -> dict[str, int]:
        return {}

    def next_version(self, name: str) -> int:
        return self.highest.get(name, 0) + 1

    def give(self, name: str, version: int, **values: Any) -> None:
        """Change the description of a version."""
        self.names[name][version] = dataclasses.replace(self.names[name][version], **values)

    def begin_with(self, name: str, version: int, program: Program) -> None:
        self.told.append(("begin", name, version))
        info = VersionInfo(version, program.fingerprint, True, (), 0, "", 5.0, is_draining=False)
        self.names.setdefault(name, {})[version] = info

    async def load_version(
        self,
        name: str,
        version: int,
        program: Program,
        *,
        source: str = "",
        tenant: str = "",
        labels: Sequence[str] = (),
        becomes: DefaultChange | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> DefaultMove:
        begin()
        self._refuse()
        self.told.append(("load", name, version, source, tenant))
        found, moved = self.names.setdefault(name, {}), DefaultMove(0, 0)
        found[version] = VersionInfo(
            version, program.fingerprint, not found, (), 0, source, 5.0, is_draining=False
        )
        self.highest[name] = max(version, self.highest.get(name, 0))
        if becomes is not None:
            moved = await self.set_default(
                name, version, becomes.policy, becomes.migration, leaves=becomes.leaves
            )
        for label in labels:
            await self.set_label(name, label, version)
        return moved

    async def require_possible(
        self, name: str, version: int, program: Program, policy: SessionPolicy, migration: str = ""
    ) -> None:
        if self.move_refusal is not None:
            raise self.move_refusal

    async def unload_version(self, name: str, version: int, *, force: bool = False) -> None:
        self.told.append(("unload", name, version, force))
        info = self.names[name][version]
        if not force and (info.is_default or info.sessions):
            raise ModelInUse("it is the default, or has sessions")
        del self.names[name][version]

    async def sessions_by_version(self, name: str) -> dict[int, int]:
        resident = {version: info.sessions for version, info in self.names[name].items()}
        return Counter(resident) + Counter(self.in_store)

    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        leaves: bool | None = None,
    ) -> DefaultMove:
        self.told.append(("default", name, version, policy, migration))
        self._refuse()
        previous = next(info.version for info in self.names[name].values() if info.is_default)
        self.give(name, previous, is_default=False, is_draining=bool(leaves))
        self.give(name, version, is_default=True, is_draining=False)
        return DefaultMove(previous, 3)

    async def set_label(self, name: str, label: str, version: int) -> None:
        self.told.append(("label", name, label, version))
        self._refuse()
        for number, info in self.names[name].items():
            labels = {*info.labels} - {label} | ({label} if number == version else set())
            self.give(name, number, labels=tuple(sorted(labels)))

    def _refuse(self) -> None:
        if self.refusal is not None:
            error, self.refusal = self.refusal, None
            raise error
