"""What a program must show on the processor that is to run it, on steps that go wrong in every way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.executors import trial
from stepwell_server.program import Program, StateSpec
from support.engine.fake_executor import PLAIN

Arrays = Sequence[Any]
INPUTS = (np.random.default_rng(3).standard_normal((40, 2)).astype(np.float32),)


def exact(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
    return [inputs[0] * np.float32(2) + states[0]], [states[0] + np.float32(0.5)]


def test_sizes_that_give_other_bits_are_left_out() -> None:
    def by_size(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        outputs, after = exact(inputs, states)
        return [outputs[0] + np.float32(len(inputs[0]) < 4)], after

    sizes = (1, 2, 4, 8, 16)
    assert trial.agreeing_sizes(PLAIN, INPUTS, exact, sizes) == sizes
    assert trial.agreeing_sizes(PLAIN, INPUTS, by_size, sizes) == (4, 8, 16)


def test_a_row_that_depends_on_its_place_is_found() -> None:
    def by_place(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        outputs, after = exact(inputs, states)
        outputs[0][3:] += np.float32(1e-3)
        return outputs, after

    assert trial.agreeing_sizes(PLAIN, INPUTS, by_place, (1, 2, 3, 4, 8)) == (1, 2, 3)


def test_a_row_that_depends_on_its_neighbours_is_found() -> None:
    def by_company(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        outputs, after = exact(inputs, states)
        return [outputs[0] + outputs[0].mean() * np.float32(1e-3)], after

    assert trial.agreeing_sizes(PLAIN, INPUTS, by_company, (1, 2, 4, 8)) == (1,)


@pytest.mark.parametrize("steps", range(5))
def test_bits_that_differ_at_one_time_step_of_a_session_are_found(steps: int) -> None:
    counting = dataclasses.replace(
        PLAIN, state=(StateSpec("count", (), "float32"),), initial=(np.zeros((), np.float32),)
    )

    def by_age(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        differs = (states[0] == steps) & (len(inputs[0]) < 4)
        return [inputs[0] + differs[:, None].astype(np.float32)], [states[0] + 1]

    assert trial.agreeing_sizes(counting, INPUTS, by_age, (1, 2, 4, 8, 16)) == (4, 8, 16)


def test_bits_that_differ_only_after_a_comparison_of_coarse_numbers_are_found() -> None:
    def by_equality(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        differs = (inputs[0][:, :1] == 0) & (len(inputs[0]) < 4)
        return [inputs[0] + differs.astype(np.float32)], states

    assert np.all(INPUTS[0])
    assert trial.agreeing_sizes(PLAIN, INPUTS, by_equality, (1, 2, 4, 8, 16)) == (4, 8, 16)


def test_coarse_numbers_stay_in_the_range_of_the_inputs() -> None:
    inputs = [np.random.default_rng(3).uniform(0.6, 1.2, (16, 2)).astype(np.float32)]

    def bounded(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        assert inputs[0].min() >= 0.6
        return inputs, states

    assert trial.agreeing_sizes(PLAIN, inputs, bounded, (1, 8)) == (1, 8)


class Runs:
    """An executor as the trial sees it, which computes what it is told to."""

    def __init__(self, step: Any) -> None:
        self._step = step

    def bind(self, rows: int) -> None:
        self._in, self._state = [np.zeros((rows, 2), np.float32)], [np.zeros((rows, 2), np.float32)]

    def inputs(self) -> Arrays:
        return self._in

    def states(self) -> Arrays:
        return self._state

    def invoke(self) -> None:
        self._out, self._next = self._step(self._in, self._state)

    def outputs(self) -> Arrays:
        return list(self._out)

    def next_states(self) -> Arrays:
        return list(self._next)


def compiled() -> Program:
    tried = trial.tried(PLAIN, INPUTS, exact, 1e-3, (1, 2, 4, 8))
    return dataclasses.replace(PLAIN, trial=tried, executor_reason="compiled elsewhere")


def settled(monkeypatch: pytest.MonkeyPatch, step: Any, program: Program | None = None) -> Program:
    def load(_program: Program, *, is_exact: bool) -> Runs:
        assert is_exact, "a batch is tried at its own size"
        return Runs(step)

    monkeypatch.setattr(trial, "load_executor", load)
    known = program or compiled()
    return trial.with_sizes(known, *trial.sizes_here(known))


def test_a_program_that_does_the_same_here_runs_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    here = settled(monkeypatch, exact)
    assert (here.batch_sizes, here.executor_reason) == ((), trial.ANY_SIZE)
    padded = dataclasses.replace(compiled(), batch_sizes=(1, 2))
    assert settled(monkeypatch, exact, padded).batch_sizes == ()


def test_a_program_whose_bits_depend_on_the_size_here_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_size(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        outputs, after = exact(inputs, states)
        return [outputs[0] * np.float32(1 + 1e-6 * (len(inputs[0]) == 1))], after

    here = settled(monkeypatch, by_size)
    assert (here.batch_sizes, here.executor_reason) == ((2, 4, 8), trial.SOME_SIZES)


@pytest.mark.parametrize(
    ("factor", "message"),
    [(1.1, "output 'y' has other values on this processor"), (np.nan, "output 'y' has other values")],
)
def test_a_program_that_computes_something_else_here_is_refused(
    factor: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        outputs, after = exact(inputs, states)
        return [outputs[0] * np.float32(factor)], after

    with pytest.raises(trial.TrialError, match=message):
        settled(monkeypatch, other)


def test_rounding_and_a_few_flips_are_no_other_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        outputs, after = exact(inputs, states)
        values = outputs[0] * np.float32(1 + 1e-6)
        values[np.all(inputs[0] == INPUTS[0][21], axis=1)] += 1  # row 0 of the known answers
        return [values], after

    assert settled(monkeypatch, rounded).batch_sizes == ()


def test_a_program_that_cannot_run_or_be_tried_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_inputs: Arrays, _states: Arrays) -> tuple[Any, Any]:
        raise RuntimeError("no kernel for this\nmore")

    def lacks(_inputs: Arrays, _states: Arrays) -> tuple[Any, Any]:
        raise KeyError("state_1")

    with pytest.raises(trial.TrialError, match=r"^LiteRT cannot run it here: no kernel for this$"):
        settled(monkeypatch, fails)
    with pytest.raises(trial.TrialError, match=r"^LiteRT cannot run it here: 'state_1'$"):
        settled(monkeypatch, lacks)
    with pytest.raises(trial.TrialError, match="no known answers to test it with"):
        settled(monkeypatch, exact, PLAIN)


def test_where_no_size_will_do_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**9))

    def noisy(inputs: Arrays, states: Arrays) -> tuple[Any, Any]:
        outputs, after = exact(inputs, states)
        return [outputs[0] + np.float32(1e-6 * next(calls))], after

    with pytest.raises(trial.TrialError, match="no batch size gives a row the same bits"):
        settled(monkeypatch, noisy)


@pytest.mark.parametrize(("row_bytes", "rows"), [(0, 64), (4, 64), (1 << 16, 16), (1 << 24, 4)])
def test_fewer_rows_are_kept_where_they_are_large(row_bytes: int, rows: int) -> None:
    assert trial.rows_for(row_bytes) == rows


def test_large_sizes_are_left_out_where_they_would_take_too_long() -> None:
    assert trial.affordable(PLAIN, INPUTS, exact, trial.LITERT_SIZES, 1e9) == trial.LITERT_SIZES
    assert max(trial.affordable(PLAIN, INPUTS, exact, trial.LITERT_SIZES, 0)) == 33


def test_large_sizes_are_left_out_where_their_rows_would_fill_the_memory() -> None:
    def never(_inputs: Arrays, _states: Arrays) -> tuple[Any, Any]:
        raise AssertionError("nothing of that size is run to find out")

    wide = dataclasses.replace(PLAIN, state=(StateSpec("frame", (512, 512), "float32"),))
    assert max(trial.affordable(wide, INPUTS, never, trial.LITERT_SIZES, 1e9)) == 33
