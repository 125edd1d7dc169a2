"""Models whose states are inputs and outputs, such as decoders: sessions keep those states, and answer as Keras does."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.onnx import declaration
from stepwell_server.compile.probe import own_data
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.program import Declaration, Program, ProofOptions
from support.models import decoders, zoo
from support.models.programs import compile_model
from support.samples import one_in

if TYPE_CHECKING:
    from stepwell_server.compile.causality.cut import Cut
    from stepwell_server.compile.graph.interface import Interface


def compiled(model: Any, folder: Path, **declared: Any) -> Program:
    model.save(folder / "model.keras")
    return compile_model(folder / "model.keras", options=ProofOptions(declaration=Declaration(**declared)))


@functools.cache
def graph(make: Any) -> tuple[Interface, Cut]:
    """A model, and its graph, which shows the states."""
    from stepwell_server.compile.causality.cut import cut
    from stepwell_server.compile.graph.interface import describe
    from stepwell_server.compile.graph.tensorflow_setup import keras

    keras.backend.clear_session()
    interface = describe(make(keras))
    temporal = [info.name == "x" for info in interface.inputs]
    return interface, cut(interface, temporal).first


def called(model: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Keras's own call, by the names of inputs and outputs."""
    given = named if isinstance(model.input, dict) else [named[x.name] for x in model.inputs]
    result = model(given)
    if isinstance(result, dict):
        return {name: np.array(value) for name, value in result.items()}
    values = [np.array(value) for value in (result if isinstance(result, list) else [result])]
    names: list[str] = []
    for name in model.output_names:
        names.append(name if name not in names else f"{name}_{sum(n.startswith(name) for n in names)}")
    return dict(zip(names, values, strict=True))


