"""The native kernels of wide dense layers give every row the bits of LiteRT's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.executors import litert
from stepwell_server.engine.executors.dense import dense_delegates
from stepwell_server.engine.executors.litert import LiteRTExecutor
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.engine.types import Array
from stepwell_server.program import Program
from support.models import programs

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


@pytest.fixture(scope="module")
def program() -> Program:
    return programs.program("wide_layers", build)


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
