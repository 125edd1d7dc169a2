"""Models that mix time steps: convolutions, pooling, shifts, sums, attention, positions, lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from support.models.cases import (
    Case,
    Layer,
    ahead,
    back,
    before_rnn,
    beginning,
    behind_rnn,
    end,
    given_position,
    length,
    matrix,
    mixes,
    only_length,
    pairs,
    position,
    python,
    rate,
    rows,
    unproven,
)


def odd(kind: str, n: int = 1) -> Layer:
    """Return a maker of the custom layer that does ``kind``."""

    def make(_layers: Any) -> Any:
        from support.models.odd_layers import Apply

        return Apply(kind, n)

    return make


def _convolution(padding: str, dilation: int, kernel: int, refused: str) -> Case:
    return before_rnn(
        f"conv_{padding}_{kernel}_{dilation}",
        lambda k: k.Conv1D(2, kernel, padding=padding, dilation_rate=dilation, name="conv"),
        refused,
        fixed=padding != "valid" and dilation in (1, 7),
    )


PYTHON_LOOP = (
    r"^model cannot be run step by step: the layer 'lag\w*' \(\w+\) runs a Python loop over its time steps, .*as a "
    r"cell, and run it with keras\.layers\.RNN"
)
OVER_TWO_STEPS = (
    r"^the layer 'rnn' \(SimpleRNN\) processes 2 time steps for each input time step.*; move them to"
)
MISPLACED_BIAS = (
    r"^model cannot be run step by step: the layer 'conv' \(Conv1D\) has its channels first, and a fault of Keras adds its "
    r"bias to the time steps instead, .* as it has filters, {}; use use_bias=False, data_format='channels_last', or another"
)
DILATIONS = (1, 2, 3, 7, 16, 64)
CONVOLUTIONS = [
    *(_convolution("same", d, 3, ahead("conv")) for d in DILATIONS),
    _convolution("same", 5, 2, ahead("conv")),
    *(_convolution("valid", d, 3, ahead("conv", f"{2 * d} time steps ahead")) for d in (1, 8, 64)),
    before_rnn("conv_strided", lambda k: k.Conv1D(2, 1, strides=2, name="conv"), rate("conv")),
    before_rnn(
        "conv_padded_too_little",
        lambda k: _chain(k, [k.ZeroPadding1D((5, 1), name="pad"), k.Conv1D(2, 7, name="conv")]),
        ahead("conv", "has a window of 7 over the time axis, 1 time step ahead"),
    ),
    before_rnn(
        "conv_separable", lambda k: k.SeparableConv1D(2, 3, padding="same", name="conv"), ahead("conv")
    ),
    before_rnn("conv_depthwise", lambda k: k.DepthwiseConv1D(5, padding="same", name="conv"), ahead("conv")),
    before_rnn(
        "conv_transposed", lambda k: k.Conv1DTranspose(2, 3, padding="same", name="conv"), ahead("conv")
    ),
    before_rnn("conv_transposed_strided", lambda k: k.Conv1DTranspose(2, 2, 2, name="conv"), OVER_TWO_STEPS),
    *(
        before_rnn(
            f"conv_channels_first_{filters}",
            lambda k, n=filters: _chain(  # type: ignore[misc]
                k,
                [
                    k.Permute((2, 1)),
                    k.Conv1D(n, 1, data_format="channels_first", name="conv"),
                    k.Permute((2, 1)),
                ],
            ),
            MISPLACED_BIAS.format(filters),
        )
        for filters in (5, 509)
    ),
    before_rnn("upsampled", lambda k: k.UpSampling1D(2, name="up"), OVER_TWO_STEPS),
]
_POOLS: dict[str, Callable[[Any, int], Any]] = {
    "max": lambda k, n: k.MaxPooling1D(n, 1, "same", name="pool"),
    "mean": lambda k, n: k.AveragePooling1D(n, 1, "same", name="pool"),
}


def _pooling(name: str, size: int) -> Case:
    return before_rnn(f"pool_{name}_{size}", lambda k: _POOLS[name](k, size), ahead("pool", "pools"))


def _global(name: str) -> Case:
    return behind_rnn(name, lambda k: getattr(k, name)(name="pool"), mixes("pool"), fixed=True)


POOLING = [
    *(_pooling(name, n) for name in _POOLS for n in (2, 9)),
    before_rnn("pool_strided", lambda k: k.MaxPooling1D(2, name="pool"), rate("pool")),
    *(_global(name) for name in ("GlobalMaxPooling1D", "GlobalAveragePooling1D")),
]
SHIFTS = [
    before_rnn(
        "crop_and_pad_behind",
        lambda k: _chain(
            k,
            [
                k.ZeroPadding1D((2, 0)),
                k.Cropping1D((0, 2)),
                k.Cropping1D((0, 1)),
                k.ZeroPadding1D((0, 1), name="pad"),
            ],
        ),
        length("pad", "pads the end of a sequence that lags behind"),
    ),
    before_rnn(
        "only_padded",
        lambda k: k.ZeroPadding1D((2, 0), name="pad"),
        unproven("rnn", "a part of the sequence"),
    ),
    before_rnn(
        "crop_and_pad_ahead",
        lambda k: _chain(k, [k.Cropping1D((3, 0), name="crop"), k.ZeroPadding1D((0, 3))]),
        ahead("crop", "takes a part of the time axis, 3 time steps ahead"),
    ),
    *(before_rnn(f"lead_by_padding_{n}", odd("lead_by_padding", n), ahead("lead")) for n in (1, 8, 200)),
    before_rnn(
        "lead_in_a_loop", odd("lead_in_a_loop", 2), ahead("lead", "moves the time axis, 2 time steps ahead")
    ),
    before_rnn("lag_by_roll", odd("lag_by_roll", 9), back("lag", "shifts the time axis")),
    before_rnn("lead_by_roll", odd("lag_by_roll", -9), ahead("lag", "shifts the time axis")),
    *(before_rnn(f"lead_by_gather_{n}", odd("lead_by_gather", n), ahead("lead")) for n in (1, 200)),
    before_rnn(
        "later_lags", odd("later_lags"), ahead("later", "takes frames of the time axis, 1 time step ahead")
    ),
    before_rnn("lag_by_python_loop", odd("lag_by_python_loop", 3), PYTHON_LOOP),
    *(
        before_rnn(name, odd(name, n), pattern, fixed=name == "by_while_loop")
        for name, n, pattern in (
            ("reversed_over_time", 1, ahead("reversed", "reverses the time axis")),
            ("second_step", 1, ahead("second", "takes number 1 of .* at each step, 1 time step ahead")),
            ("last_step", 1, end("last")),
            ("last_step_twice_reversed", 1, back("last", "reverses")),
            ("by_scan", 1, ahead("by_scan", "takes elements by their number along the time axis")),
            ("repeated_for_each_step", 1, length("repeated", "one iteration per time step")),
            ("by_while_loop", 9, back("by_while", "shifts the time axis")),
            ("by_map_over_rows", 9, rows("by_map", "loops over the rows of the batch")),
            ("repeated_until_all_are_small", 1, rows("repeated", "takes the max over the rows of the batch")),
            ("by_numpy", 9, python("by_numpy")),
            ("by_condition", 9, rows("by_condition", "takes number 0 of the rows")),
            ("differences", 1, ahead("differences", "takes a part of the time axis, 1 time step ahead")),
            ("every_second", 1, rate("every")),
            ("window_of_frames", 9, ahead("window")),
        )
    ),
]
SUMS = [
    before_rnn(name, odd(name), pattern)
    for name, pattern in (
        ("running_max", end("running_max")),
        ("largest_scale", ahead("largest", "takes the max over the time axis")),
        ("mean_of_the_rest", position("mean_of_the_rest")),
        ("exponential_moving_average", matrix("exponential")),
        ("standardised_over_time", ahead("standard", "takes the mean over the time axis")),
        ("softmax_over_time", ahead("softmax", "over the time axis")),
        ("sorted_over_time", ahead("sorted", "sorts the time axis")),
        ("place_of_the_largest", ahead("place", "the largest over the time axis")),
        ("spectrum_over_time", ahead("spectrum", r"works \(FFT\) over the time axis")),
    )
] + [
    dataclasses.replace(
        before_rnn(
            "normalised_over_axis_1", lambda k: k.LayerNormalization(axis=1, name="norm"), only_length("norm")
        ),
        lengths=(40,),
    ),
    before_rnn(
        "normalised_without_scale",
        lambda k: k.LayerNormalization(axis=1, center=False, scale=False, name="norm"),
        ahead("norm", "takes the mean over the time axis"),
    ),
    before_rnn("group_norm", lambda k: k.GroupNormalization(2, name="norm"), ahead("norm"), fixed=True),
    before_rnn("unit_norm", lambda k: k.UnitNormalization(axis=1, name="norm"), ahead("norm")),
    before_rnn("softmax_axis_1", lambda k: k.Softmax(axis=1, name="soft"), ahead("soft")),
]
ATTENTION = [
    before_rnn("plain_attention", odd("plain_attention"), ahead("plain", "all time steps")),
    before_rnn("masked_attention", odd("masked_attention"), pairs("masked")),
    before_rnn("pooled_by_attention", odd("pooled_by_attention"), ahead("pooled", "over the time axis")),
    before_rnn("keras_attention", lambda k: _self(k.Attention(name="attend")), ahead("attend"), fixed=True),
    before_rnn("additive", lambda k: _self(k.AdditiveAttention(name="attend")), ahead("attend")),
    before_rnn(
        "multi_head",
        lambda k: lambda x: k.MultiHeadAttention(2, 2, name="attend")(x, x),
        ahead("attend"),
        fixed=True,
    ),
    before_rnn(
        "multi_head_causal",
        lambda k: lambda x: k.MultiHeadAttention(2, 2, name="attend")(x, x, use_causal_mask=True),
        pairs("attend"),
        fixed=True,
    ),
    before_rnn(
        "group_query",
        lambda k: lambda x: k.GroupQueryAttention(2, 2, 1, name="attend")(x, x, use_causal_mask=True),
        pairs("attend"),
    ),
]
POSITIONS = [
    before_rnn("places_from_the_end", odd("places_from_the_end"), position("places"), fixed=True),
    before_rnn("shares_of_the_length", odd("shares_of_the_length"), position("shares")),
    before_rnn(
        "only_places",
        odd("only_places"),
        given_position("rnn", "a sequence"),
    ),
    before_rnn("padded_places", odd("padded_places", 2), position("padded")),
    before_rnn("places_padded_at_the_end", odd("places_padded_at_the_end", 2), position("places")),
    before_rnn("places_by_numpy", odd("places_by_numpy"), position("places")),
    before_rnn("places_of_other_size", odd("places_of_other_size"), position("places")),
    before_rnn("last_steps_left_out", odd("last_steps_left_out", 5), position("last")),
    before_rnn("divided_by_length", odd("divided_by_length"), length("divided"), fixed=True),
    before_rnn(
        "divided_by_length_in_a_function",
        odd("divided_by_length_in_a_function"),
        length("divided", "depends on"),
    ),
    before_rnn("other_above_800", odd("other_above_a_length", 800), length("other", "something different")),
    before_rnn(
        "other_above_800_by_tensors",
        odd("other_above_a_length_by_tensors", 800),
        length("other", "depends on the number of time steps"),
    ),
    # Both traces that the proof starts with are shorter.
    before_rnn("other_above_5000", odd("other_above_a_length", 5000), length("other", "something different")),
    before_rnn(
        "other_above_5000_by_tensors",
        odd("other_above_a_length_by_tensors", 5000),
        length("other", "depends on the number of time steps"),
    ),
    *(before_rnn(f"first_{n}", odd("first_elements", n), beginning("first", n)) for n in (5, 100_000)),
    before_rnn("numbers_of_numpy", odd("numbers_of_numpy"), position("numbers")),
    before_rnn("last_100000", odd("last_elements", 100_000), mixes("last", "takes the last 100000 elements")),
    before_rnn("at_most_5000", odd("at_most_so_many", 5000), mixes("at_most", "takes a part of")),
    before_rnn(
        "noise_of_a_seed", odd("noise_of_a_seed"), rows("noise", "has a different constant for each row")
    ),
]


def _chain(_layers: Any, chain: list[Any]) -> Any:
    def call(x: Any) -> Any:
        for layer in chain:
            x = layer(x)
        return x

    return call


def _self(layer: Any) -> Any:
    return lambda x: layer([x, x])


CASES = {case.name: case for case in (*CONVOLUTIONS, *POOLING, *SHIFTS, *SUMS, *ATTENTION, *POSITIONS)}
