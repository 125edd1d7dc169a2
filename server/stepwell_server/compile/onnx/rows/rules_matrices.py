"""Matrix products, convolutions and recurrent layers."""

from __future__ import annotations

import re

from stepwell_server.compile.onnx.rows.values import LostError, Node, Value, placed

_NORMAL_FORM = re.compile(r"[A-Za-z.]+(,[A-Za-z.]*)*->[A-Za-z.]*")


def matmul(node: Node) -> list[Value]:
    """Rows may be the rows of the first matrix, or an axis of the stack of matrices in both."""
    node.shared(*range(2, len(node.values)))
    return _product(node.needed(0), node.needed(1))


def quantized_matmul(node: Node) -> list[Value]:
    """The same with scales and zero points, which are shared."""
    node.shared(1, 2, 4, 5, 6, 7)
    return _product(node.needed(0), node.needed(3))


def _product(first: Value, second: Value) -> list[Value]:
    rank = max(first.rank, second.rank, 2) - (first.rank == 1) - (second.rank == 1)
    if first.axis is not None and second.axis is not None:
        if first.from_end != second.from_end or first.from_end <= 2:
            raise LostError("it multiplies rows with each other")
        return placed(rank - first.from_end)
    rows, other = (first, second) if second.axis is None else (second, first)
    summed = 1 if rows is first or rows.rank == 1 else 2
    if rows.from_end == summed:
        raise LostError("it sums over the axis of the rows")
    if rows.from_end > 2:
        _require_one(other, rows.from_end)
    # The product has an axis less if the other one is a vector: the last one, or the one before it.
    moved = other.rank == 1 and (rows is first or rows.from_end > 2)
    return placed(rank - rows.from_end + moved)


def _require_one(value: Value, from_end: int) -> None:
    if value.rank >= from_end and value.sizes is not None and value.sizes[-from_end] != 1:
        raise LostError("an input that is the same for all rows has more than one element along their axis")


def gemm(node: Node) -> list[Value]:
    """Rows are the rows of the first matrix; the second one is shared."""
    first, bias = node.needed(0), node.value(2)
    node.shared(1)
    if first.axis != (1 if node.attribute("transA", 0) else 0):
        raise LostError("it sums over the axis of the rows")
    if bias is not None:
        if bias.axis is not None and bias.from_end != 2:
            raise LostError("its bias has rows on another axis")
        if bias.axis is None:
            _require_one(bias, 2)
    return placed(0)


def einsum(node: Node) -> list[Value]:
    """The letter of the rows is the same in every input that has rows, in no other input, and in the output."""
    equation = node.attribute("equation", b"").decode().replace(" ", "")
    if not _NORMAL_FORM.fullmatch(equation) or "." in equation:
        raise LostError(f"its equation {equation!r:.60} is not followed")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    letters = {
        term[value.axis]
        for term, value in zip(terms, node.values, strict=True)
        if value is not None and value.axis is not None and value.axis < len(term)
    }
    if len(letters) != 1:
        raise LostError("its inputs have rows on different axes, so one row would meet the others")
    letter = letters.pop()
    for term, value in zip(terms, node.values, strict=True):
        if value is not None and term.count(letter) != (value.axis is not None):
            raise LostError("it combines rows with something that is the same for all")
    if right.count(letter) != 1:
        raise LostError("it sums over the axis of the rows")
    return placed(right.index(letter))


def convolution(node: Node) -> list[Value]:
    """Rows are on the first axis of the input; weights are shared."""
    node.shared(*range(1, len(node.values)))
    if node.needed(0).axis != 0:
        raise LostError("its rows are not on the first axis, so it mixes them")
    if any(node.proto.output[1:]):  # the indices of MaxPool
        raise LostError("its second output counts elements from the first row of the batch")
    return placed(0)


def recurrent(node: Node) -> list[Value]:
    """LSTM, GRU and RNN: rows are the batch of the sequence and of the initial states; weights are shared."""
    has_rows_first = bool(node.attribute("layout", 0))
    axis = 0 if has_rows_first else 1
    node.shared(1, 2, 3, *([7] if node.kind == "LSTM" else []))
    for place, expected in ((0, axis), (4, 0), (5, axis), (6, axis)):
        value = node.value(place)
        if value is None or (node.kind != "LSTM" and place > 5):
            continue
        if value.axis != expected:
            raise LostError(f"its input {node.proto.input[place]!r} does not have rows on axis {expected}")
    whole = 0 if has_rows_first else 2
    return [Value(axis=whole), Value(axis=axis), Value(axis=axis)][: len(node.proto.output)]
