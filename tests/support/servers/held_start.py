"""A server whose start is held: it listens, and one of its models is being loaded for as long as the test wants."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from support.servers.server_process import ServerProcess, forecast

MODEL = "bad"
"""The one that is being loaded. It cannot be loaded in the end: the server serves `forecast` alone then."""
_WAITING = """
import os, sys
if "stepwell_server.compile.host.fork_server" in sys.orig_argv:
    with open({fifo!r}) as fifo:
        fifo.read()
    os._exit(3)
"""


@contextlib.contextmanager
def held_start(folder: Path, *options: str) -> Iterator[tuple[ServerProcess, str, contextlib.ExitStack]]:
    """A server of `forecast` and `MODEL` in the middle of its start, its address, and what lets it go on when it is closed.

    Args:
        folder: for its files.
        options: more of `stepwell serve`.
    """
    fifo, kept, bad = folder / "fifo", forecast(), folder / "bad.keras"
    os.mkfifo(fifo)
    (folder / "sitecustomize.py").write_text(_WAITING.format(fifo=str(fifo)))
    bad.write_bytes(kept.path.read_bytes() + b"\0")  # another one, so that the cache has it not
    models = (f"forecast={kept.path}", f"{MODEL}={bad}", "--cache-dir", str(kept.cache_dir))
    listening = ("--listen", "127.0.0.1:0", "--bad-models", "skip")
    with (
        contextlib.ExitStack() as held,
        ServerProcess(
            *models, *listening, *options, ready=False, environment={"PYTHONPATH": str(folder)}
        ) as server,
    ):
        address = server.wait_for_log("listening, not ready yet").rpartition("address=")[2].split()[0]
        held.enter_context(fifo.open("w"))  # as soon as the compiling process is there
        yield server, address, held
