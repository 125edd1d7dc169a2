"""Who loads models while a server runs, as its settings say."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import Progress
from stepwell_server.catalog.files import kept_programs, uploads
from stepwell_server.catalog.files.loading import load_on_thread
from stepwell_server.catalog.files.model_files import ModelFiles
from stepwell_server.catalog.interfaces import Compile, Compiled, Engine, Observer, Quotas
from stepwell_server.process.readiness import Readiness
from stepwell_server.reach import beyond_loopback

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.compile.host.compiler import WarmCompiler
    from stepwell_server.settings import Settings


def open_catalog(
    settings: Settings,
    engine: Engine,
    compiler: WarmCompiler,
    *,
    clock: Clock,
    observer: Observer,
    quotas: Quotas | None,
    readiness: Readiness,
) -> Catalog:
    """Wire it. Blocking for a moment.

    Raises:
        OSError: there can be no folder for uploads.
    """
    folder = settings.data_dir if settings.store == "disk" else None
    programs = None if folder is None else kept_programs.KeptPrograms(folder / kept_programs.FOLDER)
    taken = None
    if settings.allow_model_upload:
        place = (
            Path(tempfile.mkdtemp(prefix="stepwell-uploads-")) if folder is None else folder / uploads.FOLDER
        )
        taken = uploads.Uploads(place, settings.max_model_bytes, clock, is_temporary=folder is None)
    return Catalog(
        engine,
        _compiling(settings, compiler, programs),
        ModelFiles(settings.models_dir, taken, programs),
        clock=clock,
        observer=observer,
        readiness=readiness,
        quotas=quotas,
    )


def _compiling(
    settings: Settings, compiler: WarmCompiler, programs: kept_programs.KeptPrograms | None
) -> Compile:
    """Makes programs of files: of `.keras` files by processes of the compiler's, if they are not in the cache."""

    async def compile_model(
        name: str, path: Path, progress: Progress, abandoned: threading.Event
    ) -> Compiled:
        if programs is not None and programs.holds(path):
            program = await asyncio.to_thread(programs.load, path)
            if program.executor == "tensorflow":  # which a file must not be that others may have written
                return Compiled(program, "file")
        limits = dataclasses.replace(compiler.limits, abandoned=abandoned)
        return Compiled(*await load_on_thread(settings, compiler, name, path, limits, progress, keep=True))

    return compile_model


def admin_refusal(settings: Settings) -> str:
    """Why nobody may load models by a call; empty: admins may, and where nobody is asked who calls, everybody."""
    knows = settings.asks_callers or settings.tls_client_ca is not None
    if knows or not beyond_loopback(settings.listen):
        return ""
    return (
        "a server that other machines reach must know its callers (--auth-tokens, --auth-certificates or --auth-jwks) to let"
        " them change its models"
    )
