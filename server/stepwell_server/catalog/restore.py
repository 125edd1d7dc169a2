"""After a restart: versions that were loaded by calls are loaded again, before anybody is served."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell_server.catalog.catalog import LiveModels
from stepwell_server.catalog.files.folder import SUFFIXES
from stepwell_server.catalog.files.loading import unless_stopped
from stepwell_server.catalog.interfaces import Compile, Engine
from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.versions.registry import Known
from stepwell_server.errors import ServerError
from stepwell_server.logs import Log
from stepwell_server.program import FINGERPRINT_DIGITS

if TYPE_CHECKING:
    from stepwell_server.process.readiness import Readiness
    from stepwell_server.settings import Settings

_log = Log("models")


class NotRestoredError(Exception):
    """A version that was the default cannot be loaded again. The message is one line for people."""


async def restore_unless_stopped(
    settings: Settings, engine: Engine, live: LiveModels, readiness: Readiness, stop: asyncio.Event
) -> None:
    """Load what was loaded by calls before the server ended, as its settings say.

    Raises:
        NotRestoredError: a default cannot be loaded, and the settings say that the start is refused then.
        Abandoned: `stop` was set.
    """
    abandoned = threading.Event()
    work = restore(engine, live, root=settings.models_dir, tell=readiness.version, abandoned=abandoned)
    bad = await unless_stopped(work, stop, abandoned)
    if bad and settings.bad_models == "refuse":
        raise NotRestoredError(f"{'; '.join(bad.values())}; or start with --bad-models skip")


async def restore(
    engine: Engine,
    live: LiveModels,
    *,
    root: Path | None = None,
    tell: Callable[[str, int, str], None],
    abandoned: threading.Event,
) -> dict[str, str]:
    """Load what was loaded by calls before the server ended, one after the other, the defaults first.

    What cannot be loaded is remembered as failed, and its sessions stay in the store.

    Args:
        engine: knows what there was.
        live: makes programs of files, keeps those of uploads, and is told whose versions they are, and what failed.
        root: `--models`, of whose files the policy says which are loaded.
        tell: is told how far each version is, as `LiveModels` tells.
        abandoned: set, when nobody waits any more.

    Returns:
        By name, why the version that was the default is not there, or not as it was.
    """
    real_root = None if root is None else await asyncio.to_thread(root.resolve)
    bad: dict[str, str] = {}
    sources: set[str] = set()
    for name, own in sorted(engine.catalogue().items()):
        default = own.chosen
        for version, known in sorted(own.known.items(), key=lambda item: (item[0] != default, item[0])):
            sources.add(known.source)
            if version in own.loaded:
                if known.tenant:
                    live.owned_before(name, version, known.tenant)
                continue
            if not (known.is_wanted and known.source) or abandoned.is_set():
                continue
            if await asyncio.to_thread(is_of_folder, name, known, real_root):
                continue
            try:
                await _load(engine, live.compile, name, known, tell, abandoned)
                live.owned_before(name, version, known.tenant)
                tell(name, version, "loaded")
            except (ModelError, OSError, ServerError) as error:
                why = f"version {version} of model {name!r} cannot be loaded again: {error}"
                _log.error("a model cannot be loaded", model=name, version=version, reason=why)
                live.failed_before(name, version, why, known.source)
                tell(name, version, f"failed: {why}")
                if version == default:
                    bad[name] = why
    if live.kept is not None and not abandoned.is_set():
        await live.kept.drop_others(sources)
    return bad


def is_of_folder(name: str, known: Known, root: Path | None) -> bool:
    """Whether a version is one of those of `--models`, given without links: the policy says whether it is loaded.

    Another file in there, which somebody named in a call, is not. Blocking.
    """
    if root is None:
        return False
    source, folder = Path(known.source), root / name
    places = [folder / f"{known.version}{suffix}" for suffix in SUFFIXES]
    own = folder / str(known.version)
    if source in places or source.parent == own:
        return True
    if own.is_dir():
        places += own.iterdir()
    return any(os.path.realpath(place) == known.source for place in places)


async def _load(
    engine: Engine,
    compile_model: Compile,
    name: str,
    known: Known,
    tell: Callable[[str, int, str], None],
    abandoned: threading.Event,
) -> None:
    path = Path(known.source)

    def at(stage: str) -> None:
        tell(name, known.version, f"loading: {stage}")

    program = (await compile_model(name, path, at, abandoned)).program
    if program.fingerprint != known.fingerprint:
        raise ModelError(
            f"{path} must be the file that it was when it was loaded; its fingerprint is"
            f" {program.fingerprint[:FINGERPRINT_DIGITS]}, and was {known.fingerprint[:FINGERPRINT_DIGITS]}"
        )
    await engine.load_version(name, known.version, program, source=known.source, tenant=known.tenant)
    _log.info("model loaded again", model=name, version=known.version, path=known.source)
