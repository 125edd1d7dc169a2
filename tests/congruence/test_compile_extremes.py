"""What LiteRT makes of an operation is held against TensorFlow at inputs of every size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.executors import load_executor
from stepwell_server.program import ProofOptions
from support.models import zoo
from support.models.compiled import Compiled
from support.models.mixing_steps import odd
from support.models.programs import compile_model


def _compiled(model: Any, folder: Path, **options: Any) -> Any:
    zoo.randomize(model)
    model.save(folder / "model.keras")
    return compile_model(folder / "model.keras", options=ProofOptions(**options))


def test_quotients_are_rounded_as_by_keras(keras: Any, tmp_path: Path) -> None:
    """Whole quotients decide between two parts of an hour, two codes, or two rows of a table."""
    x, ops = keras.Input((None, 1), name="x"), keras.ops
    by = np.array([0.1, 0.3, 0.7, 3.0, 7.0, 8.0, 49.0, 60.0], np.float32)
    delayed = ops.pad(x / 7.0, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    outputs = [
        ops.floor(x / by),
        x // by,
        (x + 21.0) // (x * 0.1 + 0.05),
        ops.cast(-x / by > -3.0, "float32"),
        ops.floor(delayed),
    ]
    model = keras.Model(x, ops.concatenate([*outputs, x / by], -1))
    model.save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras")
    assert program.executor == "litert", program.executor_reason
    whole = np.arange(-300.0, 300.0, dtype=np.float32)[:, None] * by
    numbers = whole.ravel()[None, :, None]
    found = Compiled("quotients", model, program).stepped([numbers], numbers.shape[1])
    np.testing.assert_array_equal(found[program.outputs[0].name], np.asarray(model(numbers)))


def test_softplus_does_not_overflow(keras: Any, tmp_path: Path) -> None:
    x = keras.Input((None, 1), dtype="int32")
    hidden = keras.ops.softplus(keras.ops.cast(x, "float32"))
    model = keras.Model(x, [hidden, keras.layers.GRU(3, return_sequences=True)(hidden)])
    program = _compiled(model, tmp_path)
    assert program.executor == "litert"
    executor = load_executor(program)
    values = np.array([[0], [1], [50], [100], [3000], [1_000_000]], np.int32)
    executor.bind(len(values))
    executor.inputs()[0][...] = values
    executor.states()[0][...] = 0
    executor.invoke()
    whole: list[Any] = [np.array(value)[:, 0] for value in model(values[:, None])]
    found: list[Any] = list(executor.outputs())
    for one, two in zip(whole, found, strict=True):
        np.testing.assert_allclose(two, one, rtol=2e-6, atol=2e-6)


def test_what_has_a_gradient_of_its_own_runs_on_litert(keras: Any, tmp_path: Path) -> None:
    x = keras.Input((None, 3))
    model = keras.Model(x, keras.layers.LSTM(3)(keras.activations.silu(0.01 * x)))
    assert _compiled(model, tmp_path).executor == "litert"


@pytest.mark.slow
def test_a_step_that_overflows_for_large_inputs_is_found(trace_and_probe: Any) -> None:
    from stepwell_server.compile.probe.extremes import worst_at_extremes
    from stepwell_server.compile.probe.sequences import step_of_function

    traced = trace_and_probe(zoo.build("lstm_dense"))
    step = step_of_function(traced.plan, traced.function)

    def overflowing(inputs: Sequence[Any], states: Sequence[Any]) -> tuple[Any, Any]:
        outputs, after = step(inputs, states)
        first = np.array(outputs[0])
        first[np.max(np.abs(inputs[0]), axis=1) > 1e5] = np.inf
        return [first, *outputs[1:]], after

    assert worst_at_extremes(traced, step) == ""
    assert "'y' differs from TensorFlow's for inputs of the size 100000" in worst_at_extremes(
        traced, overflowing
    )


@pytest.mark.slow
def test_tokens_given_as_floats_are_compared_and_not_only_trusted(keras: Any, tmp_path: Path) -> None:
    """Noise would change an index into another one, and no sequence could be compared."""
    tokens = keras.Input((None,))
    embedded = keras.layers.Embedding(10, 4)(tokens)
    good = keras.Model(tokens, keras.layers.LSTM(3, return_sequences=True)(embedded))
    assert _compiled(good, tmp_path).proof.compared == 1
    lagging = odd("lag_by_masked_gather", 16)(keras.layers)(embedded)
    bad = keras.Model(tokens, keras.layers.LSTM(3, return_sequences=True)(lagging))
    with pytest.raises(
        ModelError, match=r"although --trust-causality names it: output .* differs from Keras"
    ):
        _compiled(bad, tmp_path, trust=True)
