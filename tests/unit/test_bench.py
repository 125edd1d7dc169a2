"""What the benchmarks make of what they measure: turns, ratios, intervals, failures, and the tables of docs/explanation/performance.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import cases, gate, harness, loads, measure, speech, tables
from bench.harness import ROOT, Key, Result, ServerEndedError
from bench.pairs import Bound, Interval, Verdict, interval_of

PLAN = loads.Plan(loads.Times(1.0), 3)


def test_turns_go_back_and_forth_and_ratios_are_of_one_turn() -> None:
    order: list[str] = []
    rates = {"ours": iter([10.0, 60.0, 90.0]), "theirs": iter([10.0, 20.0, 90.0])}

    def of(name: str) -> Callable[[], Result]:
        def take() -> Result:
            order.append(name)
            return {"rate": next(rates[name])}

        return take

    measures: dict[Key, Any] = {("theirs",): of("theirs"), ("ours",): of("ours")}
    theirs, ours = harness.measured(("who",), measures, 3, lambda _: ("theirs",))
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert theirs == {"who": "theirs", "rate": 20.0}
    assert ours == {"who": "ours", "rate": 60.0, "ratios": {"rate": 1.0}}  # of 1, 3 and 1; not 60 / 20


def test_what_fails_is_said_and_costs_the_others_nothing() -> None:
    results: Iterator[Result] = iter([{"rate": 1.0}])
    measures: dict[Key, Any] = {("a",): lambda: next(results), ("b",): lambda: {"rate": 2.0}}
    a, b = harness.measured(("who",), measures, 2, lambda _: ("a",))
    assert a == {"who": "a", "error": "StopIteration: "}
    assert b == {"who": "b", "rate": 2.0}


def test_a_server_that_ends_early_ends_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        pid = None

        def logs(self) -> str:
            return "out of luck"

    server: Any = Ended()
    with pytest.raises(ServerEndedError, match="out of luck"), harness.alive(server):
        raise ValueError("the connection is gone")
    with pytest.raises(ServerEndedError), harness.alive(server):
        pass

    def ended() -> Result:
        with harness.alive(server):
            return {"rate": 1.0}

    def fails(plan: loads.Plan) -> list[harness.Point]:
        return harness.measured((), {(): ended}, plan.repeats)

    monkeypatch.setattr(
        measure, "CASES", {"memory": fails, "start": lambda _: [{"front": "native", "ready_s": 0.5}]}
    )
    out = tmp_path / "results.json"
    assert measure.run_cases(["memory", "start"], PLAN, {"long": {"points": []}}, out) == 1
    kept = json.loads(out.read_text())["cases"]
    assert kept.keys() == {"long", "memory", "start"}
    assert kept["memory"]["error"].startswith("ServerEndedError: the server ended early")
    assert kept["start"]["points"] == [{"front": "native", "ready_s": 0.5}]
    made = tables.blocks({name: kept[name] for name in ("start", "memory")})
    assert made["start"].endswith("| native | 0.5 |")
    assert made["memory"].startswith("Not measured in this run: ServerEndedError")
    assert made["tls"] == "Not measured in this run"


def test_the_most_microphones_are_found_that_are_answered_in_time() -> None:
    tried = []

    def run(sessions: int) -> Result:
        tried.append(sessions)
        late = sessions > 400
        return {
            "rate": sessions * speech.FRAMES_PER_S * (0.9 if sessions > 320 else 1),
            "step_us": 50.0,
            "p50_ms": 1.0,
            "p99_ms": 40.0 if late else 20.0,
        }

    found = speech.most(run, 1000)
    assert found == {"carried": 320, **run(320)}, "with 336 a tenth of the frames is not sent in time"
    assert len(tried) < 10
    nothing = speech.most(lambda _: {"rate": 0.0, "p99_ms": 0.0}, 1000)
    assert nothing == {"carried": 0, **dict.fromkeys(("rate", "step_us", "p50_ms", "p99_ms"), 0.0)}


def test_a_process_has_a_limit() -> None:
    silent = harness.started("-c", "import sys; sys.stdin.read()", limit_s=0.01)
    with pytest.raises(RuntimeError, match="was not ready within"), silent:
        pytest.fail("it never says that it is ready")
    with pytest.raises(RuntimeError, match=r"failed with 3:\nbad luck"):
        harness.run_python("-c", "import sys; sys.stderr.write('bad luck'); sys.exit(3)")


def test_every_case_has_its_tables_and_they_their_places_on_the_page() -> None:
    assert {case for case, _ in tables.TABLES.values()} == cases.CASES.keys()
    assert tables.MODELS.keys() == harness.MODELS.keys()
    page = (ROOT / "docs" / "explanation" / "performance.md").read_text(encoding="utf-8")
    machine = dict.fromkeys(("date", "processor", "cores", "system", "packages", "commit"), "x")
    point = {"front": "native", "kind": "unary", "sessions": 1, "rate": 5000.0, "p50_ms": 0.2, "p99_ms": 0.3}
    refused = point | {"kind": "stream", "refused": 0.0027}
    result = {"machine": machine, "repeats": 3, "run_s": 1.5, "points": [point, refused]}
    later = {**result, "machine": machine | {"commit": "y"}, "points": []}
    million = {
        "plan": {"resident_rows": 10_000, "durability": "sync"},
        "machine": machine,
        "lines": [
            {"case": "opened", "unit": "s", "value": 2.0, "baseline": "b", "theirs": 1.0, "ratio": 2.0}
        ],
    }
    made = tables.blocks({"sessions": result, "start": later}) | tables.million_blocks(million)
    filled = tables.fill_in(page, made)
    assert "Medians of 3 turns of 1.5 s." in filled
    assert "| 1 | steps/s | 5,000 | 5,000 (0.3% refused) |  |  |" in filled
    assert "|  | p50 / p99, ms | 0.2 / 0.3 | 0.2 / 0.3 |  |  |" in filled
    assert "Of x, commit `y`" in filled
    assert "| opened | 2 s | b: 1 | 2 |" in filled
    with pytest.raises(LookupError, match="no place for nowhere"):
        tables.fill_in(page, {"nowhere": ""})


@pytest.mark.parametrize(
    ("ratios", "limit", "higher_is_better", "verdict"),
    [
        pytest.param([0.90, 0.91, 0.92, 0.93], 0.95, True, Verdict.BEYOND, id="wholly beyond"),
        pytest.param([0.90, 0.91, 0.97, 1.02], 0.95, True, Verdict.UNCLEAR, id="the bound is inside"),
        pytest.param([0.96, 0.97, 0.98, 0.99], 0.95, True, Verdict.WITHIN, id="worse, within the bound"),
        pytest.param([1.10, 1.20, 1.30, 1.40], 0.95, True, Verdict.WITHIN, id="better"),
        pytest.param([1.06, 1.07, 1.08, 1.09], 1.05, False, Verdict.BEYOND, id="a time wholly beyond"),
        pytest.param([0.99, 1.02, 1.07, 1.10], 1.05, False, Verdict.UNCLEAR, id="a time, the bound inside"),
        pytest.param([0.60, 0.70, 0.80, 0.90], 1.05, False, Verdict.WITHIN, id="a better time"),
    ],
)
def test_an_interval_is_judged_by_its_bound(
    ratios: list[float], limit: float, higher_is_better: bool, verdict: Verdict
) -> None:
    interval = interval_of(ratios)
    assert min(ratios) <= interval.low < interval.median < interval.high <= max(ratios)
    assert interval == interval_of(ratios)
    assert Bound(limit, higher_is_better).judge(interval) is verdict


def test_an_interval_is_narrow_where_pairs_agree_and_holds_their_median() -> None:
    few, many = (interval_of(np.linspace(0.8, 1.0, count).tolist()) for count in (10, 1000))
    assert many.high - many.low < (few.high - few.low) / 3
    assert many.low < 0.9 < many.high
    assert interval_of([0.5]) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(("against", "fails"), [("main", True), ("bare", False)])
def test_the_gate_fails_where_a_row_with_a_bound_is_beyond(
    against: str, fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios = {
        ("memory", "unary 32", "rate"): [0.96, 0.97, 0.98],
        ("memory", "unary 32", "p50_ms"): [1.2, 1.3, 1.4],  # has a bound against a commit alone
    }
    assert gate.report(gate.judge(ratios, gate.bounds(against))) == fails
    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert first.endswith("0.95  within")
    assert second.endswith("1.05  beyond" if fails else "1.200 to 1.400")
