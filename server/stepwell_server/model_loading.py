"""Loads the models of a server, one after the other, on a thread: the event loop answers probes meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from stepwell_server.compile import data_file
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.limits import Limits
from stepwell_server.loading import load_program
from stepwell_server.logs import Log
from stepwell_server.program import Program, ProofOptions
from stepwell_server.program_file import is_program

if TYPE_CHECKING:
    from stepwell_server.metrics.observer import PrometheusObserver
    from stepwell_server.readiness import Readiness
    from stepwell_server.settings import Settings

_log = Log("app")


class LoadError(Exception):
    """A model, or the folder of compiled ones, cannot be used. The message is one line for people."""


class Abandoned(Exception):
    """The server was stopped before its models were loaded."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What there is to serve."""

    programs: dict[str, Program]
    failed: dict[str, str]
    """Models that cannot be loaded, and why; only where the others are served all the same."""


async def load_models(
    settings: Settings, observer: PrometheusObserver, readiness: Readiness, stop: asyncio.Event
) -> Loaded:
    """Return the program of each model: compiled before, in the cache, or compiled now by a process of its own.

    Raises:
        LoadError: one cannot be served, and the settings say that the start is refused then; or none can.
        Abandoned: `stop` was set. No process is left behind.
    """
    abandoned = threading.Event()
    work = asyncio.create_task(_load_all(settings, observer, readiness, abandoned))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if stop.is_set():
        abandoned.set()
        await asyncio.gather(work, return_exceptions=True)
        raise Abandoned
    return work.result()


async def _load_all(
    settings: Settings, observer: PrometheusObserver, readiness: Readiness, abandoned: threading.Event
) -> Loaded:
    memory, seconds = settings.max_compile_memory_bytes, settings.compile_timeout_s
    limits = Limits(settings.max_model_bytes, memory, seconds, abandoned=abandoned)
    for name, file in settings.check_with.items():  # All of them, before the first model takes its time.
        try:
            data_file.load(file)
        except DataError as error:
            raise LoadError(f"model {name}: --check-with: {error}") from error
    loaded = Loaded({}, {})
    for name in settings.models:
        readiness.model(name, "waiting")
    for place, name in enumerate(settings.models, 1):
        _tell(readiness, settings, place, name, "")
        try:
            loaded.programs[name] = await _load(settings, observer, readiness, limits, place, name)
            readiness.model(name, "loaded")
        except LoadError as error:
            if settings.bad_models == "refuse" or abandoned.is_set():
                raise
            _log.error("a model cannot be served", model=name, reason=str(error))
            observer.model_failed(name)
            readiness.model(name, f"failed: {error}")
            loaded.failed[name] = str(error)
    if not loaded.programs:
        raise LoadError(f"no model can be served; {'; '.join(loaded.failed.values())}")
    return loaded


async def _load(
    settings: Settings,
    observer: PrometheusObserver,
    readiness: Readiness,
    limits: Limits,
    place: int,
    name: str,
) -> Program:
    started, stages, loop = time.perf_counter(), list[str](), asyncio.get_running_loop()

    def report(stage: str) -> None:  # on the thread that loads
        stages.append(stage)
        _log.info("loading model", model=name, stage=stage)
        loop.call_soon_threadsafe(_tell, readiness, settings, place, name, stage)

    program = await asyncio.to_thread(_load_one, settings, name, limits, report)
    seconds = time.perf_counter() - started
    path = settings.models[name]
    observer.model_loaded(name, "file" if is_program(path) else "compiled" if stages else "cache", seconds)
    _log.info(
        "model loaded", model=name, executor=program.executor, proof=str(program.proof), seconds=seconds
    )
    if program.proof.unproven:
        _log.warning("model is trusted, not proven", model=name, unproven=program.proof.unproven)
    return program


def _tell(readiness: Readiness, settings: Settings, place: int, name: str, stage: str) -> None:
    """Say how far the loading is."""
    at = f"{name}, {stage}" if stage else name
    readiness.model(name, f"loading: {stage}" if stage else "loading")
    readiness.problem("models", f"model {place} of {len(settings.models)} is being loaded ({at})")


def _load_one(settings: Settings, name: str, limits: Limits, report: Callable[[str], None]) -> Program:
    try:
        program = load_program(
            settings.models[name],
            settings.cache_dir,
            settings.imports,
            report,
            ProofOptions(settings.probe_steps.get(name), name in settings.trust_causality),
            limits,
            data=settings.check_with.get(name),
        )
        if name in settings.check_with:
            _check(settings, name, program, limits)
    except DataError as error:
        raise LoadError(f"model {name}: --check-with: {error}") from error
    except ModelError as error:
        if error.details and not (limits.abandoned and limits.abandoned.is_set()):
            _log.warning("model refused", model=name, details=error.details)
        raise LoadError(f"model {name}: {error}") from error
    except OSError as error:
        raise LoadError(f"--cache-dir: {error}") from error
    return program


def _check(settings: Settings, name: str, program: Program, limits: Limits) -> None:
    """Hold a program against Keras on the user's own sequences."""
    from stepwell_server.compile.launch import compare_with_keras

    file = settings.check_with[name]
    report = compare_with_keras(settings.models[name], program, file, settings.imports, limits)
    for output in report.outputs:
        _log.info("compared with Keras", model=name, data=str(file), **output.fields())
    worst = report.worst
    if worst is not None and not worst.is_allowed:
        raise LoadError(f"model {name}: --check-with {file}: {worst}")
    if not report.is_conclusive:
        raise LoadError(
            f"model {name}: --check-with {file}: nothing can be said of an output: rounding alone moves Keras's own values "
            "too far"
        )
