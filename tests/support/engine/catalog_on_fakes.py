"""A `Catalog` of a test: its engine and its compiler are fakes, its clock is the test's."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadedVersion, LoadRequest, Progress, VersionState
from stepwell_server.catalog.files.model_files import ModelFiles
from stepwell_server.catalog.files.program_store import ProgramStore
from stepwell_server.catalog.files.uploads import Uploads
from stepwell_server.catalog.interfaces import CompileResult
from stepwell_server.compile.errors import ModelError
from stepwell_server.errors import QuotaExceeded
from stepwell_server.process.readiness import Readiness
from support.clock import ManualClock
from support.engine.fake_executor import PLAIN
from support.rpc.fake_engine import FakeVersions

FAST_S = 100.0
"""A limit that only a hang can reach."""


class Compiler:
    """Compiles at once, or when it is let go."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.free.set()
        self.error: Exception | None = None
        self.running: list[str] = []
        """Files that are being compiled."""
        self.done: list[str] = []
        self.abandoned: list[threading.Event] = []

    async def __call__(
        self, request: LoadRequest, path: Path, progress: Progress, abandoned: threading.Event
    ) -> CompileResult:
        progress("load")
        self.running.append(path.name)
        self.abandoned.append(abandoned)
        while not (self.free.is_set() or abandoned.is_set()):  # noqa: ASYNC110 (a turn of the loop, no time)
            await asyncio.sleep(0)
        self.running.remove(path.name)
        if abandoned.is_set():
            raise ModelError("nobody waits for it any more")
        if self.error is not None:
            raise self.error
        self.done.append(path.name)
        return CompileResult(dataclasses.replace(PLAIN, fingerprint=f"of {path.name}"), "compiled")


class Watcher:
    """Keeps the reports of loads."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def model_loaded(self, model: str, source: str, seconds: float) -> None:
        assert seconds >= 0
        self.told.append(("loaded", model, source))

    def model_failed(self, model: str) -> None:
        self.told.append(("failed", model))

    def sessions_moved(self, model: str, policy: str, count: int) -> None:
        self.told.append(("moved", model, policy, count))


class ModelQuota:
    """A fixed quota for a tenant."""

    def __init__(self, most: int) -> None:
        self.most = most

    def require_model(self, tenant: str, has: int) -> None:
        if has >= self.most:
            raise QuotaExceeded(f"{tenant} has {has}", 1.0, quota="models", limit=str(self.most))


class _Readiness(Readiness):
    """Keeps the reports of versions."""

    def __init__(self, how: list[tuple[str, int, str]]) -> None:
        super().__init__()
        self._how = how

    def version(self, name: str, version: int, how: str) -> None:
        self._how.append((name, version, how))


class CatalogHarness:
    """Everything around a `Catalog`."""

    def __init__(
        self,
        folder: Path,
        *,
        root: Path | None = None,
        uploads: Uploads | None = None,
        kept: ProgramStore | None = None,
        quotas: Any = None,
    ) -> None:
        self.folder = folder
        self.engine, self.compiler, self.watcher = FakeVersions(), Compiler(), Watcher()
        self.clock = ManualClock()
        self.how: list[tuple[str, int, str]] = []
        """The reports to readiness."""
        self.live = Catalog(
            self.engine,
            self.compiler,
            ModelFiles(root, uploads, kept),
            clock=self.clock,
            observer=self.watcher,
            readiness=_Readiness(self.how),
            quotas=quotas,
        )

    def file(self, name: str = "m.keras") -> str:
        """The path of a file."""
        path = self.folder / name
        path.write_bytes(b"a model")
        return str(path)

    async def load(self, name: str = "m", version: int = 0, **values: Any) -> LoadedVersion:
        """Load a version of a file of its own."""
        request = {"path": self.file(), **values}
        async with asyncio.timeout(FAST_S):
            return await self.live.load(LoadRequest(name=name, version=version, **request))

    def states(self, name: str = "m") -> dict[int, VersionState]:
        """How the versions are."""
        return {status.version: status.state for status in self.live.status(name)}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(FAST_S):
            while not condition():  # noqa: ASYNC110 (a turn of the loop, no time)
                await asyncio.sleep(0)
