"""`.ci/run`, with a stand-in for make: it makes everything, and fails for each thing that fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

#: One target fails, which FAILS names. Another one, named by HANGS, stays: it has the FIFO `stays` open, and reads `never`.
MAKE = """#!/bin/sh
echo "made: $*"
for target in "$@"; do
    if [ "$target" = "$FAILS" ]; then echo "$target fails"; exit 2; fi
    if [ "$target" = "$HANGS" ]; then exec 3>stays; echo started >&3; exec cat never; fi
done
"""


@pytest.fixture
def clone(root: Path, tmp_path: Path) -> Path:
    """A folder with `.ci/run`, and with the stand-in under `bin`."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(root / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text(MAKE)
    (tmp_path / "bin" / "make").chmod(0o755)
    return tmp_path


def environment(clone: Path, **variables: str) -> dict[str, str]:
    (clone / "tmp").mkdir()
    return (
        os.environ
        | {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(clone / "tmp")}
        | variables
    )


@pytest.mark.parametrize("failing", ["", "front", "check-types", "release", "check", "coverage"])
def test_it_makes_everything_and_fails_for_what_fails(clone: Path, failing: str) -> None:
    done = subprocess.run(
        [clone / ".ci" / "run"],
        env=environment(clone, FAILS=failing),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    made = " ".join(re.findall(r"^made: (.*)$", done.stdout, re.MULTILINE)).split()
    assert {"install", "crates", "front", "check", "release", "coverage"} <= set(made), done.stdout
    assert done.returncode == (1 if failing else 0), done.stdout
    checks, tests = failing not in {"", "coverage"}, failing == "coverage"
    (codes,) = re.findall(r"exit codes of checks and release (\d), tests (\d)", done.stdout)
    assert [code != "0" for code in codes] == [checks, tests]
    assert (f"{failing} fails" in done.stdout) == bool(failing)
    assert list((clone / "tmp").iterdir()) == []


def test_what_runs_in_the_background_ends_with_it(clone: Path) -> None:
    for name in ("stays", "never"):
        os.mkfifo(clone / name)
    with (
        subprocess.Popen(
            [clone / ".ci" / "run"], env=environment(clone, HANGS="release"), stdout=subprocess.DEVNULL
        ) as running,
        (clone / "stays").open() as stays,
    ):
        assert stays.readline() == "started\n"
        running.terminate()
        assert running.wait(200) != 0
        assert stays.read() == ""  # the end: no process has it open
