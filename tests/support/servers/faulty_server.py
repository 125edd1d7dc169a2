"""`python -m stepwell_server` with something wrong with it: a defect from the start, or faults on demand.

    faulty_server.py CONTROL DEFECT JUMP_S [arguments of the server]

CONTROL is the HOST:PORT that sends commands, one a line, each answered by "ok":

    fail        the store's commits fail as on a full disk
    stall       they wait; "stalled" is said when the first one does
    well        as ever
    panic       the last write of LMDB's next transaction fails, and LMDB gives its environment up
    panic-away  so, and it cannot be opened anew until all is well
    jump S      the clock on the wall jumps

JUMP_S is where that clock stands at the start, in seconds from the right time. `fault_servers.FaultyServer` starts it.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import lmdb
import numpy as np

from stepwell_server import clock
from stepwell_server.core import exactly_once
from stepwell_server.store.disk.lmdb import LmdbStore
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.disk.wal import writers
from stepwell_server.store.disk.wal.segment import Segment

Commit = Callable[[DiskStore, Any], None]
_LATE_S = 0.2


class Faults:
    """Takes commands, and does what they say to whoever asks."""

    def __init__(self, control: str, jump_s: float) -> None:
        host, _, port = control.rpartition(":")
        self._control = socket.create_connection((host, int(port)))
        self._fails = False
        self.is_away = False
        self.data_dir = Path()
        self._well = threading.Event()
        self._well.set()
        self.jump_s = jump_s
        threading.Thread(target=self._obey, daemon=True).start()

    def before_commit(self) -> None:
        """Fail or wait if the test asks for it."""
        if self._fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not self._well.is_set():
            self._say("stalled")
            self._well.wait()

    def _obey(self) -> None:
        for line in self._control.makefile():
            command, *arguments = line.split()
            self._fails = command == "fail"
            self.is_away = command == "panic-away"
            if command.startswith("panic"):
                from support.stores.broken_disk import break_last_writes

                break_last_writes(self.data_dir)
            if command == "stall":
                self._well.clear()
            else:
                self._well.set()
            if command == "jump":
                self.jump_s += float(arguments[0])
            self._say("ok")

    def _say(self, word: str) -> None:
        self._control.sendall(f"{word}\n".encode())


def replace(owner: object, name: str, other: object) -> None:
    """Put a function, or another thing, in the place of one; nobody but us may hold the old one yet."""
    setattr(owner, name, other)


def install(faults: Faults) -> None:
    """Faults on demand."""
    # A script has its own folder there, and not the one of all tests.
    sys.path.insert(0, os.fspath(Path(__file__).parents[2]))
    commit, write = LmdbStore._commit, Segment._write

    def _commit(store: LmdbStore, batch: Any) -> None:
        faults.before_commit()
        commit(store, batch)

    def _write(segment: Segment, *arguments: Any) -> None:
        faults.before_commit()
        write(segment, *arguments)

    open_one = lmdb.open

    def _open(path: bytes, **options: Any) -> Any:
        faults.data_dir = Path(os.fsdecode(path)).parent
        if faults.is_away:
            raise lmdb.DiskError("the disk is away")
        return open_one(path, **options)

    replace(lmdb, "open", _open)
    # Where the disk's own errors come from, so that they are translated as those are.
    replace(LmdbStore, "_commit", _commit)
    replace(Segment, "_write", _write)
    replace(writers, "NATIVE", None)  # it writes without `Segment`
    replace(clock.SystemClock, "now", lambda _: time.time() + faults.jump_s)


def forget_requests() -> None:
    """The dedupe is off: what was applied already is applied again when it is sent again."""
    judge = exactly_once.judge

    def again(*arguments: Any) -> exactly_once.Verdict | None:
        verdict = judge(*arguments)
        if verdict is None:
            return None
        nobody = np.zeros_like(verdict.replay)
        return dataclasses.replace(verdict, apply=verdict.apply | verdict.replay, replay=nobody)

    replace(exactly_once, "judge", again)


def judge_nothing() -> None:
    """Everything that comes is applied."""
    replace(exactly_once, "judge", lambda *_: None)
    replace(exactly_once, "applies", lambda *_: True)


def commit_everything() -> None:
    """Append nothing to the log without a commit."""
    replace(DiskStore, "append", lambda *_: False)
    replace(DiskStore, "begin_append", lambda *_: None)


def drop_commits() -> None:
    """Every other commit is reported as kept and is not."""
    commit: Commit = DiskStore.commit
    count = 0

    def dropping(store: DiskStore, batch: Any) -> None:
        nonlocal count
        count += 1
        if count % 2:
            commit(store, batch)

    replace(DiskStore, "commit", dropping)
    commit_everything()


def commit_late() -> None:
    """Commits are reported as kept a little before they are: the order is right, the reply is too early."""
    commit: Commit = DiskStore.commit
    waiting: queue.SimpleQueue[tuple[float, DiskStore, Any]] = queue.SimpleQueue()

    def work() -> None:
        while True:
            due, store, batch = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            commit(store, batch)

    threading.Thread(target=work, daemon=True).start()

    def later(store: DiskStore, batch: Any) -> None:
        waiting.put((time.monotonic() + _LATE_S, store, batch))

    replace(DiskStore, "commit", later)
    commit_everything()


DEFECTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "forget-requests": forget_requests,
    "judge-nothing": judge_nothing,
    "drop-commits": drop_commits,
    "commit-late": commit_late,
}


def main() -> NoReturn:
    """Break something, then serve."""
    control, defect, jump_s, *arguments = sys.argv[1:]
    install(Faults(control, float(jump_s)))
    DEFECTS[defect]()
    from stepwell_server.__main__ import main as serve

    serve(arguments)


if __name__ == "__main__":
    main()
