"""What systemd hears, on a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepwell_server.process.readiness import Readiness
from stepwell_server.process.systemd import Notifier


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(100)
        yield listener


def _heard(systemd: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in systemd.recv(4096).decode().split("\n"))


async def test_it_is_told_how_far_the_start_is_and_when_it_is_over(systemd: socket.socket) -> None:
    notifier, readiness = Notifier({"NOTIFY_SOCKET": systemd.getsockname()}), Readiness()
    readiness.listen(notifier.changed)
    assert _heard(systemd) == {"STATUS": "the models are being loaded"}
    notifier.start()
    await asyncio.sleep(0)
    assert _heard(systemd) == {"EXTEND_TIMEOUT_USEC": "60000000"}
    notifier.reloading()  # SIGHUP meanwhile: to say READY=1 would end the start
    readiness.problem("models", "")
    assert _heard(systemd) == {"READY": "1", "STATUS": "ready"}
    readiness.problem("store", "no room\nat all")
    assert _heard(systemd) == {"STATUS": "no room at all"}
    readiness.problem("store", "")
    assert _heard(systemd) == {"STATUS": "ready"}
    notifier.reloading()
    reloading = _heard(systemd)
    assert reloading["RELOADING"] == "1"
    assert reloading["MONOTONIC_USEC"].isdecimal()
    assert _heard(systemd) == {"READY": "1"}
    readiness.problem("stopping", "the server stops")
    assert _heard(systemd) == {"STOPPING": "1", "STATUS": "the server stops"}
    notifier.reloading()
    systemd.setblocking(False)
    with pytest.raises(BlockingIOError):
        systemd.recv(4096)
    notifier.close()


async def test_the_watchdog_is_fed_by_the_event_loop(systemd: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": systemd.getsockname(), "WATCHDOG_USEC": "30000"}
    notifier = Notifier({**environment, "WATCHDOG_PID": str(os.getpid())})
    notifier.start()
    await asyncio.sleep(0)
    assert _heard(systemd)["WATCHDOG"] == "1"
    systemd.setblocking(False)
    await asyncio.get_running_loop().sock_recv(
        systemd, 4096
    )  # the next one comes while the loop has its turns
    notifier.close()
    assert (
        Notifier({"WATCHDOG_USEC": "30000", "WATCHDOG_PID": "1"}).watchdog_s == 0
    )  # another process is meant


def test_abstract_sockets_and_none_at_all(caplog: pytest.LogCaptureFixture) -> None:
    name = f"stepwell-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        notifier = Notifier({"NOTIFY_SOCKET": f"@{name}"})
        notifier.notify(READY="1")
        assert listener.recv(100) == b"READY=1"
    notifier.notify(READY="1")
    notifier.notify(READY="1")
    notifier.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the server's state cannot be reported to systemd"
    ]
    Notifier({}).notify(READY="1")
