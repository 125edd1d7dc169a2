"""What stays for good is imported without a look for garbage."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stepwell_server.process.garbage_collection import collection_paused

SERVE = """
import atexit, gc, os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {"stepwell_server.app", "numpy"}:
            print(name, gc.isenabled(), os.environ.get("OPENBLAS_NUM_THREADS"))

sys.meta_path.insert(0, Watch())
atexit.register(lambda: print("then", gc.isenabled(), gc.get_freeze_count() > 10_000))
from stepwell.cli import main
main(["serve", f"m={sys.argv[1]}", "--store", "memory", "--listen", "127.0.0.1:0"])
"""


def test_none_is_looked_for_meanwhile_nor_in_it_later() -> None:
    frozen = gc.get_freeze_count()
    with collection_paused():
        assert not gc.isenabled()
        kept: list[list[int]] = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(kept)


def test_what_was_off_before_stays_so_and_errors_come_through() -> None:
    gc.disable()
    try:
        with collection_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ModuleNotFoundError), collection_paused():
        raise ModuleNotFoundError
    assert gc.isenabled()


def test_a_server_is_imported_so_and_with_one_thread_of_numpys(tmp_path: Path) -> None:
    (tmp_path / "bad.stepwell").write_bytes(b"none")
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("STEPWELL_") and name != "OPENBLAS_NUM_THREADS"
    }
    clean["STEPWELL_METRICS_LISTEN"] = "off"
    command = [sys.executable, "-c", SERVE, str(tmp_path / "bad.stepwell")]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.splitlines() == ["stepwell_server.app False 1", "numpy False 1", "then True True"]
