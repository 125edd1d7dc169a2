"""Operations that compute each element from the elements at the same position."""

from __future__ import annotations

from collections.abc import Sequence

from stepwell_server.compile.causality.axes import Axes, is_plain
from stepwell_server.compile.causality.call import Call, Rule, broadcast
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.values import Const, Data

#: One input, one result.
UNARY = frozenset(
    {
        "Abs",
        "Acos",
        "Acosh",
        "Angle",
        "AsString",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BesselI0",
        "BesselI0e",
        "BesselI1",
        "BesselI1e",
        "Bitcast",
        "Bucketize",
        "Cast",
        "Ceil",
        "ComplexAbs",
        "Cos",
        "Cosh",
        "Digamma",
        "Elu",
        "EnsureShape",
        "Erf",
        "Erfc",
        "Erfinv",
        "Exp",
        "Expm1",
        "Floor",
        "Identity",
        "Imag",
        "Inv",
        "Invert",
        "IsFinite",
        "IsInf",
        "IsNan",
        "LeakyRelu",
        "Lgamma",
        "Log",
        "Log1p",
        "LogicalNot",
        "Ndtri",
        "Neg",
        "OnesLike",
        "PreventGradient",
        "Real",
        "Reciprocal",
        "Relu",
        "Relu6",
        "Rint",
        "Round",
        "Rsqrt",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Snapshot",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Square",
        "StopGradient",
        "StringToHashBucketFast",
        "StringToHashBucketStrong",
        "Tan",
        "Tanh",
        "ZerosLike",
    }
)
#: Several inputs, broadcast to one result.
BROADCAST = frozenset(
    {
        "Add",
        "AddV2",
        "AddN",
        "Atan2",
        "BiasAdd",
        "Betainc",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "ClipByValue",
        "Complex",
        "Div",
        "DivNoNan",
        "Equal",
        "FloorDiv",
        "FloorMod",
        "Greater",
        "GreaterEqual",
        "Igamma",
        "Igammac",
        "LeftShift",
        "Less",
        "LessEqual",
        "LogicalAnd",
        "LogicalOr",
        "Maximum",
        "Minimum",
        "Mod",
        "Mul",
        "MulNoNan",
        "NextAfter",
        "NotEqual",
        "Polygamma",
        "Pow",
        "RealDiv",
        "RightShift",
        "SelectV2",
        "SquaredDifference",
        "Sub",
        "TruncateDiv",
        "TruncateMod",
        "Xdivy",
        "Xlog1py",
        "Xlogy",
        "Zeta",
    }
)


def _unary(call: Call) -> Sequence[Axes]:
    return [call.data(0).axes]


def _broadcast(call: Call) -> Sequence[Axes]:
    if call.kind == "BiasAdd" and call.attr("data_format") == b"NCHW":
        raise Refusal(Reason.UNPROVEN, "has its channels before the other axes (BiasAdd)")
    return [broadcast(call, range(len(call.inputs)))]


def _identities(call: Call) -> Sequence[Data | Const]:
    return call.inputs


def _lookup(call: Call) -> Sequence[Axes]:
    """Look up keys one by one in a table (input 0), which is constant."""
    broadcast(call, [2])
    return [call.data(1).axes]


def _normalization(call: Call) -> Sequence[Axes]:
    """Batch normalization. It is allowed with the statistics of training; those of the batch would mix its rows."""
    if call.attr("is_training"):
        raise Refusal(Reason.ROWS, "normalises by the mean and the variance of the batch")
    axes = call.data(0).axes
    channels = axes[-1] if call.attr("data_format") == b"NHWC" else axes[1]
    if not is_plain(channels) or any(isinstance(value, Data) for value in call.inputs[1:]):
        raise Refusal(Reason.UNPROVEN, "normalises over the time axis (FusedBatchNorm)")
    for i in range(1, len(call.inputs)):
        call.axes(i)
    return [axes]  # The other results are the statistics.


RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BROADCAST, _broadcast),
    "Identity": _identities,
    "IdentityN": _identities,
    "LookupTableFindV2": _lookup,
    "FusedBatchNormV3": _normalization,
}
