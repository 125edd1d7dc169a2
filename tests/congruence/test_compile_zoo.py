"""Every model that Keras can build and Stepwell must serve: stepped = whole = batched."""

from __future__ import annotations

import numpy as np
import pytest

from stepwell_server.engine.executors import litert, load_executor
from stepwell_server.program import FLATBUFFER
from support.models.compiled import Compiled, zoo_model
from support.models.zoo import COMMON, SERVED
from support.samples import only

STATES = {
    "seed_model": ["rnn/h", "rnn/c"],
    "gru_reset_after": ["gru/h"],
    "stacked_cells": ["rnn/0/h", "rnn/0/c", "rnn/1/h", "rnn/2/h"],
    "nested_same_names": ["left/lstm/h", "left/lstm/c", "right/lstm/h", "right/lstm/c"],
    "shared_layer": ["lstm/h", "lstm/c", "lstm#2/h", "lstm#2/c"],
    "layer_in_a_block": ["first/rnn/h", "second/rnn/h"],
    "time_distributed_inner_lstm": ["sentences/h"],
    "repeat_vector_decoder": ["encoder/h", "encoder/c"],
    "subclassed": ["first/h", "first/c", "second/h"],
    "conv_lstm_1d": ["conv/h", "conv/c"],
    "masking": ["lstm/h", "lstm/c", "lstm/output", "gru/h", "gru/output"],
    "mask_with_zero_output": ["lstm/h", "lstm/c"],
    "accumulator": ["sum/state"],
    "swapper": ["memory/state_0", "memory/state_1"],
    "stateless": [],
}
ON_TENSORFLOW = {
    "not_convertible",
    "whole_quotients",
    "half_precision",
    "mixed_float16",
    "mixed_bfloat16",
    "lookup_table",
    "int8_dense",
}
#: Compiled for other tests, too, besides one for TensorFlow.
_QUICK = (*COMMON, "fixed_length_tokens", "swapper", "accumulator", "not_convertible")
TOLERANCE = {"half_precision": 4e-3, "mixed_float16": 4e-3, "mixed_bfloat16": 3e-2}


@pytest.fixture(scope="module", params=only(_QUICK, SERVED))
def zoo(request: pytest.FixtureRequest) -> Compiled:
    return zoo_model(request.param)


def test_stepping_equals_one_keras_call_over_the_sequence(zoo: Compiled) -> None:
    rows, steps = zoo.shape
    for seed in range(2):
        inputs = zoo.draw(seed, rows, steps)
        whole, stepped = zoo.keras(inputs), zoo.stepped(inputs, steps)
        for name, expected in whole.items():
            allowed = TOLERANCE.get(zoo.name, 2e-6)
            np.testing.assert_allclose(stepped[name], expected, rtol=allowed, atol=allowed, err_msg=name)


def test_a_row_has_the_same_bits_alone_and_in_any_company(zoo: Compiled) -> None:
    rows, steps = 21, 4
    inputs = zoo.draw(5, rows, steps)
    together = zoo.stepped(inputs, steps)
    order = np.random.default_rng(6).permutation(rows)
    shuffled = zoo.stepped([value[order] for value in inputs], steps)
    for row in (0, 13, 20):
        alone = zoo.stepped([value[row : row + 1] for value in inputs], steps)
        for name, value in alone.items():
            assert value[0].tobytes() == together[name][row].tobytes(), name
            assert value[0].tobytes() == shuffled[name][list(order).index(row)].tobytes(), name


def test_the_state_is_named_and_the_executor_is_the_expected_one(zoo: Compiled) -> None:
    """That a program is loaded as it was made is required of each one, where `support.models.programs` makes it."""
    names = [spec.name for spec in zoo.program.state]
    assert len(set(names)) == len(names)
    assert names == STATES.get(zoo.name, names)
    assert zoo.program.executor == ("tensorflow" if zoo.name in ON_TENSORFLOW else "litert")
    if zoo.program.executor == "litert":
        assert not zoo.program.batch_sizes
        assert not litert.places_tensors_late(zoo.program.files[FLATBUFFER])


def test_another_initial_state_gives_another_first_output(zoo: Compiled) -> None:
    if not zoo.program.state:
        return
    executor = load_executor(zoo.program)
    executor.bind(2)
    for i, value in enumerate(zoo.draw(9, 2, 1)):
        timed = zoo.program.inputs[i].temporal
        executor.inputs()[i][...] = value[:, 0] if timed else value
    for i, value in enumerate(zoo.program.initial):
        executor.states()[i][0] = value
        executor.states()[i][1] = (value.astype(np.float64) + 3).astype(value.dtype)
    for i in range(len(zoo.program.inputs)):
        executor.inputs()[i][1] = executor.inputs()[i][0]
    executor.invoke()
    results = [np.array(value) for value in (*executor.outputs(), *executor.next_states())]
    assert any(not np.array_equal(value[0], value[1]) for value in results)
