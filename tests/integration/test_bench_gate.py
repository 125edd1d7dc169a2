"""`make bench-gate` on a tiny run: this tree against itself with a delay in each pass."""

from __future__ import annotations

import dataclasses
import os
import stat
import sys
from pathlib import Path

import pytest

from against import builds
from bench import gate
from bench.loads import Times
from support.models import programs

PAIRS = 2
_SLOW = """\
import time
from ai_edge_litert import interpreter

invoke = interpreter.Interpreter.invoke


def slow(self):
    time.sleep(0.05)
    invoke(self)


interpreter.Interpreter.invoke = slow
"""


def _slowed(build: builds.Build, folder: Path) -> builds.Build:
    """The build, whose server runs each pass with a delay."""
    (folder / "sitecustomize.py").write_text(_SLOW)
    python = folder / "python"
    # without -I, the first argument of a build's server and of a client, Python looks at PYTHONPATH
    python.write_text(
        f'#!/bin/sh\n[ "$2" = -m ] && export PYTHONPATH={folder}\nshift\nexec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return dataclasses.replace(build, name="the slow tree", python=python)


@pytest.mark.slow
def test_a_slowed_server_lies_beyond_the_bounds_and_the_faster_one_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("STEPWELL_")]:
        monkeypatch.delenv(name)
    model = programs.saved("lstm_dense").path
    tree = gate.BuiltContender(builds.of_tree(), {gate.MODEL: model}, programs.cache_dir())
    slow = dataclasses.replace(tree, build=_slowed(tree.build, tmp_path))
    ratios = gate.compare(slow, tree, [gate.Load("memory", "group", 32)], PAIRS, Times(0.2, 0.1))
    rate, p50 = (("memory", "group 32", name) for name in ("rate", "p50_ms"))
    start, resident = (("memory", "server", name) for name in ("start_s", "resident_mib"))
    assert ratios.keys() == {rate, p50, start, resident}
    assert all(len(values) == PAIRS for values in ratios.values())
    loaded = {row: ratios[row] for row in (rate, p50)}
    assert gate.report(gate.judge(loaded, gate.bounds("main"))) == 1
    assert capsys.readouterr().out.count("beyond\n") == 2
    inverse = {row: [1 / value for value in values] for row, values in loaded.items()}
    assert gate.report(gate.judge(inverse, gate.bounds("main"))) == 0
    assert capsys.readouterr().out.count("within\n") == 2
