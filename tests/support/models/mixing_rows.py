"""Models that mix rows, draw numbers, keep things, or put their outputs' axes elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.models.cases import (
    Case,
    ahead,
    before_rnn,
    behind_rnn,
    elements,
    given_position,
    layout,
    only_length,
    position,
    random,
    rows,
    unproven,
    untraced,
    writes,
)
from support.models.mixing_steps import odd


def _model(name: str, refused: str, make: Callable[[Any], Any]) -> Case:
    return Case(name, lambda keras, _steps: make(keras), refused)


ROWS = [
    before_rnn(name, odd(name), pattern)
    for name, pattern in (
        ("mean_over_rows", rows("mean", "takes the mean over the rows of the batch")),
        ("other_row", rows("other", "shifts the rows of the batch")),
        ("first_row", rows("first", "takes a part of the rows of the batch")),
        ("number_of_the_row", rows("number", "has a different constant for each row of the batch")),
        (
            "number_of_rows",
            r"^model cannot be run step by step: the layer 'number_of_rows' .* or of rows; make",
        ),
        ("rows_against_each_other", rows("rows", "the rows of the batch")),
        ("norm_of_everything", ahead("norm", "takes the sum over")),
        ("batch_statistics", rows("batch", "takes the mean over the rows of the batch")),
        ("reversed_rows", rows("reversed", "reverses the rows of the batch")),
        ("by_condition", rows("by_condition", "takes number 0 of the rows")),
        ("number_of_distinct_values", unproven("number_of_distinct_values", "a shape depends on values")),
    )
]
KEPT = [
    before_rnn(name, odd(name), pattern)
    for name, pattern in (
        ("noise", random("noise")),
        ("noise_of_tensorflow", random("noise")),
        ("noise_of_a_generator", random("noise")),
        ("noise_from_values", rows("noise", "takes number 0 of the rows")),
        ("counter", writes("counter")),
        ("counter_in_a_function", writes("counter")),
        ("running_mean", writes("running")),
        ("clock", unproven("clock", "uses the operation Timestamp")),
    )
] + [
    before_rnn(
        "batch_norm_in_training",
        lambda k: _in_training(k.BatchNormalization(name="norm")),
        r"^two calls of the model differ: the layer 'norm' \(BatchNormalization\) changes a variable",
    ),
    before_rnn("dropout_in_training", lambda k: _in_training(k.Dropout(0.5, name="drop")), random("drop")),
    before_rnn(
        "noise_in_training", lambda k: _in_training(k.GaussianNoise(0.5, name="noise")), random("noise")
    ),
]


def _in_training(layer: Any) -> Any:
    from support.models.odd_cells import InTraining

    return InTraining(layer)


UNTRACED = [
    before_rnn(
        "values_as_numpy",
        odd("values_as_numpy"),
        untraced("values_as_numpy", "reads values of tensors", "write it with keras.ops"),
    ),
    before_rnn(
        "value_as_number",
        odd("value_as_number"),
        untraced("value_as_number", "reads values of tensors", "write it with keras.ops"),
    ),
    before_rnn(
        "while_values_are_large",
        odd("while_values_are_large"),
        untraced(
            "while_values_are_large",
            "branches in Python",
            r"compute both branches and select with keras\.ops\.where",
        ),
    ),
    before_rnn(
        "asserting",
        odd("asserting", 5),
        r"the layer 'asserting' \(Apply\) contains an assertion that fails for some numbers.*; remove the assertion",
    ),
    before_rnn(
        "missing_key", odd("missing_key"), r"the layer 'missing_key' \(Apply\) fails \(KeyError: absent\)"
    ),
]
OUTPUTS = [
    behind_rnn("rows_last", lambda _k: _ops("transpose"), layout("ops.transpose")),
    behind_rnn("time_last", lambda k: k.Permute((2, 1), name="permute"), layout("permute")),
    behind_rnn("time_first", lambda _k: lambda x: _ops("transpose")(x, (1, 0, 2)), layout("ops.transpose")),
    behind_rnn("rows_twice", lambda _k: lambda x: _ops("tile")(x[:, -1], (2, 1)), layout("ops.tile")),
    behind_rnn("rows_repeated", lambda _k: lambda x: _ops("repeat")(x, 2, 0), layout("ops.repeat")),
    behind_rnn("time_twice", lambda _k: lambda x: _ops("repeat")(x, 2, 1), elements("ops.repeat", 2)),
    behind_rnn(
        "time_and_rows_merged", lambda _k: lambda x: _ops("reshape")(x, (-1, 4)), layout("ops.reshape")
    ),
    behind_rnn("position_as_output", odd("position_alone"), position("position")),
]


def _ops(name: str) -> Any:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    return getattr(keras.ops, name)


def _over_positions(keras: Any) -> Any:
    from support.models.odd_layers import Apply

    x = keras.Input((None, 3))
    rnn = keras.layers.SimpleRNN(3, return_sequences=True, name="rnn")
    clock = keras.layers.SimpleRNN(3, return_sequences=True, name="clock")
    return keras.Model(x, rnn(x) + clock(Apply("position_alone")(x)))


def _masked_by_position(keras: Any) -> Any:
    from support.models.odd_layers import Apply

    x = keras.Input((None, 3))
    rnn = keras.layers.SimpleRNN(3, return_sequences=True, name="rnn")
    return keras.Model(x, rnn(x, mask=Apply("mask_by_position", 3)(x)))


def _cell(kind: str, refused: str, layer: str = "RNN") -> Case:
    def make(keras: Any) -> Any:
        from support.models import odd_cells

        x = keras.Input((None, 3))
        rnn = getattr(odd_cells, layer, None) or keras.layers.RNN
        return keras.Model(x, rnn(odd_cells.OddCell(3, kind), return_sequences=True, name="odd")(x))

    return _model(f"cell_{kind}_{layer}", refused, make)


def _graph_nodes(keras: Any) -> Any:
    from support.models.odd_layers import Apply

    x = keras.Input((None, 5, 2))
    return keras.Model(x, keras.layers.LSTM(3, name="nodes")(Apply("nodes_as_rows")(x)))


def _end_of_sequence(keras: Any) -> Any:
    x = keras.Input((None, 3))
    hidden = keras.layers.GRU(3, return_sequences=True, name="gru")(x)
    spread = hidden - hidden[:, -1:]
    return keras.Model(x, keras.layers.Dense(2)(spread))


def _repeated_over_time(keras: Any) -> Any:
    x = keras.Input((None, 3))
    last = keras.layers.GRU(3, name="gru")(x)
    spread = keras.ops.expand_dims(last, 1) + keras.ops.zeros_like(x)
    return keras.Model(x, keras.layers.SimpleRNN(2, name="rnn")(spread))


def _state_from_inputs(keras: Any) -> Any:
    x, start = keras.Input((None, 3)), keras.Input((4,), name="start")
    return keras.Model([x, start], keras.layers.GRU(4, name="gru")(x, initial_state=start))


def _end_mask(keras: Any) -> Any:
    from support.models.odd_layers import Apply

    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(1000, 4)(tokens)
    ended = Apply("after_token_2")(keras.ops.expand_dims(tokens, -1))
    return keras.Model(tokens, keras.layers.SimpleRNN(3, return_sequences=True, name="rnn")(x * ended))


def _two_lengths(keras: Any) -> Any:
    one, two = keras.Input((6, 3), name="one"), keras.Input((9, 3), name="two")
    return keras.Model(
        [one, two], keras.layers.LSTM(3, name="left")(one) + keras.layers.LSTM(3, name="right")(two)
    )


def _encoded(layer: str, *features: int, **options: Any) -> Callable[[Any], Any]:
    def make(keras: Any) -> Any:
        x = keras.Input((None, *features), dtype="int32")
        encoding = getattr(keras.layers, layer)(output_mode="one_hot", name="encoding", **options)
        return keras.Model(x, keras.layers.LSTM(3, name="lstm")(encoding(x)))

    return make


def _text(keras: Any) -> Any:
    x = keras.Input((None,), dtype="string", name="text")
    return keras.Model(
        x, keras.layers.GRU(3)(keras.layers.Embedding(3, 3)(keras.layers.StringLookup(vocabulary=["a"])(x)))
    )


def _complex(keras: Any) -> Any:
    from support.models.odd_layers import Apply

    x = keras.Input((None, 3))
    return keras.Model(x, Apply("as_complex", name="complex")(keras.layers.GRU(3, return_sequences=True)(x)))


def _open_features(keras: Any) -> Any:
    x = keras.Input((None, None), name="x")
    return keras.Model(x, keras.ops.abs(x))


CELLS = [
    _cell(
        "growing",
        r"^the cell of the layer 'odd' \(RNN\) must return states with the shapes of its input states; for each row it receives "
        r"\(3,\) and returns \(6,\): make state_size",
    ),
    _cell("mean_over_rows", rows("odd", "takes the mean over the rows of the batch")),
    _cell("number_of_the_row", rows("odd", "has a different constant for each row")),
    _cell("state_of_rows", rows("odd", "has a different constant for each row")),
    _cell("counting", writes("odd")),
    _cell("noisy", random("odd")),
    _cell(
        "plain",
        unproven("odd", "has a custom inner_loop"),
        "OwnLoop",
    ),
    _cell(
        "plain",
        r"^model is not causal: the layer 'odd' \(Reversing\) looks ahead: it reverses the time axis",
        "Reversing",
    ),
]
MODELS = [
    _model(
        "one_hot_of_a_series",
        r"'encoding' \(CategoryEncoding\) drops axes of length 1.*keras\.ops\.one_hot",
        _encoded("CategoryEncoding", num_tokens=5),
    ),
    _model(
        "one_hot_of_a_hash",
        r"'encoding' \(Hashing\) drops axes of length 1.*keras\.ops\.one_hot",
        _encoded("Hashing", 1, num_bins=5),
    ),
    _model("text", r"^input 'text' must have a numeric type; it has string\. Remove the layer", _text),
    _model("complex_output", r"^output 'complex' must have real numbers .*; it has complex64", _complex),
    _model("open_features", r"^input 'x' must have fixed dimensions after batch and time", _open_features),
    _model("over_positions", given_position("clock", "a sequence"), _over_positions),
    _model("masked_by_position", given_position("rnn", "a mask"), _masked_by_position),
    _model(
        "graph_nodes",
        r"^the layer 'nodes' \(LSTM\) processes 5 rows for each row of the batch.*; make every",
        _graph_nodes,
    ),
    _model(
        "end_of_sequence",
        r"^model is not causal: the operation 'subtract\w*' \(Subtract\) spreads a value of",
        _end_of_sequence,
    ),
    _model(
        "repeated_over_time",
        r"^model is not causal: the operation 'add\w*' \(Add\) spreads a value of",
        _repeated_over_time,
    ),
    _model(
        "state_from_inputs",
        r"^the initial state is computed from .*'gru' \(GRU\) takes .*pass those values as",
        _state_from_inputs,
    ),
    _model(
        "end_mask",
        r"step by step: the layer 'after_token_2' \(Apply\) .*it accumulates along the time axis; use a recurrent layer",
        _end_mask,
    ),
    _model(
        "two_lengths",
        r"the inputs are sequences of different lengths \('one' of 6, 'two' of 9 time steps\)",
        _two_lengths,
    ),
]
FIXED = [
    Case(case.name, case.make, case.refused, (40,))
    for case in (
        behind_rnn(
            "flattened",
            lambda k: lambda x: k.Dense(2, name="head")(k.Flatten(name="flat")(x)),
            only_length("head", "'flat' turns time steps into features"),
        ),
        behind_rnn(
            "permuted", lambda k: lambda x: k.Dense(2, name="head")(k.Permute((2, 1))(x)), only_length("head")
        ),
        behind_rnn(
            "weights_per_step",
            lambda k: k.EinsumDense("btf,tfo->bto", (40, 2), name="head"),
            only_length("head"),
        ),
        behind_rnn("windowed", lambda k: k.Reshape((10, 16), name="windows"), only_length("windows")),
        before_rnn(
            "repeated",
            lambda k: lambda x: x + k.RepeatVector(40, name="again")(k.SimpleRNN(4)(x)),
            only_length("ops.add", "instead of 'again'"),
        ),
        before_rnn(
            "reshaped",
            lambda k: k.Reshape((40, 4), name="shape"),
            only_length("shape", r"Reshape\(\(-1, 4\)\) instead of 'shape'"),
        ),
        before_rnn(
            "positions",
            lambda k: lambda x: x + k.Embedding(40, 4, name="places")(_ops("arange")(40)),
            only_length("ops.add"),
        ),
    )
]
CASES = {case.name: case for case in (*ROWS, *KEPT, *UNTRACED, *OUTPUTS, *CELLS, *MODELS, *FIXED)}
