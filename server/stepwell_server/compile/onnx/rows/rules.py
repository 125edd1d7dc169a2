"""The operators through which rows are followed, with the rule of each."""

from __future__ import annotations

from collections.abc import Callable

from stepwell_server.compile.onnx.rows import (
    rules_elementwise,
    rules_matrices,
    rules_shapes,
    rules_sums,
)
from stepwell_server.compile.onnx.rows.values import Node, Value

Rule = Callable[[Node], list[Value]]
"""Places the rows in the outputs of an operator, of which at least one input has rows."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(rules_elementwise.ONE_INPUT, rules_elementwise.one_input),
    **dict.fromkeys(rules_elementwise.BROADCAST, rules_elementwise.broadcast),
    **dict.fromkeys(rules_elementwise.SCALED, rules_elementwise.scaled),
    "Dropout": rules_elementwise.dropout,
    "MatMul": rules_matrices.matmul,
    "MatMulInteger": rules_matrices.matmul,
    "QLinearMatMul": rules_matrices.quantized_matmul,
    "Gemm": rules_matrices.gemm,
    "Einsum": rules_matrices.einsum,
    **dict.fromkeys(
        "Conv ConvInteger ConvTranspose QLinearConv AveragePool GlobalAveragePool GlobalMaxPool LpPool MaxPool".split(),  # noqa: SIM905 - a list takes a line for each
        rules_matrices.convolution,
    ),
    **dict.fromkeys(["LSTM", "GRU", "RNN"], rules_matrices.recurrent),
    **dict.fromkeys(rules_sums.REDUCTIONS, rules_sums.reduction),
    **dict.fromkeys(rules_sums.ALONG, rules_sums.along),
    **dict.fromkeys(rules_sums.FROM_AXIS, rules_sums.from_axis),
    **dict.fromkeys(
        ["BatchNormalization", "GroupNormalization", "InstanceNormalization"], rules_sums.by_channel
    ),
    "MeanVarianceNormalization": rules_sums.mean_variance,
    "CumSum": rules_sums.cumulative,
    "TopK": rules_sums.largest,
    "Transpose": rules_shapes.transpose,
    "Squeeze": rules_shapes.squeeze,
    "Unsqueeze": rules_shapes.unsqueeze,
    "Concat": rules_shapes.concat,
    "Split": rules_shapes.split,
    "Slice": rules_shapes.slices,
    "Gather": rules_shapes.gather,
    "GatherElements": rules_shapes.gather_elements,
    "Pad": rules_shapes.pad,
    "Tile": rules_shapes.tile,
    "Flatten": rules_shapes.flatten,
    "Reshape": rules_shapes.reshape,
    "Expand": rules_shapes.expand,
}
#: Operators that take the number of rows as a size, at this input.
SIZED = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}
#: Operators without inputs that differ from run to run.
RANDOM = frozenset(
    ["Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"]
)
