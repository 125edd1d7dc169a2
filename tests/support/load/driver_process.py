"""Starts `driver.py` or `replica_driver.py` as a process of its own, and knows how far it is."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from support.checks import history as histories
from support.load.driver import PATIENCE_S, PlayerCounts
from support.load.replica_driver import ReplicaPlayerCounts

_TESTS = Path(__file__).resolve().parents[2]
_STOP_S = PATIENCE_S + 80.0


class Loading:
    """A process that makes load and writes a history; ends with its block, by `stop`, by `kill`, or with this process."""

    def __init__(self, module: str, history: Path, *arguments: str) -> None:
        self._history = history
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([os.fspath(_TESTS), *_paths()]),
                "PYTHONFAULTHANDLER": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._acknowledged = 0
        self._ended = False
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._count, daemon=True)
        self._reader.start()

    @property
    def acknowledged(self) -> int:
        """Changes so far."""
        return self._acknowledged

    def wait_acknowledged(self, more: int, timeout_s: float = 200.0) -> None:
        """Wait until this many more changes are acknowledged."""
        wanted = self._acknowledged + more
        with self._more:
            there = self._more.wait_for(lambda: self._acknowledged >= wanted or self._ended, timeout_s)
        assert there, (
            f"{self._acknowledged} changes were acknowledged in {timeout_s:g} s, {wanted} were expected;"
            f" the last errors: {histories.failures(histories.load([self._history]))[-5:]}"
        )
        assert not self._ended, "the driver has ended by itself"

    def stop(self) -> None:
        """Let it finish its calls and read everything; fail if it cannot."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)  # it says where each of its threads is
            self._process.wait()
            raise
        assert code == 0, "the driver has failed; see what it wrote on stderr"

    def kill(self) -> None:
        """Kill it with whatever it has under way."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._reader.join()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _count(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as dots:
            while found := os.read(dots.fileno(), 65536):
                with self._more:
                    self._acknowledged += len(found)
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()


class DriverProcess(Loading):
    """`driver.py`: the SDK at a server, or at several, whose addresses stand in `address` with commas."""

    def __init__(
        self,
        address: str,
        history: Path,
        seed: int,
        *,
        mix: PlayerCounts | None = None,
        pause_s: float = 0.02,
        hurry: bool = True,
    ) -> None:
        arguments = [*_common(address, history, seed, pause_s), *(["--hurry"] if hurry else [])]
        super().__init__("support.load.driver", history, *arguments, *_options(mix or PlayerCounts()))


class ReplicaDriverProcess(Loading):
    """`replica_driver.py`: the protocol itself, at several replicas at once."""

    def __init__(
        self,
        addresses: Sequence[str],
        history: Path,
        seed: int,
        *,
        counts: ReplicaPlayerCounts | None = None,
        pause_s: float = 0.02,
    ) -> None:
        arguments = _common(",".join(addresses), history, seed, pause_s)
        super().__init__(
            "support.load.replica_driver", history, *arguments, *_options(counts or ReplicaPlayerCounts())
        )


def _common(address: str, history: Path, seed: int, pause_s: float) -> list[str]:
    where = ["--address", address, "--history", os.fspath(history)]
    return [*where, "--seed", str(seed), "--pause-s", str(pause_s)]


def _options(counts: PlayerCounts | ReplicaPlayerCounts) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(counts).items()]


def _paths() -> list[str]:
    return [path for path in [os.environ.get("PYTHONPATH", "")] if path]
