"""A catalog around an engine of a test. It compiles nothing: the test names the program of each file."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest, Progress
from stepwell_server.catalog.files.model_files import ModelFiles
from stepwell_server.catalog.files.program_store import ProgramStore
from stepwell_server.catalog.files.uploads import Uploads
from stepwell_server.catalog.interfaces import CompileResult
from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.engine import Engine
from stepwell_server.process.readiness import Readiness
from stepwell_server.program import Program
from support.clock import ManualClock


class FakeLoads:
    """Programs by the names of files; keeps the reports of loads."""

    def __init__(self) -> None:
        self.programs: dict[str, Program] = {}
        self.told: list[tuple[Any, ...]] = []
        self.free = asyncio.Event()
        """Cleared, compiling waits until it is set, or nobody wants it any more."""
        self.free.set()

    async def compile(
        self, request: LoadRequest, path: Path, progress: Progress, abandoned: threading.Event
    ) -> CompileResult:
        """See `catalog.interfaces.Compile`."""
        progress("load")
        while not (self.free.is_set() or abandoned.is_set()):  # noqa: ASYNC110 (a turn of the loop, no time)
            await asyncio.sleep(0)
        if path.name not in self.programs:
            raise ModelError(f"{path.name}: not a .keras file")
        return CompileResult(self.programs[path.name], "compiled")

    def file(self, folder: Path, name: str, program: Program, **changes: Any) -> str:
        """The path of a file with this program and these changes."""
        path = folder / name
        path.write_bytes(b"a model")
        self.programs[name] = dataclasses.replace(program, fingerprint=f"of {name}", **changes)
        return str(path)

    def model_loaded(self, model: str, source: str, seconds: float) -> None:
        """See `catalog.interfaces.Observer`."""
        self.told.append(("loaded", model, source))

    def model_failed(self, model: str) -> None:
        """See `catalog.interfaces.Observer`."""
        self.told.append(("failed", model))

    def sessions_moved(self, model: str, policy: str, count: int) -> None:
        """See `catalog.interfaces.Observer`."""
        self.told.append(("moved", model, policy, count))


def live_models(
    engine: Engine,
    clock: ManualClock,
    loads: FakeLoads,
    *,
    root: Path | None = None,
    uploads: Uploads | None = None,
    kept: ProgramStore | None = None,
    quotas: Any = None,
) -> Catalog:
    """The catalog of an engine."""
    files = ModelFiles(root, uploads, kept)
    return Catalog(
        engine,
        loads.compile,
        files,
        clock=clock,
        observer=loads,
        readiness=Readiness(),
        quotas=quotas,
    )
