"""Operations that compute each element from the elements at the same position."""

from __future__ import annotations

from collections.abc import Sequence

from stepwell_server.compile.causality.axes import Axes, is_plain
from stepwell_server.compile.causality.call import Call, Rule, broadcast
from stepwell_server.compile.causality.constants import BROADCAST, UNARY
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.values import Const, Data


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
