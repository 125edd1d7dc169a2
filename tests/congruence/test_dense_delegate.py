"""The native kernels of wide dense layers give every row the bits of LiteRT's own."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.executors import dense, litert
from stepwell_server.engine.executors.dense import dense_delegates
from stepwell_server.engine.executors.litert import LiteRTExecutor
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.engine.types import Array
from stepwell_server.program import Program
from support.models import programs

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
pytestmark = pytest.mark.skipif(
    not dense_delegates(), reason="the native module or the processor has no such kernels"
)

#: Of one row, around the kernel's tiles of 6 and 12 rows, and of more than one block of 120.
SIZES = (*range(1, 26), 60, 119, 121, 250)


def build() -> Any:
    """Layers that the delegate takes, and ones that it must leave alone."""
    import keras

    keras.utils.set_random_seed(5)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((None, 40)),
            layers.LSTM(96, return_sequences=True),  # the weights of its input are too few
            layers.GRU(130, return_sequences=True),  # its last panel is not whole
            layers.Dense(300, activation="relu"),
            layers.Dense(150, use_bias=False),
            layers.Dense(
                270
            ),  # its input is the result of another such layer, and exists only inside the delegate
            layers.Dense(3),
        ]
    )


def build_dense() -> Any:
    """A model whose output is the result of a layer that the delegate takes."""
    import keras

    keras.utils.set_random_seed(6)
    x = keras.Input((None, 128))
    hidden = keras.layers.SimpleRNN(3, return_sequences=True)(x)
    return keras.Model(x, {"y": hidden, "z": keras.layers.Dense(257)(x)})


@pytest.fixture(scope="module")
def program() -> Program:
    return programs.program("wide_layers", build, kept=programs.kept_with(__file__))


def delegates(executor: LiteRTExecutor) -> int:
    """How many parts of the graph delegates run. LiteRT's own takes all of this graph."""
    return sum(op["op_name"] == "DELEGATE" for op in executor._now.interpreter._get_ops_details())


def test_rows_have_the_same_bits_with_and_without(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litert, "_MAX_KEPT", 1)  # no interpreters are made later, which would all be alike
    executor = LiteRTExecutor(program)
    monkeypatch.setattr(litert, "dense_delegates", tuple)
    plain = LiteRTExecutor(program)
    rng = np.random.default_rng(7)

    def draw(rows: int, shape: tuple[int, ...]) -> Array:
        return rng.standard_normal((rows, *shape)).astype(np.float32)

    for rows in SIZES:
        inputs = [draw(rows, spec.shape) for spec in program.inputs]
        states = [draw(rows, spec.shape) for spec in program.state]
        for found, expected in zip(
            step_of_executor(executor)(inputs, states), step_of_executor(plain)(inputs, states), strict=True
        ):
            for one, two in zip(found, expected, strict=True):
                assert one.tobytes() == two.tobytes(), f"{rows} rows"
    assert delegates(plain) == 1
    assert delegates(executor) > 1


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e38, np.inf, np.nan])
def test_extreme_numbers_have_the_same_bits(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Denormal inputs and sums become zero, as in LiteRT's own kernels."""
    monkeypatch.setattr(litert, "_MAX_KEPT", 1)
    extreme = programs.program("wide_dense", build_dense, kept=programs.kept_with(__file__))
    executor = LiteRTExecutor(extreme)
    monkeypatch.setattr(litert, "dense_delegates", tuple)
    plain = LiteRTExecutor(extreme)
    rng = np.random.default_rng(7)
    for rows in (1, 7, 13):
        x = rng.standard_normal((rows, 128)).astype(np.float32)
        with np.errstate(over="ignore"):
            x[:, :: 1 if abs(scale) < 1 else 50] *= np.float32(scale)
        states = [np.zeros((rows, *spec.shape), np.float32) for spec in extreme.state]
        found, _ = step_of_executor(executor)([x], states)
        expected, _ = step_of_executor(plain)([x], states)
        for one, two in zip(found, expected, strict=True):
            assert np.array_equal(np.isnan(one), np.isnan(two))
            assert one[~np.isnan(one)].tobytes() == two[~np.isnan(two)].tobytes()
    assert delegates(executor) > 1


def test_a_version_of_litert_that_was_not_tried_gets_no_delegate(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2.4.0", "2.30.1", "3.2.3", "2"):
        monkeypatch.setattr(metadata, "version", lambda _name, version=version: version)
        assert dense.dense_delegates.__wrapped__() == ()


def test_the_pinned_version_of_litert_was_tried() -> None:
    """If you raise it, compare bits here and with `make check`, and add it to `LITERT_VERSIONS`."""
    pinned = re.search(r"^ai-edge-litert==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    assert pinned is not None
    assert dense.is_tried(pinned[1])
