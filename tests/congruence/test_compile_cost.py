"""What a compiled model says about its cost: multiplications of a step, and the values of its state that a step replaces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from support.models.programs import compile_model
from support.samples import one_in

Layers = Callable[[Any, Any], Any]


def _padded(keras: Any, x: Any, steps: int) -> Any:
    space = [(0, 0)] * (len(x.shape) - 3)
    if not space:
        return keras.layers.ZeroPadding1D((steps, 0))(x)
    return getattr(keras.layers, f"ZeroPadding{len(space) + 1}D")(((steps, 0), *space))(x)


COUNTS: dict[str, tuple[tuple[int, ...], Layers, int]] = {
    "dense": ((6,), lambda k, x: k.layers.Dense(5)(x), 6 * 5),
    "dense_at_each_place": ((3, 6), lambda k, x: k.layers.Dense(5)(x), 3 * 6 * 5),
    "einsum": ((3, 6), lambda k, x: k.layers.EinsumDense("btsf,fg->btsg", (None, 3, 5))(x), 3 * 6 * 5),
    "lstm": ((6,), lambda k, x: k.layers.LSTM(5)(x), 4 * (6 + 5) * 5),
    "gru": ((6,), lambda k, x: k.layers.GRU(5, return_sequences=True)(x), 3 * (6 + 5) * 5),
    "conv": ((6,), lambda k, x: k.layers.Conv1D(5, 3, padding="causal", dilation_rate=2)(x), 3 * 6 * 5),
    "conv_grouped": ((6,), lambda k, x: k.layers.Conv1D(4, 3, padding="causal", groups=2)(x), 3 * 3 * 4),
    "depthwise": ((6,), lambda k, x: k.layers.DepthwiseConv1D(3)(_padded(k, x, 2)), 3 * 6),
    "conv_2d": ((4, 6), lambda k, x: k.layers.Conv2D(5, (3, 2))(_padded(k, x, 2)), 3 * 3 * 2 * 6 * 5),
    "transposed": (
        (4, 6),
        lambda k, x: k.layers.TimeDistributed(k.layers.Conv1DTranspose(5, 3))(x),
        4 * 6 * 3 * 5,
    ),
    "each_with_each": ((3, 6), lambda k, x: k.ops.matmul(x, k.ops.swapaxes(x, 2, 3)), 3 * 3 * 6),
    "sum": ((6,), lambda k, x: k.ops.cumsum(x, 1), 0),
}


@pytest.mark.parametrize("name", one_in(3, COUNTS))
def test_multiplications_of_one_row_and_time_step(name: str, tmp_path: Path) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    features, layers, expected = COUNTS[name]
    x = keras.Input((None, *features))
    keras.Model(x, layers(keras, x)).save(tmp_path / "model.keras")
    assert compile_model(tmp_path / "model.keras").multiply_adds == expected


@pytest.mark.slow
def test_a_step_replaces_one_time_step_of_each_window(tmp_path: Path) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    x = keras.Input((None, 6))
    y = keras.layers.Conv1D(5, 3, padding="causal", dilation_rate=4, name="conv")(x)
    y = keras.ops.cumsum(keras.layers.GRU(7, return_sequences=True, name="gru")(y), 1)
    keras.Model(x, y).save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras")
    windows = {spec.name: spec.window for spec in program.state}
    assert sorted(windows.values()) == [0, 0, 8]
    assert windows["conv/last"] == 8
    assert program.state_row_bytes == 4 * (8 * 6 + 7 + 7)
    assert program.changed_state_row_bytes == 4 * (6 + 7 + 7)


def test_a_compilation_does_nothing_twice(
    keras: Any, trace_and_probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorflow.python.util import tf_inspect

    from stepwell_server.compile.probe.check import check_against_keras
    from stepwell_server.compile.probe.sequences import step_of_function
    from stepwell_server.compile.probe.whole_call import WholeCall

    perturbed = mock.create_autospec(WholeCall.perturbed, side_effect=WholeCall.perturbed)
    called = mock.create_autospec(WholeCall.__call__, side_effect=WholeCall.__call__)
    monkeypatch.setattr(WholeCall, "perturbed", perturbed)
    monkeypatch.setattr(WholeCall, "__call__", called)
    monkeypatch.setattr(tf_inspect, "getcallargs", None)  # TensorFlow's, to warn of arguments of its own
    x = keras.Input((None, 4))
    traced = trace_and_probe(keras.Model(x, keras.layers.Softmax()(keras.layers.Dense(3)(x))))
    check_against_keras(traced, step_of_function(traced.plan, traced.function))
    assert called.call_count == 2
    assert perturbed.call_count == 0
    assert [sample.noise[name].shape for sample in traced.evidence for name in sample.noise] == [(8, 512)] * 2
    assert perturbed.call_count == 2


def test_a_function_is_converted_without_saving_and_loading_it(
    keras: Any, trace_and_probe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter does that, given a function: it takes twice as long as everything else."""
    from tensorflow.python.saved_model import load, save

    from stepwell_server.compile.program import convert

    model = keras.Sequential([keras.Input((None, 4)), keras.layers.GRU(3, return_sequences=True)])
    traced = trace_and_probe(model)
    called = mock.Mock()
    monkeypatch.setattr(save, "save_and_return_nodes", called)
    monkeypatch.setattr(load, "load_partial", called)
    assert convert.to_litert(convert.freeze(traced.function), model)
    called.assert_not_called()


def test_a_tensor_may_be_several_results_and_an_input() -> None:
    from ai_edge_litert.interpreter import Interpreter

    from stepwell_server.compile.graph.tensorflow_setup import tf
    from stepwell_server.compile.program import convert

    def step(**given: Any) -> dict[str, Any]:
        total = given["in_0"] + given["state_0"]
        return {"next_0": given["in_0"], "next_1": total, "out_0": total, "out_1": given["state_0"]}

    spec = {name: tf.TensorSpec([None, 3], tf.float32, name) for name in ("in_0", "state_0")}
    frozen = convert.freeze(tf.function(step).get_concrete_function(**spec))
    runner = Interpreter(model_content=convert.to_litert(frozen, None)).get_signature_runner()
    one, two = np.random.default_rng(3).standard_normal((2, 5, 3)).astype(np.float32)
    found = runner(in_0=one, state_0=two)
    expected = {"next_0": one, "next_1": one + two, "out_0": one + two, "out_1": two}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_only_models_that_may_run_loops_are_traced_for_those(
    keras: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepwell_server.compile.causality import cut
    from stepwell_server.compile.graph.interface import describe
    from support.models.odd_layers import Apply

    traced = list[int]()
    original = cut._cut

    def noted(interface: Any, temporal: Any, scale: Any, *args: Any, **options: Any) -> Any:
        traced.append(scale.steps)
        return original(interface, temporal, scale, *args, **options)

    monkeypatch.setattr(cut, "_cut", noted)
    x = keras.Input((None, 3))
    both = [scale.steps for scale in cut.SCALES[0].both]
    layers: list[tuple[Any, bool]] = [
        (keras.layers.LSTM(2, return_sequences=True), False),
        (keras.layers.TimeDistributed(keras.layers.Dense(2)), False),
        (lambda x: keras.ops.cast(x, "float16"), True),
        (keras.layers.Lambda(lambda x: 2 * x), True),
        (Apply("cumulative_sum", 1), True),
    ]
    for layer, may_loop in layers:
        traced.clear()
        cut.cut(describe(keras.Model(x, layer(x))), [True])
        assert traced == [cut._SMALL[0].steps] * may_loop + both
