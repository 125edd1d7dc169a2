"""Keras's own configurations: a model that is built again is the same model, whatever its layers are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.architecture.differences import compare
from stepwell_server.program import Architecture, Program, StateSpec, TensorSpec
from support.models import custom_layers


def keras_() -> Any:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    return keras


def architecture(model: Any, folder: Path) -> Architecture:
    """The architecture of a model, without compiling it."""
    from stepwell_server.compile.graph.watch import recurrent_layers
    from stepwell_server.compile.keras_file import archive

    path = folder / "model.keras"
    model.save(path)
    states = [StateSpec(f"{path}/h", (4,), "float32") for path in recurrent_layers(model)]
    names = getattr(model, "output_names", ["output_0"])
    outputs = [TensorSpec(name, (1,), "float32", temporal=True) for name in names]
    program = Program("f", (), tuple(outputs), tuple(states), (), "litert", "", (), {})
    return archive.architecture(path, program)


def stack(units: int = 4, **named: str) -> Any:
    keras = keras_()
    layers = [
        keras.Input((None, 3)),
        keras.layers.LSTM(units, return_sequences=True, name=named.get("lstm")),
        keras.layers.GRU(4, dropout=0.1, name=named.get("gru")),
        keras.layers.Dense(1, activation=named.get("activation")),
    ]
    return keras.Sequential(layers)


def two_inputs() -> Any:
    keras = keras_()
    x, z = keras.Input((None, 3)), keras.Input((None, 2))
    outputs = [keras.layers.Dense(1)(keras.layers.LSTM(4)(each)) for each in (x, z)]
    return keras.Model([x, z], outputs)


def shared_layer() -> Any:
    keras = keras_()
    x, z = keras.Input((None, 3)), keras.Input((None, 3))
    lstm = keras.layers.LSTM(4)
    return keras.Model([x, z], {"y": keras.layers.Concatenate()([lstm(x), lstm(z)])})


def nested() -> Any:
    keras = keras_()
    inner = keras.Sequential([keras.Input((None, 3)), keras.layers.LSTM(4, return_sequences=True)])
    x = keras.Input((None, 3))
    return keras.Model(x, keras.layers.Dense(1)(inner(x)))


def cells() -> Any:
    keras = keras_()
    cell = [keras.layers.LSTMCell(4), custom_layers.BetaCell(4)]
    return keras.Sequential([keras.Input((None, 3)), keras.layers.RNN(cell, return_sequences=True)])


def subclassed() -> Any:
    model = custom_layers.Subclassed()
    model(keras_().ops.zeros((2, 4, 3)))
    return model


def branches(merge: str, *, swapped: bool = False, **named: str) -> Any:
    """Two branches of equal layers, which are made in one order and merged in the same or the other."""
    keras = keras_()
    x = keras.Input((None, 3))
    first, second = (
        keras.layers.LSTM(4, name=named.get(name))(keras.layers.Dense(3)(x)) for name in ("first", "second")
    )
    both = [second, first] if swapped else [first, second]
    merged = both[0] + both[1] if merge == "+" else getattr(keras.layers, merge)()(both)
    return keras.Model(x, keras.layers.Dense(1)(merged))


@pytest.mark.parametrize("build", [stack, two_inputs, shared_layer, nested, cells, subclassed])
def test_it_is_the_same_when_it_is_built_again(build: Callable[[], Any], tmp_path: Path) -> None:
    first, again = (architecture(build(), tmp_path) for _ in range(2))
    assert first.structure == again.structure
    assert not first.ambiguous
    keras_().backend.clear_session()
    assert architecture(build(), tmp_path).structure == first.structure


def test_what_matters_in_training_alone_is_no_difference(tmp_path: Path) -> None:
    keras = keras_()
    other = keras.Sequential(
        [
            keras.Input((None, 3)),
            keras.layers.LSTM(4, return_sequences=True, kernel_regularizer="l2", unit_forget_bias=False),
            keras.layers.GRU(4, dropout=0.5, recurrent_initializer="ones"),
            keras.layers.Dense(1, trainable=False),
        ],
        name="mine",
    )
    clone = keras.models.clone_model(stack())  # Keras renames its input.
    found = {architecture(model, tmp_path).structure for model in (stack(), other, clone)}
    assert len(found) == 1


def test_a_model_built_again_with_the_same_weights_has_the_same_fingerprint(tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file import archive

    first, again, third = stack(), stack(), stack(lstm="mine")
    fingerprints = []
    for model in (first, again, third):
        model.set_weights(first.get_weights())
        model.save(tmp_path / "model.keras")
        fingerprints.append(archive.fingerprint(tmp_path / "model.keras"))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("merge", ["Add", "Maximum", "Average", "Multiply", "+"])
def test_interchangeable_branches_are_distinguished_only_by_names(merge: str, tmp_path: Path) -> None:
    first, again = (architecture(branches(merge), tmp_path) for _ in range(2))
    assert first.structure != again.structure
    (group,) = again.ambiguous
    assert [name.rpartition("_")[0] or name for name in group] == ["lstm", "lstm"]
    found = compare(first, again)
    assert found.is_of_names
    assert found.clauses == (
        f"layers {group[0]!r} and {group[1]!r} are interchangeable: only their names tell which state belongs to which",
    )
    named = [architecture(branches(merge, first="a", second="b"), tmp_path) for _ in range(2)]
    assert named[0].structure == named[1].structure


def test_branches_with_a_place_each_are_the_same_if_they_are_made_in_the_same_order(tmp_path: Path) -> None:
    first, again = (architecture(branches("Concatenate"), tmp_path) for _ in range(2))
    assert first.structure == again.structure
    swapped = architecture(branches("Concatenate", swapped=True), tmp_path)
    assert swapped.structure != first.structure
    assert compare(first, swapped).clauses == (
        "layers of the same kind were made in another order, so that it is not clear which is which",
    )


def differences(old: Any, new: Any, folder: Path) -> list[str]:
    first, second = architecture(old, folder), architecture(new, folder)
    assert first.structure != second.structure
    return list(compare(first, second).clauses)


def deeper() -> Any:
    model = stack()
    model.add(keras_().layers.Dense(2))
    return model


@pytest.mark.parametrize(
    ("old", "new", "clause"),
    [
        (stack, lambda: stack(units=8), "layer 'lstm' (LSTM): units was 4 and is 8"),
        (
            stack,
            lambda: stack(activation="relu"),
            "layer 'dense' (Dense): activation was 'linear' and is 'relu'",
        ),
        (stack, lambda: stack(lstm="encoder"), "layer 'lstm' (LSTM) is called 'encoder' now"),
        (
            lambda: stack(lstm="encoder", gru="g"),
            lambda: stack(lstm="coder", gru="g"),
            "layer 'encoder' (LSTM) is called 'coder' now",
        ),
        (stack, deeper, "layer 'dense_2' (Dense) is new"),
    ],
    ids=["units", "activation", "name", "another name", "new layer"],
)
def test_each_real_difference_is_named(
    old: Callable[[], Any], new: Callable[[], Any], clause: str, tmp_path: Path
) -> None:
    keras_().backend.clear_session()
    assert differences(old(), new(), tmp_path) == [clause]


@pytest.mark.parametrize(
    ("change", "clause", "is_of_names"),
    [
        ({"dtype": "mixed_bfloat16"}, "dtype was 'float32' and is 'mixed_bfloat16'", False),
        ({"key": "r"}, "the outputs were ['p', 'q'] and are ['p', 'r']", False),
        ({"inner": "decoder"}, "layer 'encoder' (Functional) is called 'decoder' now", True),
    ],
)
def test_a_difference_around_or_in_a_nested_model_is_named(
    tmp_path: Path, change: dict[str, str], clause: str, is_of_names: bool
) -> None:
    keras = keras_()

    def model(dtype: str = "float32", key: str = "q", inner: str = "encoder") -> Any:
        steps, x = keras.Input((None, 3)), keras.Input((None, 3))
        lstm = keras.layers.LSTM(4, return_sequences=True, dtype=dtype)
        y = keras.Model(steps, lstm(steps), name=inner)(x)
        return keras.Model(x, {"p": keras.layers.Dense(2)(y), key: keras.layers.Dense(1)(y)})

    found = compare(architecture(model(), tmp_path), architecture(model(**change), tmp_path))
    assert any(one.endswith(clause) for one in found.clauses), found.clauses
    assert found.is_of_names == is_of_names


def test_another_wiring_is_named(tmp_path: Path) -> None:
    keras = keras_()

    def wired(*, first: bool) -> Any:
        x, z = keras.Input((None, 3), name="x"), keras.Input((None, 3), name="z")
        a, b = keras.layers.LSTM(4, name="a")(x), keras.layers.LSTM(4, name="b")(z)
        y = keras.layers.Subtract(name="y")([a, b] if first else [a, a])
        return keras.Model([x, z], [y, b])

    assert differences(wired(first=True), wired(first=False), tmp_path) == [
        "layer 'y' (Subtract) was called on 'a', 'b' and is called on 'a', 'a' now"
    ]
