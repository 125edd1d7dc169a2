"""The snapshot of the public surface (docs/surface/) shows each change that users may notice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Copy:
    """A copy of the repository in which a test changes the code."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        # With the bytecode, which is valid for the copies too: to compile everything takes seconds. Other processes may
        # be writing some, into files that are gone a moment later.
        unfinished = shutil.ignore_patterns("*.pyc.*")
        for name in ("client", "server/stepwell_server", "scripts", "docs/surface"):
            shutil.copytree(source / name, folder / name, ignore=unfinished)

    def replace(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text, f"{name} must have {old!r}: change this test with it"
        path.write_text(text.replace(old, new, 1))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join(str(self.folder / name) for name in ("client", "server"))
        return subprocess.run(
            [sys.executable, self.folder / "scripts" / "surface.py", *arguments],
            env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": ""},
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )

    def differences(self) -> Sequence[str]:
        """What the check shows, without the names of the files."""
        done = self.run("--check")
        lines = [line for line in done.stdout.splitlines() if not line.startswith(("---", "+++"))]
        assert done.returncode == bool(lines), done.stderr
        assert ("make surface" in done.stderr) == bool(lines)
        return lines


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose snapshot is up to date, whatever is under way in the repository: `make check` looks at that."""
    made = Copy(ROOT, tmp_path_factory.mktemp("fresh"))
    done = made.run()
    assert done.returncode == 0, done.stderr
    return made.folder


@pytest.fixture
def copy(fresh: Path, tmp_path: Path) -> Copy:
    return Copy(fresh, tmp_path)


SAMPLE = '''
from __future__ import annotations

import asyncio
import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, overload

from stepwell.errors import StepwellError

if TYPE_CHECKING:
    from stepwell._hidden import Handle, Size

__all__ = ["LIMIT", "Color", "Failed", "Hooks", "Made", "Point", "Shape", "Stream", "first", "size_of"]

LIMIT = 3
Kind = Literal["big", "small"]


class Color(enum.Enum):
    RED = 1


class Failed(StepwellError, ValueError):
    """A failure."""

    def __init__(self, message: str, *, place: int) -> None:
        super().__init__(message)
        self.place = place


class Hooks(TypedDict, total=False):
    before: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    tags: list[str] = dataclasses.field(default_factory=list, kw_only=True)
    _own: int = 0


class Shape(Protocol):
    def area(self) -> float: ...


class _Base:
    __slots__ = ("width",)
    width: float

    def grow(self, by: float, /, *, kind: Kind = "big") -> Size:
        return by

    def _hidden(self) -> None: ...


class Made(_Base):
    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    @property
    def name(self) -> str:
        return ""

    @name.setter
    def name(self, value: str) -> None: ...

    @functools.cached_property
    def size(self) -> Size:
        return 1

    @classmethod
    def load(cls, path: str) -> Made:
        raise NotImplementedError

    @staticmethod
    def plain(*values: int, **more: str) -> None: ...


class Stream:
    async def read(self) -> bytes:
        return b""

    async def __aenter__(self) -> Stream:
        return self


@overload
def first(values: str) -> str: ...
@overload
def first(values: Sequence[int]) -> int: ...
def first(values: str | Sequence[int]) -> str | int:
    return values[0]


def size_of(made: Made, color: Color = Color.RED) -> Size:
    return 1
'''

HIDDEN = '''
from __future__ import annotations

Size = int | float


class Handle:
    """Nothing for users."""
'''

LINES = """\
stepwell.sample.Color.RED = 1
stepwell.sample.Color: enum
stepwell.sample.Color: is a Enum
stepwell.sample.Failed() -> None
stepwell.sample.Failed(1 message: str)
stepwell.sample.Failed(keyword place: int)
stepwell.sample.Failed.failures: attribute: Mapping[int, StepwellError]
stepwell.sample.Failed.message: attribute: str
stepwell.sample.Failed.outputs: attribute: npt.NDArray[Any] | dict[str, npt.NDArray[Any]] | None
stepwell.sample.Failed.place: attribute: int
stepwell.sample.Failed.reason: attribute: str
stepwell.sample.Failed: exception
stepwell.sample.Failed: is a ValueError
stepwell.sample.Failed: is a stepwell.StepwellError
stepwell.sample.Hooks.before: attribute: Sequence[str]
stepwell.sample.Hooks: TypedDict with optional keys
stepwell.sample.LIMIT = 3
stepwell.sample.Made.grow() -> Size
stepwell.sample.Made.grow(1 positional-only by: float)
stepwell.sample.Made.grow(keyword kind: Kind = 'big')
stepwell.sample.Made.load() classmethod -> Made
stepwell.sample.Made.load(1 path: str)
stepwell.sample.Made.name: property that can be set: str
stepwell.sample.Made.plain() staticmethod -> None
stepwell.sample.Made.plain(**more: str)
stepwell.sample.Made.plain(*values: int)
stepwell.sample.Made.size: property: Size
stepwell.sample.Made.width: attribute: float
stepwell.sample.Made: class
stepwell.sample.Made: made by the SDK alone
stepwell.sample.Point.tags: field keyword: list[str] = list()
stepwell.sample.Point.x: field 1: int
stepwell.sample.Point: frozen dataclass
stepwell.sample.Shape.area() -> float
stepwell.sample.Shape: class
stepwell.sample.Stream.__aenter__() async -> Stream
stepwell.sample.Stream.read() async -> bytes
stepwell.sample.Stream: class
stepwell.sample.first[overload 1]() -> str
stepwell.sample.first[overload 1](1 values: str)
stepwell.sample.first[overload 2]() -> int
stepwell.sample.first[overload 2](1 values: Sequence[int])
stepwell.sample.size_of() -> Size
stepwell.sample.size_of(1 made: Made)
stepwell.sample.size_of(2 color: Color = Color.RED)
type Kind = Literal['big', 'small']
type Size = int | float
"""


@pytest.mark.slow
def test_a_new_public_module_is_shown_fact_by_fact_with_the_private_types_that_it_uses(copy: Copy) -> None:
    (copy.folder / "client" / "stepwell" / "sample.py").write_text(SAMPLE)
    (copy.folder / "client" / "stepwell" / "_hidden.py").write_text(HIDDEN)
    (copy.folder / "docs" / "surface" / "stray.txt").write_text("stray\n")
    assert copy.differences() == [*(f"+{line}" for line in LINES.splitlines()), "-stray"]


@pytest.mark.slow
def test_changed_signatures_reasons_codes_fields_and_metrics_are_shown(copy: Copy) -> None:
    server = "server/stepwell_server"
    copy.replace("client/stepwell/testing.py", "def kill(self)", "def kill(self, signal: int = 9)")
    copy.replace("client/stepwell/errors.py", 'Literal["not_applied", "unknown"]', 'Literal["unknown"]')
    copy.replace(f"{server}/errors.py", 'reason = "STATE_CORRUPT"', 'reason = "STATE_BROKEN"')
    copy.replace(
        f"{server}/rpc/status.py", "ModelInUse: Code.FAILED_PRECONDITION", "ModelInUse: Code.ABORTED"
    )
    copy.replace("client/stepwell/v1/errors_pb2.py", "retry_after_ms", "retry_later_ms")
    copy.replace(f"{server}/metrics/gauges.py", '"stepwell_max_memory_bytes"', '"stepwell_memory_bytes"')
    copy.replace(f"{server}/metrics/gauges.py", 'labels=("outcome",)', 'labels=("end",)')
    copy.replace(f"{server}/metrics/gauges.py", '("max_pass_rows",', '("pass_rows_limit",')
    assert set(copy.differences()) == {
        "+reason MODEL_IN_USE: code ABORTED",
        "-reason MODEL_IN_USE: code FAILED_PRECONDITION",
        "-reason STATE_CORRUPT: StateCorruptError in the SDK",
        "-reason STATE_CORRUPT: code DATA_LOSS",
        "+reason STATE_BROKEN: StateCorruptError in the SDK",
        "+reason STATE_BROKEN: code DATA_LOSS",
        '-stepwell_errors_total{reason="STATE_CORRUPT"}',
        '+stepwell_errors_total{reason="STATE_BROKEN"}',
        "-stepwell_audit_events_total: counter(outcome)",
        '-stepwell_audit_events_total{outcome="dropped"}',
        '-stepwell_audit_events_total{outcome="written"}',
        "+stepwell_audit_events_total: counter(end)",
        '+stepwell_audit_events_total{end="dropped"}',
        '+stepwell_audit_events_total{end="written"}',
        "-stepwell_max_memory_bytes: gauge()",
        "+stepwell_memory_bytes: gauge()",
        "-stepwell_max_pass_rows: gauge(model)",
        "+stepwell_pass_rows_limit: gauge(model)",
        "-stepwell.v1.Error.retry_after_ms = 5: uint32",
        "+stepwell.v1.Error.retry_later_ms = 5: uint32",
        "+stepwell.testing.LocalServer.kill(1 signal: int = 9)",
        "-type Outcome = Literal['not_applied', 'unknown']",
        "+type Outcome = Literal['unknown']",
    }


@pytest.mark.slow
def test_what_was_written_is_up_to_date(copy: Copy) -> None:
    assert copy.differences() == []


@pytest.mark.slow
def test_a_metric_that_the_script_does_not_see_is_refused(copy: Copy) -> None:
    made = '    return gauge("stepwell_rooms", "Rooms.", 1)\n\n\n'
    copy.replace(
        "server/stepwell_server/metrics/gauges.py",
        "def of_memory(",
        f"def of_rooms() -> Metric:\n{made}def of_memory(",
    )
    done = copy.run("--check")
    assert done.returncode != 0
    assert "makes a metric that `families` in scripts/surface.py does not have" in done.stderr
