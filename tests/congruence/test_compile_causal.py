"""Models with operations that look back: stepped = whole, and a row has the same bits whoever shares its batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from stepwell_server.compile.errors import ModelError
from stepwell_server.engine.executors import litert, load_executor
from stepwell_server.engine.executors.step_function import Step, initial_rows, step_of_executor
from stepwell_server.program import FLATBUFFER, Program
from support.models import causal, everyday
from support.models.compiled import Compiled, causal_model
from support.models.programs import compile_model
from support.samples import one_in, only

Array = npt.NDArray[Any]
TOLERANCE = 2e-5
#: Names and shapes of states, and what they hold before the first step, if that is not zero.
STATES: dict[str, dict[str, tuple[int, ...]]] = {
    "conv": {"conv/last": (2, 4)},
    "conv_kernel_1": {},
    "conv_dilated": {"conv1d/last": (32, 4)},
    "conv_2d": {"conv2d/last": (2, 8, 2)},
    "shifted_decoder": {"gru/h": (3,), "gru/last": (1, 4)},
    "cumulative_sum": {"cumsum/total": (4,)},
    "cumulative_mean": {"cumsum/total": (4,), "cumsum_1/total": (4,)},
    "cumulative_norm_of_values": {
        "cumulative_norm_of_values/total": (),
        "cumulative_norm_of_values#2/total": (),
        "cumulative_norm_of_values/steps": (),
        "cumulative_norm_of_values#2/steps": (),
    },
    "mean_of_all_samples": {"less_the_mean_so_far/total": (), "less_the_mean_so_far/steps": ()},
    "cumulative_sum_of_late_samples": {"cumsum/steps": (), "cumsum/total": (), "zero_padding1d/steps": ()},
    "difference_by_joining": {"subtract/last": (1, 4), "concatenate/steps": ()},
    "block_called_twice": {"block/conv/last": (2, 4), "block/conv#2/last": (2, 4)},
    "around_an_lstm": {
        "lstm/h": (4,),
        "lstm/c": (4,),
        "conv1d/last": (2, 4),
        "behind/last": (3, 4),
    },
}
#: LiteRT has no inverse of the Fourier transform.
ON_TENSORFLOW = {"short_time_fourier"}
#: The last two are compiled for tests of executors, too.
_QUICK = (
    *("conv", "conv_2d_strided_in_space", "past_beside_constants", "numbered_differences"),
    *("sum_of_differences", "shifted_decoder", "around_an_lstm", "transposed"),
)
#: What a step reads of windows that are rings.
TAKEN = {"conv_dilated": [(2, 4)], "shift": [(3, 4)], "difference_to_shifted": [(1, 4)]}


@pytest.fixture(scope="module", params=only(_QUICK, causal.CAUSAL))
def model(request: pytest.FixtureRequest) -> Compiled:
    return causal_model(request.param)


@dataclasses.dataclass
class _Session:
    """One session: its rows, all inputs since its last reset, and what it returned for them."""

    states: list[Array]
    inputs: list[list[Array]] = dataclasses.field(default_factory=list)
    outputs: list[list[Array]] = dataclasses.field(default_factory=list)

    def fork(self) -> _Session:
        return _Session(list(self.states), list(self.inputs), list(self.outputs))


def test_sessions_that_share_batches_fork_and_reset_equal_keras(model: Compiled) -> None:
    rng, program = np.random.default_rng(3), model.program
    step = step_of_executor(load_executor(program))
    sizes = [1, 3, 2, 1]
    sessions = [_Session(initial_rows(program.initial, rows)) for rows in sizes]
    for _ in range(45):
        chosen = [sessions[i] for i in rng.permutation(len(sessions))[: rng.integers(1, len(sessions) + 1)]]
        _step_together(program, step, chosen, rng)
        what = rng.random()
        if what < 0.05:
            place = int(rng.integers(len(sessions)))
            rows = len(sessions[place].states[0]) if program.state else sizes[place % len(sizes)]
            sessions[place] = _Session(initial_rows(program.initial, rows))
        elif what < 0.1 and len(sessions) < 8:
            sessions.append(sessions[int(rng.integers(len(sessions)))].fork())
    for session in sessions:
        _compare(model, session)


def _step_together(
    program: Program, step: Step, chosen: Sequence[_Session], rng: np.random.Generator
) -> None:
    """Step some sessions in one batch, each of them also alone: the bits must be the same."""
    rows = [len(session.states[0]) if session.states else 2 for session in chosen]
    drawn = [
        [rng.standard_normal((count, *spec.shape)).astype(spec.dtype) for spec in program.inputs]
        for count in rows
    ]
    together = step(
        [np.concatenate(parts) for parts in zip(*drawn, strict=True)],
        [np.concatenate(parts) for parts in zip(*(session.states for session in chosen), strict=True)],
    )
    outputs, states = ([np.array(value) for value in values] for values in together)
    first = 0
    for session, count, given in zip(chosen, rows, drawn, strict=True):
        own = slice(first, first + count)
        first += count
        alone = step(given, session.states)
        for one, all_of_them in zip((*alone[0], *alone[1]), (*outputs, *states), strict=True):
            assert np.asarray(one).tobytes() == np.ascontiguousarray(all_of_them[own]).tobytes()
        session.states = [np.array(value[own]) for value in states]
        session.inputs.append(given)
        session.outputs.append([value[own] for value in outputs])


def _compare(model: Compiled, session: _Session) -> None:
    steps = len(session.inputs)
    if steps < 6:  # Keras fails on sequences shorter than what some models leave out.
        return
    inputs = [np.stack(values, 1) for values in zip(*session.inputs, strict=True)]
    whole = model.keras(inputs)
    for i, spec in enumerate(model.program.outputs):
        seen = [outputs[i] for outputs in session.outputs]
        stepped = np.stack(seen, 1) if spec.temporal else seen[-1]
        expected = whole[spec.name]
        scale = max(1.0, float(np.max(np.abs(expected))))
        np.testing.assert_allclose(stepped, expected, rtol=0, atol=TOLERANCE * scale, err_msg=spec.name)


def test_it_is_proven_and_its_states_are_named(model: Compiled) -> None:
    program = model.program
    assert not program.proof.unproven
    assert program.executor == ("tensorflow" if model.name in ON_TENSORFLOW else "litert")
    if program.executor == "litert":
        assert not program.batch_sizes
        assert not litert.places_tensors_late(program.files[FLATBUFFER])
    names = {spec.name: spec.shape for spec in program.state}
    assert names == STATES.get(model.name, names)
    taken = [spec.shape for spec in program.states_taken]
    assert taken == TAKEN.get(model.name, taken)


@pytest.mark.slow
def test_a_window_starts_with_what_the_layers_make_of_the_padding() -> None:
    model = causal_model("conv_on_padding_with_bias")
    (window,) = model.program.initial
    dense = next(layer for layer in model.model.layers if type(layer).__name__ == "Dense")
    expected = np.tanh(np.asarray(dense.bias))
    np.testing.assert_allclose(
        np.asarray(window, np.float32), np.broadcast_to(expected, window.shape), atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers",
    [
        lambda k, x: k.ops.pad(x[:, :-600], ((0, 0), (600, 0), (0, 0))),
        lambda k, x: k.layers.Cropping1D((0, 600))(k.layers.ZeroPadding1D((600, 0))(x)) + x,
        lambda k, x: k.ops.cumsum(x, 1) - k.ops.pad(k.ops.cumsum(x, 1)[:, :-600], ((0, 0), (600, 0), (0, 0))),
    ],
)
def test_shifts_may_be_longer_than_the_usual_traces(keras: Any, tmp_path: Path, layers: Any) -> None:
    x = keras.Input((None, 2))
    model = keras.Model(x, layers(keras, x))
    model.save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras")
    made = Compiled("long", model, program)
    inputs = made.draw(5, 2, 700)
    (whole,), (stepped,) = made.keras(inputs).values(), made.stepped(inputs, 700).values()
    np.testing.assert_allclose(stepped, whole, rtol=0, atol=TOLERANCE * float(np.max(np.abs(whole))))


@pytest.mark.slow
def test_other_weights_are_compiled_with_the_same_trace(tmp_path: Path) -> None:
    """Also where padding goes through layers, so that the states before the first step depend on weights."""
    from stepwell_server.compile.program.pipeline import compile_traced
    from stepwell_server.compile.program.recompile import compile_again, may_be_reused

    for name in ("conv_on_padding_with_bias", "tcn"):
        for seed in (1, 2):
            causal.build(name, seed).save(tmp_path / f"{seed}.keras")
        program, traced = compile_traced(tmp_path / "1.keras")
        assert may_be_reused(traced, program)
        assert program.architecture is not None
        again = compile_again(traced, program.architecture, tmp_path / "2.keras", lambda _stage: None)
        anew = compile_model(tmp_path / "2.keras")
        for one, two in zip(again.initial, anew.initial, strict=True):
            np.testing.assert_array_equal(one, two)
        compiled_again = Compiled(name, None, again), Compiled(name, None, anew)
        x = [np.random.default_rng(4).standard_normal((2, 9, 4)).astype(np.float32)]
        bits = [[value.tobytes() for value in each.stepped(x, 9).values()] for each in compiled_again]
        assert bits[0] == bits[1]


TRANSPOSED = [name for name in causal.CAUSAL if name.startswith("transposed")]


@pytest.mark.parametrize("name", one_in(len(TRANSPOSED), TRANSPOSED))
def test_an_infinite_element_reaches_what_it_reaches_in_keras(name: str) -> None:
    """A tap of zero, in front of an element that takes no part in a result, would make NaN of it."""
    model = causal_model(name)
    rng, steps = np.random.default_rng(1), 24
    for value in (np.inf, -np.inf, np.nan):
        x = rng.standard_normal((3, steps, *causal.FEATURES[name])).astype(np.float32)
        x[1, 9].flat[0], x[2, 10] = value, value
        stepped, whole = model.stepped([x], steps), model.keras([x])
        for output, expected in whole.items():
            np.testing.assert_array_equal(np.isnan(stepped[output]), np.isnan(expected))
            np.testing.assert_array_equal(np.isinf(stepped[output]), np.isinf(expected))
            assert np.isfinite(stepped[output][0]).all()
            assert not np.isfinite(expected).all()
            finite = np.isfinite(expected)
            np.testing.assert_allclose(stepped[output][finite], expected[finite], rtol=0, atol=TOLERANCE)


REFUSED: dict[str, tuple[causal.Layers, str]] = {
    "padded on both sides": (
        lambda k, x: k.layers.Conv1D(2, 3, name="conv")(k.layers.ZeroPadding1D(1)(x)),
        r"not causal: the layer 'conv' \(Conv1D\) looks ahead: it has a window of 3 over the time axis, 1 time step ahead; use",
    ),
    "padded at the end of samples": (
        lambda k, x: causal._frames(
            k, k.layers.Conv1D(2, 4, strides=2, padding="same", name="conv")(causal._samples(k, x)), 2
        ),
        r"'conv' \(Conv1D\) looks ahead: it has a window of 4 over the time axis, 1 time step ahead; use .*causal",
    ),
    "left out at the front": (
        lambda k, x: k.layers.Cropping1D((2, 0), name="crop")(x),
        r"'crop' \(Cropping1D\) looks ahead: it takes a part of the time axis, 2 time steps ahead; use forward",
    ),
    "left out at the end": (
        lambda k, x: k.layers.Cropping1D((0, 2), name="crop")(x),
        r"step by step: the layer 'crop' \(Cropping1D\) returns 2 fewer elements than there are time steps; make",
    ),
    "longer": (
        lambda k, x: k.layers.ZeroPadding1D((2, 0), name="pad")(x),
        r"step by step: the layer 'pad' \(ZeroPadding1D\) returns 2 more elements than there are time steps; make",
    ),
    "the end of a shifted sequence": (
        lambda k, x: k.ops.pad(x[:, :-2], ((0, 0), (0, 2), (0, 0))),
        r"step by step: the operation 'pad\w*' \(Pad\) pads the end of a sequence that lags behind; make",
    ),
    "the end of a late sequence, pooled": (
        lambda k, x: k.layers.MaxPooling1D(3, 1, padding="same", name="pool")(
            k.layers.Cropping1D((0, 1))(k.layers.ZeroPadding1D((1, 0))(x))
        ),
        r"'pool' \(MaxPooling1D\) pools 3 elements of the time axis after the end of a sequence that lags behind; make",
    ),
    "pooled on both sides": (
        lambda k, x: k.layers.AveragePooling1D(3, 1, padding="same", name="pool")(x),
        r"'pool' \(AveragePooling1D\) looks ahead: it pools 3 elements of the time axis, 1 time step ahead; use",
    ),
    "one of every two steps": (
        lambda k, x: x[:, ::2],
        r"'get_item\w*' \(GetItem\) takes one of every 2 elements of the time axis, but a time step brings one element; use strides",
    ),
    "one of every three of four samples": (
        lambda k, x: k.layers.Reshape((-1, 1))(x)[:, ::3],
        r"takes one of every 3 elements of the time axis, but a time step brings 4 elements; use strides of 1 over time, or",
    ),
    "every second step": (
        lambda k, x: k.layers.Conv1D(2, 2, strides=2, padding="causal", name="conv")(x),
        r"has a window of 2 over the time axis and moves by 2, but a time step brings one element; use strides of 1",
    ),
    "every fourth of three samples": (
        lambda k, x: k.layers.Conv1D(2, 4, 4, name="conv")(k.layers.Reshape((-1, 1))(x[..., :3])),
        r"the layer 'conv' \(Conv1D\) has a window of 4 .* moves by 4, but a time step brings 3 elements; use",
    ),
    "samples that look ahead": (
        lambda k, x: k.layers.Reshape((-1, 4))(
            k.layers.Conv1D(1, 4, name="conv")(k.layers.ZeroPadding1D((2, 1))(k.layers.Reshape((-1, 1))(x)))
        ),
        r"the layer 'conv' \(Conv1D\) looks ahead: it has a window of 4 over the time axis, 1 time step ahead; use",
    ),
    "samples instead of frames": (
        lambda k, x: k.layers.Conv1D(2, 3, padding="causal", name="conv")(k.layers.Reshape((-1, 1))(x)),
        r"the layer 'conv' \(Conv1D\) returns 4 elements for each time step; use strides of 1 over time, or",
    ),
    "samples of uneven padding": (
        lambda k, x: k.layers.Conv1D(2, 6, padding="causal", name="conv")(
            k.layers.ZeroPadding1D((1, 0))(k.layers.Reshape((-1, 1))(x))
        ),
        r"the layer 'conv' \(Conv1D\) returns 4 elements for each time step; use strides of 1 over time, or",
    ),
    "all later ones": (
        lambda k, x: k.ops.flip(k.ops.cumsum(k.ops.flip(x, 1), 1), 1),
        r"looks ahead: it reverses the time axis",
    ),
    "the last of later ones": (
        lambda k, x: k.layers.Dense(2)(k.layers.Conv1D(2, 3, name="conv")(x)[:, -1]),
        r"takes number -1 of the time axis",
    ),
    "different values in front": (
        lambda k, x: k.ops.concatenate(
            [k.ops.zeros_like(x[:, :1]), k.ops.ones_like(x[:, :1]), x[:, 2:]], axis=1
        ),
        r"the operation 'concatenate\w*' \(Concatenate\) .*joins different values in front of the time axis; ",
    ),
    "number counted from the end": (
        lambda k, x: x * k.ops.flip(k.ops.cumsum(k.ops.ones_like(x), 1), 1),
        r"looks ahead: it reverses the time axis",
    ),
    "around the end": (
        causal.apply("rolled_around", 2),
        r"'rolled_around' \(Apply\) .* it shifts the time axis around its end, and uses what then comes first; use",
    ),
    **{
        f"{kind} with a choice": (
            causal.apply(kind, 3),
            rf"'{kind}' \(Apply\) .* it shifts the time axis around its end, and uses what then comes first; use",
        )
        for kind in (
            "rolled_where_too_few",
            "rolled_where_late",
            "rolled_where_large",
            "rolled_on_both_sides",
        )
    },
    "later values mirrored in front": (
        lambda k, x: k.layers.Conv1D(2, 3, name="conv")(k.ops.pad(x, ((0, 0), (2, 0), (0, 0)), "symmetric")),
        r"'pad\w*' \(Pad\) .*pads the time axis; use",
    ),
    "copies of the second value in front": (
        lambda k, x: k.layers.Conv1D(2, 3)(k.ops.concatenate([x[:, 1:2], x[:, 1:2], x], 1)),
        r"takes number 1 of the time axis at each step, 1 time step ahead",
    ),
    "different values of each row in front": (
        lambda k, x: k.layers.Conv1D(2, 3)(k.ops.concatenate([x[:, :1], 2 * x[:, :1], x], 1)),
        r"\(Concatenate\) .*joins values along the time axis; use",
    ),
    "sum of different constants": (
        causal.apply("cumulated_numbers"),
        r"step by step: the layer 'cumulated_numbers' \(Apply\) has a different constant for each time step; pass",
    ),
    "other for the fewest steps": (
        lambda k, x: k.layers.ZeroPadding1D((2, 0))(
            causal.apply("other_for_one_step")(k, k.layers.Conv1D(2, 3)(x))
        ),
        r"the layer 'other_for_one_step' \(Apply\) computes something different for one time step than for many; make",
    ),
    "a sum of later ones": (
        lambda k, x: k.ops.cumsum(x[:, 1:], 1),
        r"not causal: the operation 'get_item\w*' \(GetItem\) looks ahead: it takes a part of the time axis, 1 time step",
    ),
}


@pytest.mark.parametrize("name", one_in(4, REFUSED))
def test_what_looks_ahead_or_has_another_length_is_refused(
    trace_and_probe: Any, keras: Any, name: str
) -> None:
    make, said = REFUSED[name]
    x = keras.Input((None, 4), name="x")
    y = make(keras, x)
    with pytest.raises(ModelError, match=said):
        trace_and_probe(keras.Model(x, y))


def _conditioned(keras: Any, x: Any, static: Any) -> Any:
    """Scale and shift padding too, as FiLM does, twice."""
    for filters in (3, 5):
        x = keras.layers.ZeroPadding1D((4, 0))(x)
        scale, shift = (keras.ops.expand_dims(keras.layers.Dense(x.shape[-1])(static), 1) for _ in range(2))
        x = keras.layers.Conv1D(filters, 3, dilation_rate=2, activation="tanh")(x * scale + shift)
    return x


@pytest.mark.slow
def test_padding_may_depend_on_a_static_input(keras: Any, tmp_path: Path) -> None:
    """A window then has a value of each row before the first time step, with other rows in one batch."""
    x, static = keras.Input((None, 4), name="x"), keras.Input((4,), name="static")
    model = keras.Model([x, static], _conditioned(keras, x, static))
    model.save(tmp_path / "model.keras")
    made = Compiled("conditioned", model, compile_model(tmp_path / "model.keras"))
    assert not made.program.proof.unproven
    for steps in (1, 3, 40):
        inputs = made.draw(steps, 3, steps)
        (whole,), (stepped,) = made.keras(inputs).values(), made.stepped(inputs, steps).values()
        np.testing.assert_allclose(stepped, whole, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_different_padding_that_depends_on_a_static_input_is_refused(
    trace_and_probe: Any, keras: Any
) -> None:
    x, static = keras.Input((None, 4)), keras.Input((4,))
    padded = keras.ops.pad(keras.layers.ZeroPadding1D((2, 0))(x), ((0, 0), (1, 0), (0, 0)), constant_values=1)
    padded = padded + keras.ops.expand_dims(static, 1)
    said = (
        r"step by step: the operation 'add\w*' \(Add\) computes padding with a value of the inputs that has no time axis, "
        r"which a session does not know before its first step; do that before the padding, or pass"
    )
    with pytest.raises(ModelError, match=said):
        trace_and_probe(keras.Model([x, static], keras.layers.Conv1D(2, 4, name="conv")(padded)))


@pytest.mark.slow
@pytest.mark.parametrize("masks", [False, True])
def test_a_first_state_may_depend_on_a_static_input(keras: Any, tmp_path: Path, *, masks: bool) -> None:
    """Each row has its own, also where its first time steps are masked."""
    x, static = keras.Input((None, 4), name="x"), keras.Input((3,), name="static")
    first = [keras.layers.Dense(5, activation="tanh")(static) for _ in range(2)]
    shown = keras.layers.Masking(0.0)(x) if masks else x
    y = keras.layers.LSTM(5, return_sequences=True, name="lstm")(shown, initial_state=first)
    model = keras.Model([x, static], keras.layers.Dense(2)(y))
    model.save(tmp_path / "model.keras")
    made = Compiled("first_state", model, compile_model(tmp_path / "model.keras"))
    assert not made.program.proof.unproven
    assert "lstm/steps" in {spec.name for spec in made.program.state}
    for steps in (1, 3, 40):
        inputs = made.draw(steps, 3, steps)
        if masks:
            inputs[0][:2, :2] = 0.0
        (whole,), (stepped,) = made.keras(inputs).values(), made.stepped(inputs, steps).values()
        np.testing.assert_allclose(stepped, whole, rtol=0, atol=TOLERANCE)


FIRST_STATES: dict[str, tuple[Any, str]] = {
    "of the last step": (
        lambda k, x, s: k.layers.Dense(5)(x[:, -1]) + k.layers.Dense(5)(s),
        r"the initial state is computed from the model's inputs: the layer 'gru'",
    ),
    "of a later step": (
        lambda k, x, s: k.layers.Dense(5)(x[:, 1]),
        r"\(GetItem\) looks ahead: it takes number 1",
    ),
    "of all steps": (
        lambda k, x, s: k.layers.Dense(5)(k.ops.mean(x, 1)),
        r"the operation 'mean\w*' \(Mean\) mixes time steps: it takes the mean over the time axis",
    ),
    "of other rows": (
        lambda k, x, s: k.layers.Dense(5)(s) + k.layers.Dense(5)(k.ops.flip(s, 0)),
        r"the rows of a batch are not independent of each other: the operation 'flip\w*' \(Flip\) reverses the rows",
    ),
    "of another sequence's end": (
        lambda k, x, s: k.layers.GRU(5, name="encoder")(x),
        r"the initial state is computed from the model's inputs: the layer 'gru'",
    ),
}


@pytest.mark.parametrize("name", one_in(3, FIRST_STATES))
def test_a_first_state_that_is_not_known_at_the_first_step_is_refused(
    trace_and_probe: Any, keras: Any, name: str
) -> None:
    make, said = FIRST_STATES[name]
    x, static = keras.Input((None, 4)), keras.Input((3,))
    y = keras.layers.GRU(5, return_sequences=True, name="gru")(x, initial_state=make(keras, x, static))
    with pytest.raises(ModelError, match=said):
        trace_and_probe(keras.Model([x, static], y))


@pytest.mark.parametrize("name", one_in(4, causal.REFUSED_LOOPS))
def test_a_loop_over_time_that_is_not_step_by_step_is_refused(
    trace_and_probe: Any, keras: Any, name: str
) -> None:
    said = causal.REFUSED_LOOPS[name]
    x = keras.Input((None, 4))
    with pytest.raises(ModelError, match=rf"the layer '{name}' \(Apply\) .*{said}"):
        trace_and_probe(keras.Model(x, causal.apply_loop(name)(keras, x)))


@pytest.mark.slow
def test_the_first_layer_that_differs_is_named_in_a_model_that_looks_back(
    trace_and_probe: Any, keras: Any
) -> None:
    """One length among those that are compared, and not among those that are traced."""
    x = keras.Input((None, 4))
    y = keras.layers.Conv1D(4, 3)(keras.layers.ZeroPadding1D((2, 0))(x))
    y = keras.layers.Conv1D(4, 2, padding="causal")(causal.apply("other_for_a_length", 7)(keras, y))
    with pytest.raises(
        ModelError, match=r"the layer 'other_for_a_length' \(Apply\) differs first, by .* at time"
    ):
        trace_and_probe(keras.Model(x, y))


@pytest.mark.slow
def test_pooling_with_gaps_is_not_taken_for_pooling_without(trace_and_probe: Any, keras: Any) -> None:
    """Only convolutions are traced with their gaps."""
    import tensorflow as tf

    class Gaps(keras.Layer):
        def call(self, x: Any) -> Any:
            return tf.nn.pool(tf.pad(x, [[0, 0], [4, 0], [0, 0]]), [3], "MAX", padding="VALID", dilations=[2])

    x = keras.Input((None, 4))
    with pytest.raises(ModelError, match=r"'gaps' \(Gaps\) .*has a window with gaps over the time axis"):
        trace_and_probe(keras.Model(x, Gaps(name="gaps")(x)))


#: They run a loop of TensorFlow's, which is not created again for one time step.
LOOPS = ("scanned", "mapped", "repeated", "repeated_by_while")
GROUPS = {name: sorted({*names} - {*LOOPS}) for name, names in everyday.groups().items()}


@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=() if name == "layers" else pytest.mark.slow) for name in GROUPS]
)
def test_everyday_blocks_work_behind_a_causal_convolution(trace_and_probe: Any, group: str) -> None:
    """One time step of each operation is created from the proven graph, and compared with Keras."""
    traced = trace_and_probe(everyday.build_behind_a_convolution(GROUPS[group]))
    assert "conv/last" in {spec.name for spec in traced.plan.state}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_in_a_model_that_looks_back_is_refused(trace_and_probe: Any, name: str) -> None:
    with pytest.raises(ModelError, match=r"not proven to be steppable: the layer '\w+' \(Apply\) "):
        trace_and_probe(everyday.build_behind_a_convolution([name]))


@pytest.mark.slow
def test_results_of_one_operation_may_be_constants_and_data(trace_and_probe: Any, keras: Any) -> None:
    import tensorflow as tf

    class Both(keras.Layer):
        def call(self, x: Any) -> Any:
            one, two = tf.raw_ops.IdentityN(input=[tf.constant([1.0, 2.0, 3.0, 4.0]), x])
            return one * two

    x = keras.Input((None, 4))
    trace_and_probe(keras.Model(x, Both()(keras.layers.Conv1D(4, 2, padding="causal")(x))))
