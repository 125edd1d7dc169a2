"""An engine of a few lines, with the face that `rpc` sees. Its one model adds its input to its state."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from stepwell_server.engine.api import Applied, ModelInfo, Opened, Predicted, SessionInfo, StateRead
from stepwell_server.engine.change import Awaited, Change
from stepwell_server.engine.types import Tensors
from stepwell_server.errors import (
    InvalidInput,
    MessageTooLarge,
    ModelNotFound,
    ServerError,
    SessionExists,
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
        path=Path("nowhere"),
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
        self.submitted: asyncio.Event = asyncio.Event()
        self.next_error: BaseException | None = None
        self._sessions: dict[str, _Session] = {}
        self._ids = map("made-{}".format, itertools.count())

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(MODEL, self.program, len(self._sessions))]

    def model(self, name: str) -> ModelInfo:
        if name != MODEL:
            raise ModelNotFound(f"no model {name!r}", model=name)
        return self.models()[0]

    async def open_session(
        self, model: str, *, session_id: str = "", batch_size: int = 1, must_be_new: bool = False, **_: Any
    ) -> Opened:
        self._raise()
        self.model(model)
        if session_id in self._sessions:
            if must_be_new:
                raise SessionExists(f"session_id {session_id!r} is taken", session_id=session_id)
            return Opened(self._sessions[session_id].info, resumed=True)
        name = session_id or next(self._ids)
        info = SessionInfo(name, MODEL, "f00d", batch_size, 0, 0, 1.5, 2.25, resident=True)
        self._sessions[name] = _Session(info, np.zeros((batch_size, FEATURES), np.float32))
        return Opened(info)

    async def close_session(self, session_id: str, **_: Any) -> bool:
        self._find(session_id)
        del self._sessions[session_id]
        return False

    def session_info(self, session_id: str) -> SessionInfo:
        return self._find(session_id).info

    async def list_sessions(
        self, *, model: str = "", prefix: str = "", after: str = "", limit: int = 1000
    ) -> tuple[list[SessionInfo], int]:
        ids = [name for name in sorted(self._sessions) if name.startswith(prefix)]
        page = [name for name in ids if name > after][:limit]
        return [self._sessions[name].info for name in page], len(ids)

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
        self.submitted.set()
        if not self.held:
            self.release()

    def release(self) -> None:
        changes, self.changes = self.changes, []
        for change in changes:
            self._run(change)

    async def apply(self, change: Change, answer: Awaited) -> Applied:
        self.submit(change)
        return await answer.get()

    def model_of(self, session_id: str) -> str:
        return self._find(session_id).info.model

    def cancelled(self) -> list[Change]:
        """Those that wait and whose caller does not."""
        first = np.zeros(1, np.intp)
        return [change for change in self.changes if len(change.replies.cancelled(first))]

    async def get_state(self, session_id: str, **_: Any) -> StateRead:
        session = self._find(session_id)
        return StateRead({"sum": session.state}, session.info)

    async def predict(self, model: str, inputs: Tensors, state: Tensors | None = None, **_: Any) -> Predicted:
        (x,) = inputs.values()
        return Predicted({"y": x}, {"sum": x[:, -1]})

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
                replayed=False,
            )

    def _step(self, session_id: str, x: Any) -> Any:
        session = self._find(session_id)
        session.state = np.zeros_like(session.state) if x is None else session.state + x
        info = session.info
        session.info = dataclasses.replace(info, revision=info.revision + 1, position=info.position + 1)
        return session.state[0]
