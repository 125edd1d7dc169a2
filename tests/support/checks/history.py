"""The calls of a driver and their answers: one line per call and per end, in a file.

Several processes may write the same file, each its own lives. A call's line is in the file before the call is made, and an end's line is written after the answer came. So the
numbers of the lines are a clock that never shows an answer before it was given nor a call after it was made,
and what a driver that was killed had under way are the calls without an end.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Kind = Literal["open", "step", "reset", "fork", "read", "look", "close"]
"""`read` asks for the state, `look` for revision and position alone."""
CHANGES = frozenset({"step", "reset"})
ANY = -1
"""Of a change that expects nothing of a session's revision."""
Outcome = Literal["acknowledged", "not_applied", "unknown", "gone", "error"]
"""`gone`: there is no such session; `error`: an error that nothing here can cause."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What was asked of one session. A frame is a call of each of its members."""

    kind: Kind
    session: str
    expected: int = 0
    """Of a change: the revision that it expects to find, or `ANY`."""
    request_id: int = 0
    """Of an opening: the caller that the session remembers; 0: unknown."""
    must_be_new: bool = False
    """Of an opening."""
    x: Floats | None = None
    """(rows, features) or (rows, T, features)."""
    outputs: str = "all"
    states: Mapping[str, Floats] | None = None
    """Of a reset, or of an opening; None: zeros."""
    rows: tuple[int, ...] | None = None
    """Of a reset; None: all."""
    parent: str = ""
    """Of a fork."""
    batch_size: int = 0
    """Of an opening, or of a fork."""
    is_together: bool = False
    """Of an opening, or of a fork: the same call makes others, all of them or none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """The answer."""

    outcome: Outcome
    revision: int | None = None
    """The session's, after the change, or as it was read. Also of an error that tells it: a conflict."""
    position: int | None = None
    y: Floats | None = None
    states: Mapping[str, Floats] | None = None
    found: bool = False
    """Of an opening: the session was there before, by this very request or by another."""
    error: str = ""
    """The name of its class first."""


@dataclasses.dataclass
class Op:
    """A call with its ends. A member of a frame that is sent again is answered again, so there may be several."""

    number: str
    called_at: int
    call: Call
    ends: list[tuple[int, End]] = dataclasses.field(default_factory=list)
    called_s: float = 0.0
    """By the clock of `time.monotonic`, which all processes of a machine share."""
    acknowledged_s: float = 0.0
    """0.0: it was not."""

    @property
    def acknowledged(self) -> End | None:
        """The first answer that confirms the change."""
        return next((end for _, end in self.ends if end.outcome == "acknowledged"), None)

    @property
    def may_have_happened(self) -> bool:
        """No answer reported whether it took effect."""
        return self.acknowledged is None and (not self.ends or self.ends[-1][1].outcome == "unknown")


class Log:
    """Writes a history. Of one thread, or of one event loop; lives after the first go on in the same file."""

    def __init__(self, path: Path, seed: int) -> None:
        self.life = sum(b'"life"' in line for line in path.read_bytes().splitlines()) if path.exists() else 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._calls = 0
        self._write({"life": self.life, "seed": seed})

    def call(self, call: Call) -> str:
        """Before a call is made. Returns its number."""
        self._calls += 1
        number = f"{self.life}.{os.getpid()}:{self._calls}"
        self._write({"call": number, "s": time.monotonic(), **_packed(call)})
        return number

    def end(self, number: str, end: End) -> None:
        """After its answer came."""
        self._write({"end": number, "s": time.monotonic(), **_packed(end)})

    def mark(self, name: str) -> None:
        """Something else happened, see `marks`."""
        self._write({"mark": name, "s": time.monotonic()})

    def close(self) -> None:
        """End it."""
        os.close(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        # One write, so that a kill leaves the line whole or out.
        os.write(self._file, json.dumps(line).encode() + b"\n")


def load(paths: Iterable[Path]) -> list[Op]:
    """The operations of histories, one after the other, in the order of their calls."""
    ops: list[Op] = []
    at = 0
    for path in paths:
        of: dict[str, Op] = {}
        for line in path.read_text().splitlines():
            at += 1
            found = json.loads(line)
            moment_s = found.pop("s", 0.0)
            if (number := found.pop("call", None)) is not None:
                ops.append(Op(number, at, Call(**_unpacked(found)), called_s=moment_s))
                of[number] = ops[-1]
            elif (number := found.pop("end", None)) is not None:
                op, end = of[number], End(**_unpacked(found))
                op.ends.append((at, end))
                if end.outcome == "acknowledged" and not op.acknowledged_s:
                    op.acknowledged_s = moment_s
    return ops


def marks(path: Path) -> list[tuple[int, str]]:
    """What else happened, and at which moment, by the clock of a history."""
    lines = enumerate(path.read_text().splitlines(), 1)
    return [
        (at, found["mark"]) for at, found in ((at, json.loads(line)) for at, line in lines) if "mark" in found
    ]


def live(ops: Iterable[Op]) -> dict[str, int]:
    """Sessions that are there for certain and that nobody has tried to close, with their batch sizes."""
    found: dict[str, int] = {}
    for op in ops:
        if op.call.kind in ("open", "fork") and op.acknowledged is not None:
            found[op.call.session] = op.call.batch_size
        elif op.call.kind == "close":
            found.pop(op.call.session, None)
    return found


def failures(ops: Iterable[Op]) -> list[str]:
    """What reached callers as an error, whatever it was."""
    return [
        f"{op.call.kind} {op.number} of {op.call.session!r}: {end.error}"
        for op in ops
        for _, end in op.ends
        if end.outcome != "acknowledged"
    ]


def _packed(record: Call | End) -> dict[str, Any]:
    """The fields that say something, as JSON has them."""
    fields = {
        field.name: (getattr(record, field.name), field.default) for field in dataclasses.fields(record)
    }
    return {name: _plain(value) for name, (value, default) in fields.items() if value is not default}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value, np.float32)
        return {"shape": value.shape, "float32": base64.b64encode(data.tobytes()).decode()}
    if isinstance(value, Mapping):
        return {"by_name": {name: _plain(array) for name, array in value.items()}}
    return value


def _unpacked(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in fields.items()}


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    if "by_name" in value:
        return {name: _value(array) for name, array in value["by_name"].items()}
    return np.frombuffer(base64.b64decode(value["float32"]), np.float32).reshape(value["shape"])
