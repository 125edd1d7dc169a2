"""A run takes at most a share of the memory, whatever the values that callers send, and leaves none behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx

from support.models import step_functions

#: Runs a graph with inputs that need no memory, too much, and none; prints the errors, and the memory held at the end.
SCRIPT = """
import sys
from collections.abc import Callable
from pathlib import Path
import numpy as np
from stepwell_server.engine.executors import onnx_runtime

onnx_runtime.MEMORY_SHARE = (64 << 20) / onnx_runtime.memory_bytes()
run = onnx_runtime.plain(Path(sys.argv[1]).read_bytes())
for passes in (2, 9, 2):
    given = {"x": np.full((1, 2), passes, np.float32), "h": np.zeros((1, 2), np.float32)}
    try:
        print(run(given)["y"].tolist())
    except onnx_runtime.ExecutionError as error:
        print(error)
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(pages * 4096 < 400 << 20)
"""


@pytest.mark.parametrize("make", [step_functions.squaring, step_functions.rare_branch])
def test_a_run_that_needs_too_much_memory_fails(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    file = step_functions.saved(tmp_path, "model", make)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)], capture_output=True, text=True, check=True, timeout=250
    )
    first, refused, last, is_small = done.stdout.splitlines()
    assert first == last == "[[2.0, 2.0]]"
    assert refused.startswith("all runs must take at most 6710886")
    assert refused.endswith(" bytes of memory, and this one takes more")
    assert is_small == "True"
