"""Models that are saved and compiled once per test run, whichever tests and processes of it ask for them."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepwell_server.program import Program

#: Names the run's folder to the processes among which pytest-xdist divides the tests.
_FOLDER = "TEST_RUN_FOLDER"


class Saved(NamedTuple):
    """A saved model, and a cache that has its program: a server that is given both compiles nothing."""

    path: Path
    cache_dir: Path


@functools.cache
def run_folder() -> Path:
    """The folder of this test run. Who asks first makes it, and removes it in the end."""
    if _FOLDER not in os.environ:
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="stepwell-tests-")
        atexit.register(shutil.rmtree, os.environ[_FOLDER], ignore_errors=True)
    return Path(os.environ[_FOLDER])


def cache_dir() -> Path:
    """The cache that has the program of every model that was asked for."""
    return run_folder() / "cache"


@functools.cache
def zoo(name: str) -> Saved:
    """A model of the zoo."""
    from support import models

    return saved(name, lambda: models.build(name))


def program_of(saved: Saved, imports: Sequence[str] = ()) -> Program:
    """The program of a saved model."""
    from stepwell_server.compile import cache

    return Program.load(saved.cache_dir / cache.cache_key(saved.path, imports))


def saved(name: str, build: Callable[[], Any], imports: Sequence[str] = ()) -> Saved:
    """The model that `build` makes, under a name that no other model has.

    It is compiled in this process, which has TensorFlow for the reference anyway. `imports` are those of the
    server that will look for it in the cache.
    """
    from stepwell_server.compile import cache

    folder, kept = run_folder(), cache_dir()
    path = folder / f"{name}.keras"
    with _alone(folder / f"{name}.lock"):
        if not path.exists():
            unfinished = folder / f"{name}.unfinished.keras"
            build().save(unfinished)
            _compile(unfinished)
            unfinished.rename(path)
        wanted = kept / cache.cache_key(path, imports)
        if not wanted.exists():
            with cache.workspace(kept, wanted.name) as workspace:
                made = kept / cache.cache_key(path, ())
                others = shutil.ignore_patterns("digests.json")  # publishing writes it
                shutil.copytree(made, workspace, ignore=others, dirs_exist_ok=True)
                cache.publish(workspace, wanted)
    return Saved(path, kept)


def _compile(path: Path) -> None:
    from stepwell_server.compile import cache
    from stepwell_server.compile.pipeline import compile_model

    key = cache.cache_key(path, ())
    with cache.workspace(cache_dir(), key) as workspace:
        made = compile_model(path, workspace)
        loaded = cache.publish(workspace, cache_dir() / key)
    # what is loaded from now on, by whomever, is what was made
    assert (loaded.inputs, loaded.outputs, loaded.state) == (made.inputs, made.outputs, made.state)
    assert (loaded.executor, loaded.executor_reason) == (made.executor, made.executor_reason)
    assert (loaded.fingerprint, loaded.batch_sizes) == (made.fingerprint, made.batch_sizes)
    assert loaded.proof == made.proof
    for one, two in zip(loaded.initial, made.initial, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Only one process of the run at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
