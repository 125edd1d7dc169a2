"""`make demo`, run whole as a stranger runs it."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_what_it_prints_and_leaves(tmp_path: Path) -> None:
    """One test, so that the demo runs once: several would be divided among the processes of a test run."""
    environment = {**os.environ, "STEPWELL_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "100"}
    demo = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stderr == ""
    printed = " ".join(demo.stdout.split())
    no_session_was_disturbed(printed)
    the_server_was_killed_while_they_were_half_way(printed)
    a_state_set_by_hand_is_seen_in_the_forecasts(printed)
    the_lstm_has_learnt_something(printed)
    the_model_and_a_plot_are_left(tmp_path / "out")


def no_session_was_disturbed(printed: str) -> None:
    assert printed.count("are bit for bit") == 2
    assert "ARE NOT" not in printed
    difference = re.search(r"whole series by at most (\S+) °C", printed)
    assert difference is not None
    assert float(difference[1]) < 1e-4


def the_server_was_killed_while_they_were_half_way(printed: str) -> None:
    killed = re.search(r"killed at hour (\d+) of Ana, and started again", printed)
    assert killed is not None
    assert int(killed[1]) < 336


def a_state_set_by_hand_is_seen_in_the_forecasts(printed: str) -> None:
    moved = re.search(r"next-hour forecasts by up to (\S+) °C, zeros by up to (\S+) °C", printed)
    assert moved is not None
    assert float(moved[1]) > 0.1
    assert float(moved[2]) > 0.1


def the_lstm_has_learnt_something(printed: str) -> None:
    rows = re.findall(
        r"│ (Ana|Ben|Chloe) │ \w+ │ [^│]+ │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │", printed
    )
    assert [row[0] for row in rows] == ["Ana", "Ben", "Chloe"]
    for _, hour, hour_as_now, day, day_as_now, day_as_yesterday in rows:
        assert float(hour) <= float(hour_as_now) * 1.05
        assert float(day) < min(float(day_as_now), float(day_as_yesterday))


def the_model_and_a_plot_are_left(out: Path) -> None:
    assert (out / "temperature.keras").is_file()
    header = (out / "demo.png").read_bytes()[:24]
    assert header.startswith(PNG_SIGNATURE)
    width, height = struct.unpack(">II", header[16:])
    assert (width, height) == (1320, 1430)
