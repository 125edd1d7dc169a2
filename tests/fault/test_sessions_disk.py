"""The disk is full under a whole server: callers are told, nothing is lost, and it goes on once there is room."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from support.load.driver import FEATURES, MODEL
from support.load.driver_process import DriverProcess
from support.processes import until
from support.secured import Server
from support.servers import fault_servers
from support.servers.fault_servers import local, verdict
from support.stores.small_disk import small_disk

MIB = 2**20
GROUP = 512
_SPARSE_LOG = 'mkdir -m 700 "$0/wal" && truncate -s 1M "$0/wal/0" "$0/wal/1" && exec "$@"'


class OnSmallDisk(Server):
    """The real server, which alone sees a small disk under its data directory.

    With `sparse_log` the segments of its log exist and have no blocks yet, so that a write to them needs room.
    """

    def __init__(self, data_dir: Path, *extra: str, sparse_log: bool = False) -> None:
        super().__init__(**fault_servers.arguments(data_dir, extra))
        self._disk = data_dir
        self._prefix = small_disk(data_dir, "size=16m,mode=700")
        if sparse_log:
            self._prefix += ["sh", "-c", _SPARSE_LOG, os.fspath(data_dir)]

    def _command(self) -> list[str]:
        return [*self._prefix, *super()._command()]

    @property
    def disk(self) -> Path:
        """The disk as it is seen from here."""
        return Path(f"/proc/{self.pid}/root{self._disk}")


def fill(client: stepwell.Client) -> list[stepwell.SessionGroup]:
    """Open sessions until there is no room for more."""
    groups: list[Any] = []
    limit_s = 1.0
    while limit_s < 20.0:
        try:
            groups.append(client.open_sessions(MODEL, GROUP, timeout_s=limit_s))
        except stepwell.UnavailableError:
            break
        except stepwell.DeadlineExceededError:
            limit_s *= 4  # it may have been the machine that was busy
        assert len(groups) < 200, "the disk is never full"
    return groups


def check(server: Server, history: Path, full: Callable[[], object], room: Callable[[], object]) -> None:
    """Fill the disk under load, look what goes and what does not, make room, and go on."""
    with (
        stepwell.connect(server.address) as client,
        DriverProcess(server.address, history, seed=61, pause_s=0.01) as driver,
    ):
        driver.wait_acknowledged(100)
        mine = client.open_sessions(MODEL, GROUP)
        x = np.random.default_rng(61).standard_normal((GROUP, FEATURES)).astype(np.float32)
        y = mine.step(x)
        full()
        groups = fill(client)
        assert groups, "there was room for some"
        state = mine.get_state()
        assert np.array_equal(client.predict(MODEL, x)[0], y)
        assert client.session_info(mine.ids[0]).revision == 1
        groups[0].close(timeout_s=100.0)
        with pytest.raises(stepwell.SessionNotFoundError):
            client.session_info(groups[0].ids[-1])
        room()
        assert np.array_equal(mine.get_state()["lstm/h"], state["lstm/h"])
        mine.reset_states()
        assert np.array_equal(mine.step(x), y)
        assert mine.revisions.tolist() == [3] * GROUP
        driver.wait_acknowledged(100)
        driver.stop()
    verdict(history).require_clean()


@pytest.mark.slow
def test_a_limit_on_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with local(data, "--durability", "sync") as server:

        def limited(limit_bytes: int) -> None:
            assert server.pid is not None
            _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (limit_bytes, hard))

        def full() -> None:
            limited(max(512 * path.stat().st_blocks for path in data.rglob("data.mdb")) + MIB)

        check(server, tmp_path / "history", full, lambda: limited(resource.RLIM_INFINITY))
        server.kill()
        server.restart()
        with DriverProcess(server.address, tmp_path / "history", seed=62) as driver:
            driver.wait_acknowledged(50)
            driver.stop()
    verdict(tmp_path / "history").require_clean()


@pytest.mark.slow
def test_a_small_disk(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with OnSmallDisk(tmp_path / "data", "--durability", "async") as server:
        ballast = server.disk / "ballast"

        def full() -> None:
            free = shutil.disk_usage(server.disk).free
            ballast.write_bytes(b"x" * (free - MIB))

        check(server, tmp_path / "history", full, ballast.unlink)


@pytest.mark.slow
def test_a_log_that_finds_no_room(tmp_path: Path) -> None:
    """The log's writer itself meets a full disk, in `sync`; with the native module that is the native one."""
    data, history = tmp_path / "data", tmp_path / "history"
    data.mkdir()
    with (
        OnSmallDisk(data, "--durability", "sync", sparse_log=True) as server,
        DriverProcess(server.address, history, seed=63) as driver,
    ):
        driver.wait_acknowledged(100)
        ballast = server.disk / "ballast"
        with contextlib.suppress(OSError):  # the server takes some of it meanwhile
            ballast.write_bytes(b"x" * shutil.disk_usage(server.disk).total)
        until(lambda: "could not be written to the write-ahead log" in server.logs())
        assert "No space left on device" in server.logs()
        ballast.unlink()
        driver.wait_acknowledged(100)
        driver.stop()
    verdict(history).require_clean()
