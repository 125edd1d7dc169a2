"""Fixtures of the integration tests: one real server for all of them, or one of one's own whose faults are scripted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    # Imported inside, where it is used: a run of a few tests starts sooner.
    from support.sdk.scripted_server import ScriptedServer
    from support.servers.served import Served


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One server of all models of `support.servers.served`, for all tests."""
    from support.servers.served import serve

    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def served_secured() -> Iterator[Served]:
    """The same with TLS and tokens; what connects to it without its clients must do so inside `secured.switched_on`."""
    from support.secured import switched_on
    from support.servers.served import serve

    with contextlib.ExitStack() as stack:
        with switched_on():
            running = stack.enter_context(serve())
        yield running


@pytest.fixture
def started_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers of the test are no forks, for its subject is their start."""
    from support.servers import fork_server

    monkeypatch.setattr(fork_server, "_is_on", False)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """One that does as a test says."""
    from support.sdk.scripted_server import ScriptedServer

    with ScriptedServer() as scripted:
        yield scripted
