"""The model of docs/operate/scale-out.md: its lines go through what was measured, and more is never cheaper."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import scaling  # noqa: E402


def measured(*, noise: float = 0.0) -> dict[str, Any]:
    """Three models whose costs lie on lines."""
    models = []
    for place, units in enumerate((64, 256, 1024)):
        record = 150 + 8 * units
        wrong = 1 + noise * (-1) ** place
        costs = {
            "replica_single": (100e-6, 10e-9),
            "replica_framed": (3e-6, 2e-9),
            "replica_load": (5e-6, 3e-9),
            "store_single": (20e-6, 1e-9),
            "store_framed": (2e-6, 1e-9),
            "store_load": (1e-6, 1e-9),
            "store_memory": (200.0, 1.2),
            "replica_row": (300.0, 1.1),
            "wire_single": (300.0, 1.0),
            "wire_framed": (100.0, 1.0),
            "log": (120.0, 1.0),
        }
        made = {name: (base + slope * record) * wrong for name, (base, slope) in costs.items()}
        models.append({"units": units, "record_bytes": record, **made})
    return {"frame": 256, "replica_base_bytes": 3e8, "models": models}


COSTS = scaling.Costs.of(measured())
NEED = scaling.Need(sessions=1e7, steps_per_s=1e5, units=64)


def test_lines_go_through_what_was_measured() -> None:
    assert COSTS.store_memory.base == pytest.approx(200.0)
    assert COSTS.store_memory.slope == pytest.approx(1.2)
    assert COSTS.record.at(256) == pytest.approx(150 + 8 * 256)
    assert COSTS.replica_single.at(1000) == pytest.approx(100e-6 + 10e-9 * 1000)


@pytest.mark.parametrize(
    "points", [[(100.0, 3.0), (200.0, 2.0), (400.0, 1.0)], [(100.0, 1.0), (1000.0, 30.0)]]
)
def test_a_line_that_would_fall_or_begin_below_nothing_is_never_used(
    points: list[tuple[float, float]],
) -> None:
    line = scaling.fitted(points)
    assert line.base >= 0
    assert line.slope >= 0
    assert line.at(0) < line.at(1000) or line.slope == 0


def test_lines_are_close_where_measurements_are_noisy() -> None:
    noisy = scaling.Costs.of(measured(noise=0.05))
    for name in ("store_memory", "replica_single", "log"):
        line, exact = getattr(noisy, name), getattr(COSTS, name)
        for size in (662, 2198, 8342):
            assert line.at(size) == pytest.approx(exact.at(size), rel=0.1)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"sessions": 1e9}, ("primaries", "store_gib")),
        ({"steps_per_s": 1e6}, ("replicas", "replica_cores", "store_cores", "wire_mb_s", "log_mb_s")),
        ({"units": 1024}, ("replica_cores", "store_gib", "wire_mb_s")),
        ({"loads": 0.5}, ("replica_cores", "store_cores")),
    ],
)
def test_more_needs_more(more: dict[str, Any], what: tuple[str, ...]) -> None:
    few, many = scaling.plan(COSTS, NEED), scaling.plan(COSTS, dataclasses.replace(NEED, **more))
    for name in what:
        assert getattr(many, name) > getattr(few, name)


def test_frames_cost_what_was_measured_and_single_steps_too() -> None:
    size = COSTS.record.at(64)
    single = scaling.plan(COSTS, dataclasses.replace(NEED, loads=0.0))
    framed = scaling.plan(COSTS, dataclasses.replace(NEED, loads=0.0, frame=256))
    assert single.replica_cores == pytest.approx(1e5 * COSTS.replica_single.at(size))
    assert framed.replica_cores == pytest.approx(1e5 * COSTS.replica_framed.at(size))
    between = scaling.plan(COSTS, dataclasses.replace(NEED, loads=0.0, frame=16))
    assert framed.replica_cores < between.replica_cores < single.replica_cores


def test_what_is_bought_is_enough() -> None:
    found = scaling.plan(COSTS, NEED)
    assert (found.replicas - 1) * NEED.cores * NEED.busy >= found.replica_cores
    assert found.primaries * NEED.node_gib * NEED.full >= found.store_gib
    assert found.primaries * NEED.busy >= found.store_cores


def test_the_page_is_as_the_measurements_say() -> None:
    told = json.loads(scaling.MEASURED.read_text())
    assert scaling.page(scaling.PAGE.read_text(), told) == scaling.PAGE.read_text()
    changed = {
        **told,
        "models": [{**each, "store_memory": each["store_memory"] * 2} for each in told["models"]],
    }
    assert scaling.page(scaling.PAGE.read_text(), changed) != scaling.PAGE.read_text()


def test_a_plan_of_ones_own() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "scaling.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    told = run("--sessions", "2e6", "--steps-per-s", "50000", "--units", "256", "--frame", "64")
    assert told.returncode == 0
    assert "replicas" in told.stdout
    assert run("--sessions", "2e6").returncode == 2
    assert "at most 1" in run("--sessions", "1", "--steps-per-s", "1", "--busy", "1.5").stderr
