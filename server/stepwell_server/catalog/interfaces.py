"""The interfaces that the catalog needs: compiler, engine, quotas and metrics."""

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
    """A program and its origin: `cache`, `compiled` or `file`."""

    program: Program
    origin: str


Compile = Callable[[LoadRequest, Path, Progress, threading.Event], Awaitable[CompileResult]]
"""Compiles the file of a model; reports stages on the event loop. The event is set when the load is stopped.

Raises `ModelError`, `OSError`.
"""


class Engine(Protocol):
    """The part of the engine that the catalog uses."""

    def models(self) -> list[ModelInfo]:
        """Return the served models."""

    def catalogue(self) -> Mapping[str, Versions]:
        """Return the stored versions of all names, loaded or not."""

    def defaults_elsewhere(self) -> Mapping[str, int]:
        """Return the defaults that are not loaded here but may be on other servers that share the store."""

    def begin_with(self, name: str, version: int, program: Program) -> None:
        """Serve a version from the engine's start on."""

    def next_version(self, name: str, /) -> int:
        """Return one more than the highest version the name ever had."""

    async def require_possible(
        self, name: str, version: int, program: Program, policy: SessionPolicy, migration: str = ""
    ) -> None:
        """Check that a version could become the default in this way, before it is loaded."""

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
        """Serve a version and set its labels and the default, all or nothing. A name's first version is its default."""

    async def unload_version(self, name: str, version: int, *, force: bool = False) -> None:
        """Stop serving a version."""

    async def sessions_by_version(self, name: str, /) -> Mapping[int, int]:
        """Return the number of sessions on each version of a name, in memory or only in the store."""

    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        leaves: bool | None = None,
    ) -> DefaultMove:
        """Make a version the default; `leaves` says whether the previous one is unloaded later."""

    async def set_label(self, name: str, label: str, version: int) -> None:
        """Set a label; 0 removes it."""


class Quotas(Protocol):
    """Limits how many versions a tenant may load."""

    def require_model(self, tenant: str, has: int) -> None:
        """Raise `QuotaExceeded` if the tenant has reached its limit."""


class Observer(Protocol):
    """Counts loads and the sessions they move."""

    def model_loaded(self, model: str, source: str, seconds: float) -> None:
        """Count a loaded version; `source` is the origin of its program."""

    def model_failed(self, model: str) -> None:
        """Count a failed load."""

    def sessions_moved(self, model: str, policy: str, count: int) -> None:
        """Count the sessions in memory that moved with the default."""
