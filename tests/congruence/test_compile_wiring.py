"""The two traces must be wired alike, not only made of the same operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepwell_server.compile.errors import NotCausalError


def _swapping(keras: Any) -> Any:
    class Swapping(keras.Layer):
        """The same operations at every length, in another order where the sequence is long."""

        def call(self, inputs: Any) -> Any:
            one = keras.ops.tanh(inputs)
            two = keras.ops.tanh(one)
            return two - one if (inputs.shape[1] or 0) > 1000 else one - two

    return Swapping


def test_what_swaps_its_operands_for_long_sequences_is_refused(tmp_path: Path) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import keras
    from stepwell_server.compile.probe.probe import trace_and_probe

    x = keras.Input((None, 3))
    hidden = keras.layers.LSTM(4, return_sequences=True)(_swapping(keras)(name="swap")(x))
    with pytest.raises(
        NotCausalError,
        match=r"the layer 'swap' \(Swapping\) computes something different for another number of time steps",
    ):
        trace_and_probe(keras.Model(x, hidden))
