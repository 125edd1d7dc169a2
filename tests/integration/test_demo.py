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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def said(folder: Path) -> str:
    environment = {**os.environ, "STEPWELL_CACHE_DIR": str(folder / "cache"), "COLUMNS": "100"}
    demo = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert demo.stderr == ""
    return " ".join(demo.stdout.split())


pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def test_no_session_was_disturbed(said: str) -> None:
    assert said.count("are bit for bit") == 2
    assert "ARE NOT" not in said
    difference = re.search(r"whole series by at most (\S+) °C", said)
    assert difference is not None
    assert float(difference[1]) < 1e-4


def test_the_server_was_killed_while_they_were_half_way(said: str) -> None:
    killed = re.search(r"killed at hour (\d+) of Ana, and started again", said)
    assert killed is not None
    assert int(killed[1]) < 336


def test_a_state_set_by_hand_is_seen_in_the_forecasts(said: str) -> None:
    moved = re.search(r"next-hour forecasts by up to (\S+) °C, zeros by up to (\S+) °C", said)
    assert moved is not None
    assert float(moved[1]) > 0.1
    assert float(moved[2]) > 0.1


def test_the_lstm_has_learnt_something(said: str) -> None:
    rows = re.findall(
        r"│ (Ana|Ben|Chloe) │ \w+ │ [^│]+ │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │ ([\d.]+) │", said
    )
    assert [row[0] for row in rows] == ["Ana", "Ben", "Chloe"]
    for _, hour, hour_as_now, day, day_as_now, day_as_yesterday in rows:
        assert float(hour) <= float(hour_as_now) * 1.05
        assert float(day) < min(float(day_as_now), float(day_as_yesterday))


def test_the_model_and_a_plot_are_left(said: str, folder: Path) -> None:
    assert (folder / "out" / "temperature.keras").is_file()
    header = (folder / "out" / "demo.png").read_bytes()[:24]
    assert header.startswith(PNG_SIGNATURE)
    width, height = struct.unpack(">II", header[16:])
    assert (width, height) == (1320, 1430)


def test_the_data_is_what_its_readme_says() -> None:
    path = EXAMPLES / "data" / "temperature.csv"
    header, *rows = path.read_text().splitlines()
    assert header == "hour,newark,kennedy,laguardia"
    assert [int(row.split(",")[0]) for row in rows] == list(range(8730))
    celsius = [float(value) for row in rows for value in row.split(",")[1:]]
    assert len(celsius) == 3 * 8730
    assert -15 < min(celsius) < max(celsius) < 40
    assert path.stat().st_size < 200_000