@pytest.mark.parametrize("name", one_in(6, decoders.DECODERS))
def test_a_session_equals_keras_in_a_loop_and_over_the_whole_piece(
    keras: Any, tmp_path: Path, name: str
) -> None:
    keras.backend.clear_session()
    model, pairs = decoders.build(name), decoders.STATES[name]
    program = compiled(model, tmp_path, **({"states": pairs} if name in decoders.DECLARED else {}))
    own = [spec.name for spec in program.state]
    assert set(pairs) <= set(own)
    assert [spec.name for spec in program.inputs] == [x.name for x in model.inputs if x.name not in pairs]
    rows, steps, rng = 3, 9, np.random.default_rng(2)
    arrays = zoo.random_inputs(program.inputs, rows, steps, 5)
    named = {spec.name: value for spec, value in zip(program.inputs, arrays, strict=True)}
    states: list[Any] = [
        rng.standard_normal((rows, *spec.shape)).astype(np.float32)
        if spec.name in pairs
        else np.stack([value] * rows)
        for spec, value in zip(program.state, program.initial, strict=True)
    ]
    begun = {name: states[own.index(name)] for name in pairs}
    whole = called(model, named | begun) if name != "one_time_step" else None
    step, loop = step_of_executor(load_executor(program)), dict(begun)
    seen: list[list[Any]] = []
    looped: list[dict[str, Any]] = []
    for time in range(steps):
        now = [
            np.ascontiguousarray(value[:, time]) if spec.temporal else value
            for spec, value in zip(program.inputs, arrays, strict=True)
        ]
        outputs, after_step = step(now, states)
        states = list(after_step)
        seen.append([np.array(value) for value in outputs])
        one = {
            spec.name: value[:, None] if spec.temporal else value
            for spec, value in zip(program.inputs, now, strict=True)
        }
        if len(own) == len(pairs):  # else the model keeps more than its state inputs
            looped.append(called(model, one | loop))
            loop = {name: looped[-1][after] for name, after in pairs.items()}
    for i, spec in enumerate(program.outputs):
        stepped: Any = np.stack([outputs[i] for outputs in seen], 1)
        if whole is not None:
            found = stepped if spec.temporal else stepped[:, -1]
            np.testing.assert_allclose(found, whole[spec.name], rtol=0, atol=2e-5)
        if looped:
            parts = [one[spec.name] for one in looped]
            expected = np.concatenate(parts, 1) if spec.temporal else np.stack(parts, 1)
            np.testing.assert_allclose(stepped, expected, rtol=0, atol=2e-5)
    for name, after in pairs.items():
        found = states[own.index(name)]
        if whole is not None:
            np.testing.assert_allclose(found, whole[after], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_initial_values_are_those_that_are_declared(keras: Any, tmp_path: Path) -> None:
    keras.backend.clear_session()
    model, row = decoders.build("tutorial"), np.linspace(-1, 1, 6).tolist()
    program = compiled(model, tmp_path, initial={"state_h": 0.5, "state_c": row})
    np.testing.assert_array_equal(program.initial[0], np.full(6, 0.5, np.float32))
    np.testing.assert_array_equal(program.initial[1], np.array(row, np.float32))
    found = own_data.compare(tmp_path / "model.keras", program, None)
    assert found.is_conclusive
    assert found.worst is not None
    assert found.worst.is_allowed
    other = compiled(model, tmp_path)
    assert not any(map(np.any, other.initial))
    assert other.fingerprint != program.fingerprint


@pytest.mark.slow
def test_data_need_not_hold_the_states(keras: Any, tmp_path: Path) -> None:
    keras.backend.clear_session()
    model = decoders.build("tutorial")
    x = np.random.default_rng(1).standard_normal((2, 20, 5)).astype(np.float32)
    np.save(tmp_path / "data.npy", x)
    model.save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras", data=tmp_path / "data.npy")
    found = own_data.compare(tmp_path / "model.keras", program, tmp_path / "data.npy")
    assert found.worst is not None
    assert found.worst.is_allowed


def _gru(keras: Any, x: Any, state: Any) -> Any:
    layer = keras.layers.GRU(4, return_sequences=True, return_state=True, name="gru")
    return layer(x, initial_state=state)


def _given(keras: Any) -> tuple[Any, Any]:
    return keras.Input((None, 3), name="x"), keras.Input((4,), name="state")


def _last(keras: Any) -> Any:
    x, state = _given(keras)
    y, _ = _gru(keras, x, state)
    return keras.Model([x, state], {"y": y * 2.0, "last": y[:, -1]})


def _last_but_one(keras: Any) -> Any:
    x, state = _given(keras)
    y, _ = _gru(keras, x, state)
    return keras.Model([x, state], {"y": y * 2.0, "last": y[:, -2]})


def _last_of_masked(keras: Any) -> Any:
    """Zeros stand for the output of a masked time step, and not for the state."""
    x, state = _given(keras)
    layer = keras.layers.GRU(4, return_sequences=True, zero_output_for_mask=True, name="gru")
    y = layer(x, initial_state=state, mask=keras.ops.any(x > 0, -1))
    return keras.Model([x, state], {"y": y * 2.0, "last": y[:, -1]})


def _last_of_a_cell_state(keras: Any) -> Any:
    x, h, c = keras.Input((None, 3), name="x"), keras.Input((4,), name="h"), keras.Input((4,), name="state")
    y, h_after, _ = keras.layers.LSTM(4, return_sequences=True, return_state=True, name="lstm")(
        x, initial_state=[h, c]
    )
    return keras.Model([x, h, c], {"y": y * 2.0, "h_after": h_after, "last": y[:, -1]})


def _unpaired(keras: Any) -> Any:
    x, state = _given(keras)
    return keras.Model([x, state], _gru(keras, x, state)[0])


def _read_elsewhere(keras: Any) -> Any:
    x, state = _given(keras)
    y, after = _gru(keras, x, state)
    return keras.Model([x, state], [y + keras.ops.expand_dims(state, 1), after])


def _shared(keras: Any) -> Any:
    x, state = _given(keras)
    y, after = _gru(keras, x, state)
    z = keras.layers.GRU(4, return_sequences=True, name="other")(y, initial_state=state)
    return keras.Model([x, state], [z, after])


def _computed(keras: Any) -> Any:
    x, state = _given(keras)
    y, after = _gru(keras, x, keras.layers.Dense(4, name="bridge")(state))
    return keras.Model([x, state], [y, after])


def _state_of_another(keras: Any) -> Any:
    x, state = _given(keras)
    y, _ = _gru(keras, x, state)
    _, after = keras.layers.GRU(4, return_state=True, name="other")(y)
    return keras.Model([x, state], [y, after])


def _changed(keras: Any) -> Any:
    x, state = _given(keras)
    y, after = _gru(keras, x, state)
    return keras.Model([x, state], [y, after * 1.5])


def _returned(keras: Any) -> Any:
    x, state = _given(keras)
    y, after = _gru(keras, x, state)
    return keras.Model([x, state], [y, after, keras.ops.reshape(state, (-1, 4))])


def _rounded(keras: Any, value: Any) -> Any:
    return keras.ops.cast(keras.ops.cast(value, "float16"), "float32")


def _begins_rounded(keras: Any) -> Any:
    x, state = _given(keras)
    return keras.Model([x, state], list(_gru(keras, x, _rounded(keras, state))))


def _returned_rounded(keras: Any) -> Any:
    x, state = _given(keras)
    y, after = _gru(keras, x, state)
    return keras.Model([x, state], [y, _rounded(keras, after)])


@pytest.mark.parametrize(
    "make",
    [
        _begins_rounded,
        _returned_rounded,
        _unpaired,
        _read_elsewhere,
        _shared,
        _computed,
        _state_of_another,
        _changed,
        _returned,
    ],
)
def test_what_is_not_certainly_a_state_is_none(make: Any) -> None:
    from stepwell_server.compile.probe.state_inputs import recognized

    assert recognized(*graph(make), Declaration()) == ()


@pytest.mark.slow
def test_the_refusal_says_what_a_state_is(trace_and_probe: Any, keras: Any) -> None:
    with pytest.raises(
        ModelError,
        match=r"the initial state is computed from the model's inputs: the layer 'gru' \(GRU\) takes .*; let each state be an input "
        r"that nothing else reads, and return it .*\(return_state=True\).*; or remove the state inputs",
    ):
        trace_and_probe(_unpaired(keras))


def test_the_last_output_is_a_state_only_if_it_is_declared() -> None:
    from stepwell_server.compile.probe.state_inputs import recognized

    assert recognized(*graph(_last), Declaration()) == ()
    (state,) = recognized(*graph(_last), Declaration(states={"state": "last"}))
    assert (state.info.name, state.output) == ("state", "last")


@pytest.mark.parametrize("make", one_in(3, [_last_but_one, _last_of_masked, _last_of_a_cell_state]))
def test_other_outputs_are_no_states(make: Any) -> None:
    from stepwell_server.compile.probe.state_inputs import recognized

    with pytest.raises(
        ModelError, match=r"--state state:last: the state of the layer .* none holds that of 'state'"
    ):
        recognized(*graph(make), Declaration(states={"state": "last"}))


_tutorial = decoders.DECODERS["tutorial"]
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no such input": (
        _tutorial,
        {"states": {"hidden": "lstm"}},
        "--state hidden:lstm: must name an input of the model; there is no 'hidden', there are 'x', 'state_h', 'state_c'",
    ),
    "no such output": (
        _tutorial,
        {"states": {"state_h": "h"}},
        "--state state_h:h: must name an output of the model; there is no 'h', there are 'out', 'lstm', 'lstm_1'",
    ),
    "another state": (
        _tutorial,
        {"states": {"state_h": "lstm_1"}},
        (
            "--state state_h:lstm_1: must name the output that holds this state after the last time step; that is 'lstm': "
            "--state state_h:lstm"
        ),
    ),
    "no state": (
        _tutorial,
        {"states": {"state_h": "out"}},
        (
            "--state state_h:out: must name the output that holds this state after the last time step; that is 'lstm': "
            "--state state_h:lstm"
        ),
    ),
    "an ordinary input": (
        _tutorial,
        {"states": {"x": "lstm"}},
        "--state x:lstm: must name the initial state of a recurrent layer (initial_state=...); no layer takes 'x' as that",
    ),
    "unpaired": (
        _unpaired,
        {"states": {"state": "gru"}},
        (
            "--state state:gru: the state of the layer 'gru' (GRU) after the last time step must be an output of the model; none holds "
            "that of 'state': build the layer with return_state=True, and return its state"
        ),
    ),
    "read elsewhere": (
        _read_elsewhere,
        {"states": {"state": "gru"}},
        (
            "--state state:gru: only a layer's initial state may be what reads a state; other operations than the layer 'gru' (GRU) "
            "read 'state', and a call over several time steps would give them its first value at each step: let them read the outputs "
            "of that layer"
        ),
    ),
    "shared": (
        _shared,
        {"states": {"state": "gru"}},
        (
            "--state state:gru: a state must belong to one call of a layer; 2 take 'state' as their initial state: give each an input of "
            "its own"
        ),
    ),
    "initial of no state": (
        _tutorial,
        {"initial": {"x": 1}},
        "--initial: must name the input of a state; got 'x'; the states are 'state_h', 'state_c'",
    ),
    "initial of another shape": (
        _tutorial,
        {"initial": {"state_h": [1.0, 2.0]}},
        "--initial: state 'state_h' must have the shape of one row, [6]; got [2]",
    ),
    "initial not finite": (
        _tutorial,
        {"initial": {"state_c": float("nan")}},
        "--initial: state 'state_c' must be finite; got nan",
    ),
    "initial text": (
        _tutorial,
        {"initial": {"state_c": ["a"]}},
        "--initial: state 'state_c' must be numbers of float32; got ['a']",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_declarations(case: str) -> None:
    from stepwell_server.compile.probe.state_inputs import recognized

    make, declared, message = WRONG[case]
    with pytest.raises(ModelError, match=re.escape(message)):
        recognized(*graph(make), Declaration(**declared))


def test_the_file_beside_a_keras_model(tmp_path: Path) -> None:
    model, beside = tmp_path / "decoder.keras", tmp_path / "decoder.toml"
    (tmp_path / "model.toml").write_text("[context]\ninput = 3\n")
    assert declaration.of_model(model, Declaration()) == Declaration()
    for other in ("learning_rate = 0.1\n", "[training]\nepochs = 3\n", "not TOML", "state = 3\n"):
        beside.write_text(other)
        assert declaration.of_model(model, Declaration()) == Declaration()
    beside.write_text('[state]\nstate_h = "lstm"\n[initial]\nstate_h = 0.5\n')
    assert declaration.of_model(model, Declaration(initial={"state_c": 1})) == Declaration(
        states={"state_h": "lstm"}, initial={"state_h": 0.5, "state_c": 1}
    )
    beside.write_text('[state]\nstate_h = "lstm"\n[context]\nx = 3\n')
    with pytest.raises(
        ModelError,
        match=r"decoder\.toml: there is no table \[context\]; the tables for a Keras model are state, initial",
    ):
        declaration.of_model(model, Declaration())
