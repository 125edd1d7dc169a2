"""The power fails under a whole server: with `sync`, everything that was acknowledged is there when it is back.

The disk is a file system of its own, ext4 in a file. Its shutdown call drops what was not flushed, as the loss of power
would. Mounts belong to one process here, so they end with it.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stepwell
from support.load.driver import FEATURES, MODEL
from support.load.driver_process import DriverProcess
from support.processes import until
from support.secured import Server
from support.servers import fault_servers
from support.servers.fault_servers import SMALL_BYTES, local, verdict
from support.servers.server_process import retrained

MIB = 2**20
CUTS = 4
_PRIVATE = ["unshare", "--mount"]
#: EXT4_IOC_SHUTDOWN without flushing the journal.
_SHUT_DOWN, _NO_FLUSH = 0x8004587D, struct.pack("I", 2)


class Disk:
    """A disk whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk"
        self._image = folder / "image"
        self.path.mkdir()
        with self._image.open("wb") as file:
            file.truncate(64 * MIB)
        _run(["mkfs.ext4", "-qF", "-m", "0", os.fspath(self._image)])
        self._mount()

    def cut(self) -> None:
        """Drop what was not flushed, and refuse everything from now on."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUT_DOWN, _NO_FLUSH)
        finally:
            os.close(folder)

    def restore(self) -> None:
        """Mount it again. No process may use it."""
        _run(["umount", os.fspath(self.path)])
        self._mount()

    def _mount(self) -> None:
        _run(["mount", "-o", "loop", os.fspath(self._image), os.fspath(self.path)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["changes", "models"])
def test_nothing_acknowledged_is_lost(tmp_path: Path, what: str) -> None:
    if os.getuid() or not shutil.which("mkfs.ext4"):
        pytest.skip("only root makes file systems, with mkfs.ext4")
    private = [*_PRIVATE, sys.executable, __file__]
    env = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[1])}  # for `support`
    (tmp_path / "try").mkdir()
    if subprocess.run(
        [*private, "try", tmp_path / "try"], capture_output=True, check=False, env=env
    ).returncode:
        pytest.skip("no mount is allowed here, or it has no shutdown")
    found = subprocess.run(
        [*private, what, tmp_path], capture_output=True, text=True, timeout=250, check=False, env=env
    )
    assert (found.returncode, found.stdout) == (0, "all is well\n"), found.stderr


def check_changes(disk: Disk, folder: Path) -> None:
    """Cut the power under load, a moment before the server is killed."""
    chance, history = random.Random(29), folder / "history"
    with (
        local(disk.path / "data", "--durability", "sync", segment_bytes=SMALL_BYTES) as server,
        DriverProcess(server.address, history, seed=29, pause_s=0.005) as driver,
    ):
        for number in range(CUTS):
            driver.wait_acknowledged(chance.randrange(100, 200))
            disk.cut()
            if number == CUTS - 1:
                until(lambda: "could not be written to the write-ahead log" in server.logs())
            server.kill()
            disk.restore()
            server.restart()
        driver.wait_acknowledged(100)
        driver.stop()
    verdict(history).require_clean()


def check_models(disk: Disk) -> None:
    """Cut the power right after a model was sent, when no other write makes its file's name durable."""
    with (
        Server(
            **fault_servers.arguments(disk.path / "data", ["--durability", "sync", "--allow-model-upload"])
        ) as server,
        stepwell.connect(server.address) as client,
    ):
        for _ in range(30):  # from now on the store writes to blocks that it has
            client.open_sessions(MODEL, 200).close()
        os.sync()
        assert client.load_model(MODEL, retrained().path, upload=True).version == 2
        disk.cut()
        server.kill()
        disk.restore()
        server.restart()
        with client.open_session(MODEL) as session:
            assert [model.version for model in client.models()] == [2]
            session.step(np.ones((1, FEATURES), np.float32))


if __name__ == "__main__":
    what, at = sys.argv[1], Path(sys.argv[2])
    its_disk = Disk(at)
    if what == "try":
        its_disk.cut()
    elif what == "changes":
        check_changes(its_disk, at)
    else:
        check_models(its_disk)
    print("all is well")
