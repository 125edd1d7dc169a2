"""Loads the models of a server, one after the other, on a thread: the event loop answers probes meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from stepwell_server.catalog.files.programs import load_program
from stepwell_server.catalog.files.sources import Candidates, LoadError, Source
from stepwell_server.compile import data_file
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.host.limits import Limits
from stepwell_server.logs import Log
from stepwell_server.process.readiness import LOADED
from stepwell_server.program import Program, ProofOptions
from stepwell_server.program_file import is_program

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.process.readiness import Readiness
    from stepwell_server.settings import Settings

_LOOK_FOR_IDLE_S = 30.0
_log = Log("app")
_T = TypeVar("_T")


class Observer(Protocol):
    """Is told of loads."""

    def model_loaded(self, model: str, source: str, seconds: float) -> None:
        """A version was loaded; its program came from `source`."""

    def model_failed(self, model: str) -> None:
        """A version could not be loaded."""


class Abandoned(Exception):
    """The server was stopped before its models were loaded."""


@dataclasses.dataclass
class Loaded:
    """What there is to serve, by name and version."""

    programs: dict[str, dict[int, Program]] = dataclasses.field(default_factory=dict)
    failed: dict[str, dict[int, str]] = dataclasses.field(default_factory=dict)
    """Versions that cannot be loaded, and why; only where the others are served all the same."""


def compiler_of(settings: Settings, clock: Clock) -> WarmCompiler:
    """What compiles the models of a server, at its start and while it runs. Starts no process yet."""
    memory, seconds = settings.max_compile_memory_bytes, settings.compile_timeout_s
    limits = Limits(settings.max_model_bytes, memory, seconds)
    return WarmCompiler(settings.cache_dir, settings.imports, limits, clock)


async def end_idle(compiler: WarmCompiler) -> None:
    """End the compiler's processes, again and again, when nobody has needed them for a while."""
    while True:
        await asyncio.sleep(_LOOK_FOR_IDLE_S)
        if compiler.pids:
            await asyncio.to_thread(compiler.end_idle)


async def load_models(
    settings: Settings,
    compiler: WarmCompiler,
    wanted: Sequence[Candidates],
    observer: Observer,
    readiness: Readiness,
    stop: asyncio.Event,
) -> Loaded:
    """Return the program of each version: compiled before, in the cache, or compiled now by a process of its own.

    Raises:
        LoadError: one cannot be served, and the settings say that the start is refused then; or none can.
        Abandoned: `stop` was set. No worker is left behind.
    """
    abandoned = threading.Event()
    work = asyncio.create_task(_load_all(settings, compiler, wanted, observer, readiness, abandoned))
    return await unless_stopped(work, stop, abandoned.set)


async def unless_stopped(work: asyncio.Task[_T], stop: asyncio.Event, end: Callable[[], object]) -> _T:
    """Return what some work returns, which ends soon when `end` is called, as it is when `stop` is set.

    Raises:
        Abandoned: `stop` was set. The work has ended.
    """
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if stop.is_set():
        end()
        await asyncio.gather(work, return_exceptions=True)
        raise Abandoned
    return work.result()


