"""Two processes want one data directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stepwell_server.clock import SystemClock
from stepwell_server.store.base import Batch, End, StoreBusy, Tombstone
from stepwell_server.store.disk.lmdb import LmdbStore


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the directory until it is killed."""
    command = [sys.executable, __file__, os.fspath(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        try:
            yield process
        finally:
            process.kill()


def opened(path: Path) -> LmdbStore:
    store = LmdbStore(path, durability="async", clock=SystemClock())
    store.announce("127.0.0.1:5005")
    return store


def test_the_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        with pytest.raises(StoreBusy, match=rf"process {process.pid} on .* since .*127.0.0.1:5005") as e:
            opened(tmp_path)
        assert e.value.holder is not None
        assert e.value.holder.pid == process.pid
        process.kill()
        process.wait(timeout=200)
        store = opened(tmp_path)
        assert store.tombstones(["left"])[0] is not None
        store.close()


def test_a_process_that_was_started_meanwhile_does_not_hold_on(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        store.close()
        opened(tmp_path).close()
        child.kill()


if __name__ == "__main__":
    kept = opened(Path(sys.argv[1]))
    kept.commit(Batch(tombstones=[Tombstone("left", End.CLOSED, 0.0)]))
    os.write(1, b"open\n")
    sys.stdin.read()
