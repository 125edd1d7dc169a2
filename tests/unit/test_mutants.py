"""scripts/mutants.py shows which defects no test notices, and finds the same ones after names and texts have changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

MODULE = '''
def larger(left: int, other: int) -> int:
    """Return the larger one."""
    if left < 0:
        raise ValueError(f"left must be at least 0, got {left}")
    return left if left > other else other


def unreached(left: int) -> int:
    return left + 1
'''
TESTS = """
from package.module import larger

def test_larger():
    assert larger(2, 1) == 2
    assert larger(1, 2) == 2
"""
FOUND = {
    "left < 0, left <= 0": "survived",
    "left < 0, left >= 0": "killed",
    "0, 1": "survived",
    "left > other, left >= other": "survived",
    "left > other, left <= other": "killed",
    "return left if left > other else other, return None": "killed",
}
NEW_NAMES = {"larger": "highest", "left": "west", "must be at least 0": "is negative"}


def run(folder: Path, texts: dict[str, str], *arguments: str) -> dict[str, str]:
    """Try all mutants of some files, and return what became of each."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [
        sys.executable,
        str(ROOT / "scripts" / "mutants.py"),
        "package",
        "--tests=tests",
        "--workers=1",
    ]
    results = folder / "results.json"
    subprocess.run(
        [*command, f"--json={results}", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        check=True,
        capture_output=True,
    )
    return {f"{row['before']}, {row['after']}": row["status"] for row in json.loads(results.read_text())}


@pytest.mark.slow
def test_mutants_are_found_and_found_again(tmp_path: Path) -> None:
    files = {"package/module.py": MODULE, "tests/test_module.py": TESTS}
    assert run(tmp_path / "before", files) == FOUND

    moved = {"package/other.py": MODULE, "tests/test_module.py": TESTS.replace("module", "other")}
    expected = FOUND
    for old, new in NEW_NAMES.items():
        moved = {name: text.replace(old, new) for name, text in moved.items()}
        expected = {name.replace(old, new): status for name, status in expected.items()}
    moved["package/other.py"] = moved["package/other.py"].replace(
        "    return west if", "    print()\n    return west if"
    )
    again = f"--replay={tmp_path / 'before' / 'results.json'}"
    assert run(tmp_path / "after", moved, again) == expected