async def _load_all(
    settings: Settings,
    compiler: WarmCompiler,
    wanted: Sequence[Candidates],
    observer: Observer,
    readiness: Readiness,
    abandoned: threading.Event,
) -> Loaded:
    limits = dataclasses.replace(compiler.limits, abandoned=abandoned)
    for name, file in settings.check_with.items():  # All of them, before the first model takes its time.
        try:
            data_file.load(file)
        except DataError as error:
            raise LoadError(f"model {name}: --check-with: {error}") from error
    loaded, place, total = Loaded(), 0, 0
    for model in wanted:
        for version in model.choice(()):
            readiness.version(model.name, version, "waiting")
            total += 1
    for model in wanted:
        failed: dict[int, str] = {}
        while todo := [v for v in model.choice(failed) if v not in loaded.programs.get(model.name, {})]:
            place += 1
            source = model.source(todo[0])
            at = _Place(place, max(place, total), source)
            _tell(readiness, at, "")
            try:
                program = await _load(settings, compiler, observer, readiness, limits, at)
            except LoadError as error:
                if settings.bad_models == "refuse" or abandoned.is_set():
                    raise
                _log.error("a model cannot be served", model=source.told, reason=str(error))
                observer.model_failed(source.name)
                readiness.version(source.name, source.version, f"failed: {error}")
                failed[source.version] = str(error)
            else:
                readiness.version(source.name, source.version, LOADED)
                loaded.programs.setdefault(source.name, {})[source.version] = program
        if failed:
            loaded.failed[model.name] = failed
    if loaded.failed and not loaded.programs:
        reasons = [why for failed in loaded.failed.values() for why in failed.values()]
        raise LoadError(f"no model can be served; {'; '.join(reasons)}")
    return loaded


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Which of how many is being loaded."""

    number: int
    total: int
    source: Source


async def _load(
    settings: Settings,
    compiler: WarmCompiler,
    observer: Observer,
    readiness: Readiness,
    limits: Limits,
    at: _Place,
) -> Program:
    started, source = time.perf_counter(), at.source

    def report(stage: str) -> None:
        _log.info("loading model", model=source.told, stage=stage)
        _tell(readiness, at, stage)

    try:
        program, origin = await load_on_thread(
            settings, compiler, source.name, source.path, limits, report, keep=False
        )
    except ModelError as error:
        if error.details and not (limits.abandoned and limits.abandoned.is_set()):
            _log.warning("model refused", model=source.told, details=error.details)
        raise LoadError(f"model {source.told}: {error}") from error
    except OSError as error:
        raise LoadError(f"--cache-dir: {error}") from error
    seconds = time.perf_counter() - started
    observer.model_loaded(source.name, origin, seconds)
    _log.info(
        "model loaded",
        model=source.told,
        executor=program.executor,
        proof=str(program.proof),
        seconds=seconds,
    )
    if program.proof.unproven:
        _log.warning("model is trusted, not proven", model=source.told, unproven=program.proof.unproven)
    return program


def _tell(readiness: Readiness, at: _Place, stage: str) -> None:
    """Say how far the loading is."""
    source = at.source
    readiness.version(source.name, source.version, f"loading: {stage}" if stage else "loading")
    doing = f"{source.told}, {stage}" if stage else source.told
    readiness.problem("models", f"model {at.number} of {at.total} is being loaded ({doing})")


async def load_on_thread(
    settings: Settings,
    compiler: WarmCompiler,
    name: str,
    path: Path,
    limits: Limits,
    report: Callable[[str], None],
    *,
    keep: bool,
) -> tuple[Program, str]:
    """Return the program of a file as `load_file` does, and where it came from: `cache`, `compiled` or `file`.

    `report` is called on the event loop with each stage.
    """
    loop, stages = asyncio.get_running_loop(), list[str]()

    def told(stage: str) -> None:
        stages.append(stage)
        loop.call_soon_threadsafe(report, stage)

    program = await asyncio.to_thread(load_file, settings, compiler, name, path, limits, told, keep=keep)
    return program, "file" if is_program(path) else "compiled" if stages else "cache"


def load_file(
    settings: Settings,
    compiler: WarmCompiler,
    name: str,
    path: Path,
    limits: Limits,
    report: Callable[[str], None],
    *,
    keep: bool,
) -> Program:
    """Return the program of a file, as the settings want models of that name to be loaded. Blocks.

    `keep`: what comes next may be the same model with other weights; see `WarmCompiler.compile`.

    Raises:
        ModelError: it cannot be served; the message is one line for people.
        OSError: the cache cannot be written.
    """
    try:
        program = load_program(
            path,
            compiler,
            report,
            ProofOptions(settings.probe_steps.get(name), name in settings.trust_causality),
            limits,
            data=settings.check_with.get(name),
            keep=keep,
        )
        if name in settings.check_with:
            _check(settings, compiler, name, path, program, limits)
    except DataError as error:
        raise DataError(f"--check-with: {error}") from error
    return program


def _check(
    settings: Settings, compiler: WarmCompiler, name: str, path: Path, program: Program, limits: Limits
) -> None:
    """Hold a program against Keras on the user's own sequences."""
    file = settings.check_with[name]
    report = compiler.compare(path, program, file, limits)
    for output in report.outputs:
        _log.info("compared with Keras", model=name, data=str(file), **output.fields())
    worst = report.worst
    if worst is not None and not worst.is_allowed:
        raise ModelError(f"--check-with {file}: {worst}")
    if not report.is_conclusive:
        raise ModelError(
            f"--check-with {file}: nothing can be said of an output: rounding alone moves Keras's own values too far"
        )
