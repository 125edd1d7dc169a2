"""What holds for all tests."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from support import run_folder, samples
from support.import_order import ImportOrder
from support.servers import fork_server

if TYPE_CHECKING:
    from support.line_coverage import LineCoverage

_COVERAGE: LineCoverage | None = None
# Set by `make coverage`. Here, since the conftest files that are read after this one may import the product.
if "TEST_COVERAGE" in os.environ:
    from support import line_coverage

    _COVERAGE = line_coverage.LineCoverage()


def pytest_configure(config: pytest.Config) -> None:
    """Keep servers' data apart, and let Ctrl-C be what it is on a terminal, for the processes that tests start too.

    A shell ignores SIGINT for what it starts in the background, and children inherit that: then a test
    that interrupts a server or a command would wait in vain.
    """
    samples.settle()
    run_folder.use_for_temporary_files()
    # what a server keeps on disk unless it is told where: not among the sessions of whoever runs the tests
    os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="data-")
    # each of hundreds of processes would compile all modules anew, and start a thread of numpy's for each core
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # servers whose metrics no test asks for leave their port alone
    os.environ["STEPWELL_METRICS_LISTEN"] = "off"
    # on a machine that is busy a server that is there may take longer than a second to say so
    os.environ["STEPWELL_CONNECT_TIMEOUT_S"] = "60"
    if hasattr(config, "workerinput") and not samples.ALL:  # soaks start servers as users do
        fork_server.switch_on()
    _quiet_grpc()
    config.addinivalue_line("markers", "slow: takes seconds; runs in `make test-slow`, not in `make test`")
    config.addinivalue_line(
        "markers", "soak: one of many alike; runs in `make soak`, and where its file is named"
    )
    config.addinivalue_line("markers", "plain(reason): skipped where all servers of the tests are secured")
    if os.environ.get("STEPWELL_TEST_SECURED"):
        from support import secured

        secured.switch_on()
    worker: dict[str, Any] | None = getattr(config, "workerinput", None)
    if worker is not None:
        number = int(worker["workerid"].removeprefix("gw"))
        config.pluginmanager.register(ImportOrder(number, worker["workercount"]))
    if config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput"):
        from support.collection_progress import CollectionProgress

        # the reporter is made later; and nothing is written unless tests are divided among workers
        reporter = config.pluginmanager.getplugin
        config.pluginmanager.register(
            CollectionProgress(lambda line: reporter("terminalreporter").write_line(line))
        )
        if config.getoption("dist") != "no":
            # a run that `timeout` or CI ends must end its workers and remove its folders
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup; servers would ignore it, too
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _quiet_grpc() -> None:
    """Keep gRPC in this process from writing a line among the dots for each GOAWAY that a test sends on purpose.

    It reads the variable once, with its first channel. The processes that tests start are to write what goes wrong.
    """
    if "GRPC_VERBOSITY" in os.environ:
        return
    os.environ["GRPC_VERBOSITY"] = "NONE"
    import grpc

    grpc.insecure_channel("127.0.0.1:1").close()
    del os.environ["GRPC_VERBOSITY"]


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Free memory by reference counts alone: no finalizer of an earlier test's objects runs in the middle of this one."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot be secured."""
    mark = item.get_closest_marker("plain")
    if mark is not None and os.environ.get("STEPWELL_TEST_SECURED"):
        pytest.skip(f"plain: {mark.args[0]}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark and leave out what another run tries: see `support.samples`."""
    samples.mark(items)
    chosen = samples.cases(items)
    if left_out := set(items).difference(chosen):
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = samples.long_first(chosen, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def pytest_collection() -> None:
    """Do not look for garbage while thousands of tests are made, all of which stay: a second for each process."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the garbage collector look at nothing again and again that stays: thousands of tests, and what they import.

    And seldom at the rest: most of what it would look at still lives. A collection of the youngest objects costs the
    same for ten times as many of them, since few survive.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Save the lines that ran. A worker of pytest-xdist may be killed soon after."""
    if _COVERAGE is not None:
        _COVERAGE.save()
