"""Creates the catalog and its compiler from the settings."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest, Progress
from stepwell_server.catalog.files import program_store, uploads
from stepwell_server.catalog.files.model_files import ModelFiles
from stepwell_server.catalog.files.programs import load_program
from stepwell_server.catalog.interfaces import Compile, CompileResult, Engine, Observer, Quotas
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.onnx import declaration
from stepwell_server.exposure import beyond_loopback
from stepwell_server.logs import Log
from stepwell_server.process.readiness import Readiness
from stepwell_server.program import Program, ProofOptions
from stepwell_server.program_file import is_program

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.compile.comparison import Comparison
    from stepwell_server.compile.host.limits import Limits
    from stepwell_server.settings import Settings

_IDLE_CHECK_INTERVAL_S = 30.0
_log = Log("app")


def compiler_of(settings: Settings, clock: Clock) -> WarmCompiler:
    """Return the compiler of a server, for its start and afterwards. Starts no process yet."""
    return WarmCompiler(settings.cache_dir, settings.imports, settings.compile_limits, clock)


async def end_idle(compiler: WarmCompiler) -> None:
    """Stop the compiler's processes when they have been idle for a while, until cancelled."""
    while True:
        await asyncio.sleep(_IDLE_CHECK_INTERVAL_S)
        if compiler.pids:
            await asyncio.to_thread(compiler.end_idle)


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
    """Create the catalog. Blocks briefly.

    Raises:
        OSError: the folder of uploads cannot be created.
    """
    folder = settings.data_dir if settings.store == "disk" else None
    programs = None if folder is None else program_store.ProgramStore(folder / program_store.FOLDER)
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
    settings: Settings, compiler: WarmCompiler, programs: program_store.ProgramStore | None
) -> Compile:
    """Return the function that compiles files: `.keras` files that are not in the cache, in the compiler's processes."""

    async def compile_model(
        request: LoadRequest, path: Path, progress: Progress, abandoned: threading.Event
    ) -> CompileResult:
        if programs is not None and programs.holds(path):
            program = await asyncio.to_thread(programs.load, path)
            if program.executor == "tensorflow":  # not allowed in a file that others may have written
                return CompileResult(program, "file")
        loop, stages = asyncio.get_running_loop(), list[str]()

        def report(stage: str) -> None:
            stages.append(stage)
            loop.call_soon_threadsafe(progress, stage)

        limits = dataclasses.replace(compiler.limits, abandoned=abandoned)
        program = await asyncio.to_thread(_compile, settings, compiler, request, path, report, limits)
        return CompileResult(program, "file" if is_program(path) else "compiled" if stages else "cache")

    return compile_model


def _compile(
    settings: Settings,
    compiler: WarmCompiler,
    request: LoadRequest,
    path: Path,
    report: Progress,
    limits: Limits,
) -> Program:
    """Return the program of a file, compiled with the settings for that name. Blocks.

    Raises:
        ModelError: it cannot be served; the message is a single line.
        OSError: the cache cannot be written.
    """
    name = request.name
    data = settings.check_with.get(name)
    try:
        program = load_program(
            path,
            compiler,
            report,
            _proof_options(settings, name, path),
            limits,
            data=data,
            keep=not request.is_before_start,  # else other weights of the model may follow
        )
        if data is not None:
            _check(name, data, compiler.compare(path, program, data, limits))
    except DataError as error:
        raise DataError(f"--check-with: {error}") from error
    except ModelError as error:
        if any(f"--{option}" in str(error) for option in declaration.FIELDS):
            raise type(error)(f"{error}. {_declared_where(path)}", error.details) from error
        raise
    return program


def _declared_where(path: Path) -> str:
    """Advice for models with declared states, whose refusals name options of `stepwell compile`."""
    stem = "model" if path.suffix == declaration.SUFFIX else path.stem
    return f"Here the option is a table of a file {stem}.toml next to the model; 'stepwell compile --inspect' shows which it needs"


def _proof_options(settings: Settings, name: str, path: Path) -> ProofOptions:
    """The options for a file of a name: those that its kind of model has."""
    if path.suffix == declaration.SUFFIX:
        return ProofOptions(trust_rows=name in settings.trust_rows)
    return ProofOptions(settings.probe_steps.get(name), name in settings.trust_causality)


def _check(name: str, data: Path, report: Comparison) -> None:
    """Refuse a program whose outputs differ from Keras on the user's own sequences."""
    for output in report.outputs:
        _log.info(f"compared with {output.reference}", model=name, data=str(data), **output.fields())
    worst = report.worst
    if worst is not None and not worst.is_allowed:
        raise ModelError(f"--check-with {data}: {worst}")
    if not report.is_conclusive:
        raise ModelError(
            f"--check-with {data}: no verdict on an output is possible, because rounding alone changes Keras's own values too much"
        )


def admin_refusal(settings: Settings) -> str:
    """Return why no call may load models; empty if admins may, or every caller where callers are not authenticated."""
    knows = settings.asks_callers or settings.tls_client_ca is not None
    if knows or not beyond_loopback(settings.listen):
        return ""
    return (
        "a server that other machines reach must authenticate callers (--auth-tokens, --auth-certificates or --auth-jwks)"
        " before they may change its models"
    )
