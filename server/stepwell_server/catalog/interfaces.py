"""What the catalog needs of the compiler, the engine, quotas and metrics."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stepwell_server.catalog.control import LoadRequest, Progress
from stepwell_server.engine.api import DefaultChange, DefaultMove, ModelInfo, SessionPolicy
from stepwell_server.engine.versions.registry import Versions
from stepwell_server.program import Program


@dataclasses.dataclass(frozen=True, slots=True)
class CompileResult:
    """A program, and where it came from: `cache`, `compiled` or `file`."""

    program: Program
    origin: str


Compile = Callable[[LoadRequest, Path, Progress, threading.Event], Awaitable[CompileResult]]
"""Makes the program of a model's file; reports stages on the event loop. When the event is set, the load was stopped.

Raises `ModelError`, `OSError`.
"""


class Engine(Protocol):
    """What is asked of the engine."""

    def models(self) -> list[ModelInfo]:
        """Those that are served."""

    def catalogue(self) -> Mapping[str, Versions]:
        """What is known of all names, loaded or not."""

    def defaults_elsewhere(self) -> Mapping[str, int]:
        """The defaults of names that are not loaded here, where other servers share the store and may have them."""

    def begin_with(self, name: str, version: int, program: Program) -> None:
        """Serve a version from the engine's start on."""

    def next_version(self, name: str, /) -> int:
        """One more than the highest that the name ever had."""

    async def require_possible(
        self, name: str, version: int, program: Program, policy: SessionPolicy, migration: str = ""
    ) -> None:
        """Judge whether a version could become the default in this way, before it is loaded."""

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
        """Serve a version, with labels and as the default: all of it, or nothing. The first of a name is its default."""

    async def unload_version(self, name: str, version: int, *, force: bool = False) -> None:
        """Serve it no longer."""

    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        leaves: bool | None = None,
    ) -> DefaultMove:
        """Make it the default; the previous one is remembered as one that `leaves`, or not."""

    async def set_label(self, name: str, label: str, version: int) -> None:
        """Give it a label; 0 takes the label away."""


class Quotas(Protocol):
    """Says how many versions a tenant may load."""

    def require_model(self, tenant: str, has: int) -> None:
        """Raises `QuotaExceeded` if it has as many as it may have."""


class Observer(Protocol):
    """Counts loads, and what they do to sessions."""

    def model_loaded(self, model: str, source: str, seconds: float) -> None:
        """A version was loaded; its program came from `source`."""

    def model_failed(self, model: str) -> None:
        """A version could not be loaded."""

    def sessions_moved(self, model: str, policy: str, count: int) -> None:
        """The default moved, and `count` sessions in memory with it."""
