"""Fixtures of the packaging tests: the repository, what is built from it, a served model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    # Imported inside, where it is used: a run of a few tests starts sooner.
    from stepwell.testing import LocalServer

ROOT = Path(__file__).resolve().parents[2]
Build = Callable[[str, Path], Path]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Builds one distribution with the hatchling of this environment, so without a network."""

    def build_one(kind: str, source: Path) -> Path:
        target = tmp_path_factory.mktemp(kind)
        command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(target)]
        subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=200)
        (built,) = target.iterdir()
        return built

    return build_one


@pytest.fixture(scope="session")
def wheel(build: Build, root: Path) -> Path:
    """The wheel, built from the tree."""
    from support.models import programs

    folder = programs.once("wheel", lambda target: shutil.copy2(build("wheel", root), target))
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The model of the examples: three features in, one forecast out at each time step."""
    from support.models import programs

    return programs.saved("forecast", _forecast, kept=programs.kept_with(__file__)).path


def _forecast() -> Any:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    layers = [keras.Input((None, 3)), keras.layers.LSTM(8, return_sequences=True), keras.layers.Dense(1)]
    return keras.Sequential(layers)


@pytest.fixture(scope="session")
def compiled() -> Path:
    """A cache of compiled models for all servers of these tests."""
    from support.models import programs

    return programs.cache_dir()


@pytest.fixture(scope="session")
def server(model_path: Path, compiled: Path) -> Iterator[LocalServer]:
    """A server of the model `forecast`."""
    from stepwell.testing import LocalServer

    with LocalServer(models={"forecast": model_path}, cache_dir=compiled, start_timeout_s=100) as running:
        yield running
