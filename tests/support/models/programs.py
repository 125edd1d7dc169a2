"""Models that are saved and compiled once per test run, for all its tests and processes.

`make test` keeps those that this folder builds for its next run, as long as nothing changes of which they are made: the
compiler, the code that builds them (all of this folder), the frameworks, the processor. Whatever is tested of a program
is tested in each run. Elsewhere, as in CI and in `make soak`, each run compiles all of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepwell_server import program_file
from stepwell_server.program import Program, ProofOptions
from support import samples
from support.models import zoo
from support.run_folder import run_folder

#: Set by `make test`.
_KEEP = "TEST_KEEP_PROGRAMS"
_ROOT = Path(__file__).parents[3]
#: What programs are made with.
_SOURCES = (
    "server/stepwell_server/architecture/*.py",
    "server/stepwell_server/compile/**/*.py",
    "server/stepwell_server/engine/executors/*.py",
    "server/stepwell_server/engine/types.py",
    "server/stepwell_server/program.py",
    "server/stepwell_server/program_file.py",
    "tests/support/**/*.py",
)


class Saved(NamedTuple):
    """A saved model, and a cache that has its program: a server that is given both compiles nothing."""

    path: Path
    cache_dir: Path


def cache_dir() -> Path:
    """The cache that has the program of every model that was asked for."""
    return run_folder() / "cache"


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the test run, which `make` fills for the first process that asks; the others wait for it.

    What a fixture makes for all tests of a module is else made by each process that gets some of them.
    """
    folder, done = run_folder() / name, run_folder() / f"{name}.done"
    with _alone(run_folder() / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def cache_key(model: Path, imports: Sequence[str] = (), options: ProofOptions | None = None) -> str:
    """Under which key the cache has the program of a file."""
    from stepwell_server.compile import cache

    return cache.key_of(hashlib.sha256(model.read_bytes()).digest(), imports, options)


def program(
    name: str, build: Callable[[], Any] | None = None, options: ProofOptions | None = None, **saving: Any
) -> Program:
    """The program of a model: see `saved`."""
    from stepwell_server.compile import cache

    path = saved(name, build, options=options, **saving).path
    found = cache.load(cache.entry(cache_dir(), cache_key(path, (), options)))
    assert found is not None
    return found


def saved(
    name: str,
    build: Callable[[], Any] | None = None,
    imports: Sequence[str] = (),
    options: ProofOptions | None = None,
    kept: Path | None = None,
) -> Saved:
    """The file of the model `name` of the zoo, or of the one that `build` makes under a name of its own.

    This process compiles it: it has TensorFlow for the reference anyway. `imports` are those of the server that
    reads the cache. `kept` is the folder that keeps the model for the next run; the zoo has one. Pass
    `kept_folder()` if tests/support builds the model, and `kept_with(__file__)` if the file of the caller builds it.
    """
    from stepwell_server.compile import cache

    if build is None:
        build, kept = functools.partial(zoo.build, name), kept_folder()
    folder, programs = run_folder(), cache_dir()
    path = folder / f"{name}.keras"
    with _alone(folder / f"{name}.lock"):
        if not path.exists():
            unfinished = folder / f"{name}.unfinished.keras"
            if kept is None or not _take(kept / name, unfinished, options):
                build().save(unfinished)
                _compile(unfinished, options)
                if kept is not None:
                    _keep(unfinished, options, kept / name)
            unfinished.rename(path)
        wanted = cache.entry(programs, cache_key(path, imports, options))
        if not wanted.exists():
            _publish(cache.entry(programs, cache_key(path, (), options)), wanted)
    return Saved(path, programs)


@functools.cache
def kept_folder() -> Path | None:
    """Where programs of these sources are kept; None if none are."""
    if _KEEP not in os.environ or samples.ALL:
        return None
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(file for pattern in _SOURCES for file in _ROOT.glob(pattern)):
        digest.update(f"{file.relative_to(_ROOT)}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    folder = _ROOT / ".pytest_cache" / "programs" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def kept_with(file: str) -> Path | None:
    """The same for models that are built by a file of tests, whose text counts as well."""
    folder = kept_folder()
    if folder is None:
        return None
    folder /= hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


def _take(kept: Path, path: Path, options: ProofOptions | None) -> bool:
    """Take model and program of an earlier run; False if they are not there, or of other frameworks or another processor."""
    from stepwell_server.compile import cache

    if not (kept / "model.keras").exists():
        return False
    key = cache_key(kept / "model.keras", (), options)
    try:
        program_file.load(cache.entry(kept, key), sys.maxsize, is_own=True)
    except (OSError, program_file.ProgramFileError):
        return False
    shutil.copyfile(kept / "model.keras", path)
    cache.make(cache_dir())
    _publish(cache.entry(kept, key), cache.entry(cache_dir(), key))
    return True


def _publish(entry: Path, target: Path) -> None:
    """Make an entry of another cache, or of another name, one of this run's cache: its seal is another there."""
    from stepwell_server.compile import cache

    with cache.unfinished(target) as file:
        shutil.copyfile(entry, file)
        cache.publish(file, target)


def _keep(path: Path, options: ProofOptions | None, kept: Path) -> None:
    """Keep model and program for the next run: both or neither."""
    from stepwell_server.compile import cache

    key = cache_key(path, (), options)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=kept.parent) as folder:
        shutil.copyfile(path, Path(folder, "model.keras"))
        shutil.copyfile(cache.entry(cache_dir(), key), cache.entry(Path(folder), key))
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)


def compile_model(model: Path, **said: Any) -> Program:
    """The program of a model, compiled in this process, without a cache."""
    from stepwell_server.compile.program.pipeline import compile_traced

    return compile_traced(model, **said)[0]


def _compile(path: Path, options: ProofOptions | None) -> None:
    from stepwell_server.compile import cache

    target = cache.entry(cache_dir(), cache_key(path, (), options))
    cache.make(cache_dir())
    with cache.unfinished(target) as file:
        made = compile_model(path, options=options)
        program_file.save(made, file)
        loaded = cache.publish(file, target)
    # every later load returns the program that was made
    assert (loaded.inputs, loaded.outputs, loaded.state) == (made.inputs, made.outputs, made.state)
    assert (loaded.executor, loaded.executor_reason) == (made.executor, made.executor_reason)
    assert (loaded.fingerprint, loaded.batch_sizes) == (made.fingerprint, made.batch_sizes)
    assert (loaded.proof, loaded.files, loaded.provenance) == (made.proof, made.files, made.provenance)
    for one, two in zip(loaded.initial, made.initial, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Only one process of the run at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
