"""Fixtures of the congruence tests: one real server for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    # Imported inside, where it is used: a run of a few tests starts sooner.
    from support.servers.served import Served


def pytest_itemcollected(item: pytest.Item) -> None:
    # Keras calls NumPy in a way that NumPy 2 deprecates.
    item.add_marker(pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"))


@pytest.fixture(scope="session")
def keras() -> Any:
    """Keras, set up as the compiler uses it."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    return keras


@pytest.fixture(scope="session")
def trace_and_probe() -> Any:
    from stepwell_server.compile.probe.probe import trace_and_probe

    return trace_and_probe


@pytest.fixture(scope="module")
def lstm() -> Path:
    """The file of a small model."""
    from support.models import programs

    return programs.saved("lstm_dense").path


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One server of all models of `support.servers.served`, for all tests."""
    from support.servers.served import serve

    with serve() as running:
        yield running
