"""`stepwell serve` as somebody types it, and a client as somebody writes it: nothing is left unwired between."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.servers.served import Served, keras_model

# Ten lines, as in a README.
CLIENT = """\
import sys, numpy as np, stepwell
with stepwell.connect(sys.argv[1]) as client:
    with client.open_session("forecast", batch_size=1) as session:
        first = session.step(np.ones((1, 3)))
        session.step(np.ones((1, 10, 3)))
        state = session.get_state()
        session.reset_states()
        again = session.step(np.ones((1, 3)))
        session.reset_states(state)
        print(np.array_equal(first, again), session.revision, session.get_state() == state, first.tolist())
"""
READY = re.compile(r"stepwell: (native|python) front\b.*, listening on (\S+)")


class Started:
    """A process and the lines it has written."""

    def __init__(self, command: list[str], cache_dir: Path, cwd: Path) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "STEPWELL_CACHE_DIR": str(cache_dir)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if ready := READY.match(line):
                self._ready.put(ready[2])
        self._ready.put(None)

    def address(self) -> str:
        found = self._ready.get(timeout=200)
        assert found is not None, "".join(self.lines)
        return found

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(200)
        self._reader.join(200)
        return code


pytestmark = pytest.mark.plain("its server is started by the command line")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    folder = tmp_path_factory.mktemp("typed")
    keras_model("seq").save(folder / "model.keras")
    script = Path(sys.executable).with_name("stepwell")
    command = [str(script), "serve", "forecast=model.keras", "--listen", "127.0.0.1:0"]
    process = Started(command, folder / "cache", folder)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()
        assert process.process.stdout is not None
        process.process.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(900)  # two processes compile meanwhile
def test_ten_lines(started: Started, served: Served) -> None:
    """Compiled by its own process from the file as Keras saved it; the numbers are the other server's."""
    address = started.address()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CLIENT, address],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stderr) == (0, "")
    y, _ = served.client.predict("seq", np.ones((1, 3)))
    assert done.stdout.strip() == f"True 5 True {np.asarray(y).tolist()}"
    assert started.end() == 0
    assert sum(bool(READY.match(line)) for line in started.lines) == 1
