"""An engine of a few lines, with the face that `rpc` sees. Its one model adds its input to its state."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from stepwell_server.engine.api import SessionInfo
from stepwell_server.engine.change import Change
from stepwell_server.errors import (
    InvalidInput,
    MessageTooLarge,
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
    """Answers changes at once; those sent while `held` is true when `release` is called."""

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

    def submit(self, change: Change) -> None:
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
                np.array([info.revision for info in infos], np.uint64),
                np.array([info.position for info in infos], np.uint64),
                {"y": np.array(outputs, np.float32)} if change.inputs else {},
                {},
                replayed=False,
                version=1,
            )

    def _step(self, session_id: str, x: Any) -> Any:
        session = self._find(session_id)
        session.state = np.zeros_like(session.state) if x is None else session.state + x
        info = session.info
        session.info = dataclasses.replace(info, revision=info.revision + 1, position=info.position + 1)
        return session.state[0]
