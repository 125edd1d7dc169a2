"""The engine's tests run with each kind of store: what it does must not depend on where sessions are kept."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

if TYPE_CHECKING:
    # Imported inside, where it is used: a run of a few tests starts sooner.
    from support.engine.harness import Harness
    from support.engine.two_engines import Times
    from support.stores.durable import Disk, DurableStore

_RESERVE_BYTES = 64 * 1024
KINDS = ("memory", "async", "sync", "fake_shared", "valkey")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "stores(*kinds): the kinds of store that a test of the engine is about"
    )
    config.addinivalue_line(
        "markers", "engine(*args, **options): the arguments of `running`, for `at`, or `two`"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("stores")
    name = metafunc.module.__name__.rpartition(".")[2]
    if marker is not None or name.startswith("test_engine_"):
        kinds = marker.args if marker is not None else KINDS
        metafunc.parametrize("store_kind", kinds, indirect=True)


@pytest.fixture(autouse=True)
def store_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kind of the stores that `support.engine.harness.running` makes."""
    from stepwell_server.store.disk import reserve
    from stepwell_server.store.disk.wal import writers
    from support.engine.harness import STORES
    from support.run_folder import memory_folder
    from support.stores.gated_valkey import clocked

    STORES.kind = getattr(request, "param", "memory")
    if STORES.kind == "memory":
        yield STORES.kind
        return
    with contextlib.ExitStack() as stack:
        if STORES.kind == "sync_python":
            STORES.kind = "sync"
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(writers, "NATIVE", None)
        if STORES.kind == "valkey":
            stack.enter_context(clocked(STORES.server()))
        # the system would clear all of it for each of thousands of stores
        stack.enter_context(mock.patch.object(reserve, "RESERVE_BYTES", _RESERVE_BYTES))
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=memory_folder()))
        STORES.folder = Path(folder)
        yield STORES.kind
    STORES.kind = "memory"


def made_with(request: pytest.FixtureRequest) -> pytest.Mark:
    """The arguments that a test's mark `engine` has for its engines."""
    return request.node.get_closest_marker("engine") or pytest.mark.engine.mark


@pytest.fixture
async def at(request: pytest.FixtureRequest, store_kind: str) -> AsyncIterator[Harness]:
    """An engine on a store of that kind, made by `running`."""
    from support.engine.harness import running

    options = made_with(request)
    async with running(*options.args, **options.kwargs) as found:
        yield found


@pytest.fixture
async def servers(request: pytest.FixtureRequest, store_kind: str) -> AsyncIterator[Sequence[Any]]:
    """Two servers on one store of that kind; with clocks of their own, if the test asks for `times`."""
    from support.engine.two_engines import two, two_in_time

    make: Any = two_in_time if "times" in request.fixturenames else two
    async with make(**made_with(request).kwargs) as found:
        yield found


@pytest.fixture
def first(servers: Sequence[Harness]) -> Harness:
    """One of two servers."""
    return servers[0]


@pytest.fixture
def second(servers: Sequence[Harness]) -> Harness:
    """The other one."""
    return servers[1]


@pytest.fixture(autouse=True)
def stores_are_closed() -> Iterator[None]:
    """Close what `support.stores.disk_store` has opened for a test."""
    yield
    if module := sys.modules.get("support.stores.disk_store"):
        module.close_all()


@pytest.fixture
def tmp_path(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder in memory for tests of stores, which flush thousands of files. That of a failed test is kept on disk."""
    from support.run_folder import memory_folder

    if not request.module.__name__.rpartition(".")[2].startswith("test_store_"):
        yield tmp_path
        return
    failed = request.session.testsfailed
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder)
        if request.session.testsfailed > failed:
            shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store may make its folder."""
    return tmp_path / "data"


@pytest.fixture
def times(servers: Sequence[Any]) -> Times:
    """The clocks of two servers and of their store."""
    found: Times = servers[2]
    return found


@pytest.fixture
def disk(store_kind: str) -> Iterator[Disk]:
    """A data directory of that kind, and the engines that use it one after the other."""
    from support.stores.durable import Disk

    found = Disk()
    yield found
    found.close()


@pytest.fixture
async def durable_store(store_kind: str) -> AsyncIterator[DurableStore]:
    """A store of that kind that outlives its servers, and the engines that use it one after the other."""
    from support.stores.durable import new_durable_store

    found = await new_durable_store()
    yield found
    await found.aclose()
