"""What samples alone find in models whose graph is not checked, because the user trusts them.

Each of these fails if the samples are made shorter, or poorer in values, or the disturbance is left out.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from stepwell_server.compile.errors import ModelError, NotCausalError
from stepwell_server.compile.graph.samples import Sampler
from stepwell_server.compile.probe import evidence, probe
from stepwell_server.program import ProofOptions
from support.models import mixing_rows, mixing_steps
from support.models.cases import Case, before_rnn
from support.models.mixing_steps import odd

TRUSTED = ProofOptions(trust=True)
LOOK_BACK = before_rnn("back_200", odd("lag_by_masked_gather", 200))
LOOK_AHEAD = before_rnn("ahead_200", odd("lead_by_padding", 200))


def _prove(case: Case, options: ProofOptions = TRUSTED) -> Any:
    from stepwell_server.compile.probe.probe import trace_and_probe

    return trace_and_probe(case.build(), options=options)


@pytest.mark.parametrize(
    ("case", "steps", "says"),
    [
        (LOOK_BACK, None, "although --trust-causality names it: output 'rnn' differs from Keras by"),
        # fewer steps than the proof needs cannot be asked for
        pytest.param(LOOK_BACK, 150, "although --trust-causality names it", marks=pytest.mark.slow),
        # found by the disturbance
        (LOOK_AHEAD, None, "output 'rnn' moves by .* before the time step that was disturbed"),
    ],
)
def test_trusted_models_that_reach_200_steps_are_found(case: Case, steps: int | None, says: str) -> None:
    with pytest.raises(NotCausalError, match=says):
        _prove(case, ProofOptions(steps=steps, trust=True))


@pytest.mark.slow
def test_the_layer_that_differs_first_is_named() -> None:
    with pytest.raises(NotCausalError) as caught:
        _prove(LOOK_BACK)
    said = str(caught.value)
    assert re.search(
        r"the layer 'lag_by_masked_gather' \(Apply\) differs first, by [\d.e+]+ at time step \d+ of row \d; ",
        said,
    ), said


@pytest.mark.slow
def test_it_is_the_length_that_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_steps", lambda *_args: 150)
    assert _prove(LOOK_BACK).proof.unproven


@pytest.mark.slow
def test_without_the_disturbance_looking_ahead_is_not_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Sampler, "disturbed", lambda _self, _rng, _temporal, inputs: (tuple(inputs), {}))
    monkeypatch.setattr(evidence, "_refuse_moves", lambda *_args: None)
    with pytest.raises(NotCausalError) as caught:
        _prove(LOOK_AHEAD)
    assert "was disturbed" not in str(caught.value)


@pytest.mark.slow
def test_an_end_token_of_a_vocabulary_of_1000_is_found_by_its_value() -> None:
    with pytest.raises(NotCausalError, match="trust-causality"):
        _prove(mixing_rows.CASES["end_mask"])


@pytest.mark.slow
def test_it_is_the_token_that_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "hard", _plain_draw)
    monkeypatch.setattr(Sampler, "disturbed", lambda _self, _rng, _temporal, inputs: (tuple(inputs), {}))
    monkeypatch.setattr(probe, "_steps", lambda *_args: 40)
    assert _prove(mixing_rows.CASES["end_mask"]).proof.unproven


def test_a_scale_by_the_largest_value_is_found_by_large_values() -> None:
    with pytest.raises(NotCausalError):
        _prove(mixing_steps.CASES["largest_scale"])


@pytest.mark.slow
def test_it_is_the_values_that_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "hard", _plain_draw)
    monkeypatch.setattr(Sampler, "disturbed", lambda _self, _rng, _temporal, inputs: (tuple(inputs), {}))
    assert _prove(mixing_steps.CASES["largest_scale"]).proof.unproven


def test_rows_that_are_mixed_are_found_also_in_trusted_models() -> None:
    with pytest.raises(ModelError, match=r"rows of a batch are not independent|moves by|differs by"):
        _prove(mixing_rows.CASES["mean_over_rows"])


@pytest.mark.parametrize(
    "name", ["noise", "counter", "noise_of_tensorflow", "rows_last", "state_from_inputs"]
)
def test_what_no_trust_can_mend_is_refused_all_the_same(name: str) -> None:
    case = mixing_rows.CASES[name]
    with pytest.raises(ModelError, match=case.refused):
        _prove(case)


@pytest.mark.parametrize(
    "layer",
    [
        odd("other_above_a_length", 300),
        odd("other_above_a_length_by_tensors", 300),
        odd("other_for_one_step"),
        odd("other_for_one_step_in_a_loop"),
        odd("another_number_for_one_step"),
        odd("other_below_a_length_in_wiring"),
    ],
    ids=["300", "300_by_tensors", "one_step", "loop", "number", "wiring"],
)
def test_differences_for_a_single_step_are_found_in_the_graph(
    trace_and_probe: Any, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is the graph of one step: it must be the one that was proven on hundreds."""
    from stepwell_server.compile.causality.cut import SCALES

    assert SCALES[0].first.steps > 300
    monkeypatch.setattr(evidence, "gather", _not_reached)
    case = before_rnn("other", layer)
    with pytest.raises(
        NotCausalError,
        match=r"the layer '\w+' \(Apply\) computes something different for one time step than for many",
    ):
        trace_and_probe(case.build())


def _not_reached(*_args: Any) -> Any:
    raise AssertionError("the graph alone must refuse")


def _plain_draw(self: Sampler, rng: Any, temporal: Any, steps: int) -> Any:
    """Values as anyone would draw them: of the size of 1, and tokens that nothing compares with."""
    drawn = dataclasses.replace(self, tables={}).draw(rng, temporal, steps, 8)
    return tuple(value + 5 if value.dtype.kind == "i" else value.clip(-4, 4) for value in drawn)
