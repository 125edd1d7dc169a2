"""Decides what the tensors of a model are: inputs, states, constants and outputs, by the user's declaration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from stepwell_server.compile.data_file import initial_row
from stepwell_server.compile.errors import ModelError, quoted
from stepwell_server.compile.onnx import pairs
from stepwell_server.compile.onnx.rows.values import ROWS, Sizes, Value
from stepwell_server.compile.onnx.rows.walk import nodes_of
from stepwell_server.program import Array, Declaration

#: Types that sessions, records and messages have.
_TYPES = {
    np.dtype(name)
    for name in "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool".split()  # noqa: SIM905 - a list takes a line for each
}
_MAX_ROW_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Input:
    """An input of the graph that takes rows: an input of the model, or the state before a step."""

    tensor: str
    """Its name in the file."""
    name: str
    """Its name for users."""
    axis: int
    """The axis of the rows."""
    shape: tuple[int, ...]
    """Of one row, as the graph takes it, with a context."""
    dtype: str
    context: int = 0
    """The number of elements along the last axis that are taken from the previous input."""
    after: str = ""
    """For a state: the output that holds it after the step."""
    initial: Array | None = None
    """For a state: its initial value."""

    @property
    def sizes(self) -> Sizes:
        """The shape that the graph takes."""
        return (*self.shape[: self.axis], ROWS, *self.shape[self.axis :])

    @property
    def fresh(self) -> tuple[int, ...]:
        """The shape of one row without the context."""
        return (*self.shape[:-1], self.shape[-1] - self.context) if self.context else self.shape


@dataclasses.dataclass(frozen=True)
class Interface:
    """The tensors of a step function."""

    inputs: tuple[Input, ...]
    states: tuple[Input, ...]
    outputs: tuple[str, ...]
    """Outputs that are not states."""
    constants: Mapping[str, Array]
    is_single: bool
    """The file fixes a batch of one row."""
    declaration: Declaration

    @property
    def given(self) -> dict[str, Value]:
        """What is known about the inputs, to follow rows through the graph."""
        values = {
            each.tensor: Value(each.axis, each.sizes, dtype=_number(each.dtype))
            for each in (*self.inputs, *self.states)
        }
        return values | {
            name: Value(sizes=array.shape, content=array, dtype=_number(str(array.dtype)))
            for name, array in self.constants.items()
        }

    def name_of(self, tensor: str) -> str:
        """The name of an output for users."""
        return self.declaration.names.get(tensor, tensor)


def inputs_of(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    """The inputs that a caller must give: in old files, weights with a default are inputs too."""
    own = {tensor.name for tensor in graph.initializer}
    return {each.name: each for each in graph.input if each.name not in own}


def sizes_of(info: onnx.ValueInfoProto) -> list[int | None] | None:
    """The sizes in the file: None for an open one; None alone: not even the number of axes is known."""
    if not info.type.tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        for dim in info.type.tensor_type.shape.dim
    ]


def dtype_of_info(info: onnx.ValueInfoProto) -> str:
    """NumPy's name of the type of a tensor.

    Raises:
        ModelError: it is not served.
    """
    kind = info.type.tensor_type.elem_type if info.type.HasField("tensor_type") else 0
    try:
        found = onnx.helper.tensor_dtype_to_np_dtype(kind)
    except (KeyError, TypeError):
        found = None
    if found not in _TYPES:
        known = type_name(kind)
        raise ModelError(
            f"tensor {quoted(info.name)} must be of a type that sessions hold, such as float32 or int64; it is {known}. Cast it "
            "in the model"
        )
    return str(found.name)


def type_name(kind: int) -> str:
    """ONNX's name of a type."""
    if not kind:
        return "no tensor"
    try:
        return str(onnx.TensorProto.DataType.Name(kind)).lower()
    except ValueError:
        return f"of the unknown type {kind}"


def resolve(model: onnx.ModelProto, declared: Declaration) -> Interface:
    """Return the tensors of a step function.

    Raises:
        ModelError: the declaration does not fit the model; the message names the tensor, the rule and the fix.
    """
    given, made = inputs_of(model.graph), {each.name: each for each in model.graph.output}
    _require_names(declared, list(given), list(made))
    constants = {name: _constant(given[name], value) for name, value in declared.constants.items()}
    free = [name for name in given if name not in constants]
    states = _pairs(declared, free, list(made))
    for name in declared.initial:
        if name not in states:
            raise ModelError(
                f"--initial: must name the input of a state; got {quoted(name)}; the states are {_list(states)}"
            )
    _require_used(declared, states)
    for name in declared.contexts:
        if name not in free or name in states:
            raise ModelError(
                f"--context: must name an input that is neither state nor constant; got {quoted(name)}"
            )
    inputs = [_input(given[name], declared) for name in free if name not in states]
    if not inputs:
        raise ModelError(
            "must have an input that is neither state nor constant, which takes what a step brings; its inputs are "
            f"{_list(given)}, all of them states or constants"
        )
    held = [_state(given[name], made[after], declared) for name, after in states.items()]
    _require_read(model.graph, states)
    for each in (*inputs, *held):
        if math.prod(each.shape) * np.dtype(each.dtype).itemsize > _MAX_ROW_BYTES:
            raise ModelError(
                f"tensor {quoted(each.tensor)} must have at most {_MAX_ROW_BYTES} bytes for each row; its shape is {each.shape}"
            )
    # A cell such as PyTorch's GRUCell returns its state only: users see that.
    outputs = tuple(name for name in made if name not in states.values()) or tuple(made)
    fixed = [sizes_of(given[each.tensor]) for each in (*inputs, *held)]
    axes = [each.axis for each in (*inputs, *held)]
    single = any(sizes is not None and sizes[axis] == 1 for sizes, axis in zip(fixed, axes, strict=True))
    found = Interface(tuple(inputs), tuple(held), outputs, constants, single, declared)
    _require_usable_names(found)
    return found


def _require_names(declared: Declaration, given: list[str], made: list[str]) -> None:
    options: tuple[tuple[str, Iterable[str], list[str], str], ...] = (
        ("state", declared.states, given, "an input"),
        ("state", declared.states.values(), made, "an output"),
        ("batch-axis", declared.batch_axes, given + made, "a tensor"),
        ("constant", declared.constants, given, "an input"),
        ("initial", declared.initial, given, "an input"),
        ("context", declared.contexts, given, "an input"),
        ("shape", declared.shapes, given, "an input"),
        ("name", declared.names, given + made, "a tensor"),
    )
    for option, names, known, what in options:
        for name in names:
            if name not in known:
                raise ModelError(
                    f"--{option}: must name {what} of the model; there is no {quoted(name)}, there are {_list(known)}"
                )


def _require_used(declared: Declaration, states: Mapping[str, str]) -> None:
    """Refuse declarations without an effect: a state has its input's name, and a constant its own shape."""
    for before, after in states.items():
        if after in declared.names:
            raise ModelError(
                f"--name: must name an input, or an output that holds no state; got {quoted(after)}, which holds the state "
                f"{quoted(before)}. Name that, --name {before}=NAME"
            )
    for option, names in (
        ("batch-axis", declared.batch_axes),
        ("shape", declared.shapes),
        ("name", declared.names),
    ):
        for name in names:
            if name in declared.constants:
                raise ModelError(f"--{option}: must not name a constant; got {quoted(name)}. Leave it out")


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(quoted, names)) or "none"


def _pairs(declared: Declaration, given: Sequence[str], made: Sequence[str]) -> dict[str, str]:
    """The states, by their inputs: the declared ones, or those that names reveal."""
    recognized = pairs.recognized(given, made)
    if not declared.states:
        if not recognized:
            raise ModelError(
                "must have a state: no names of inputs and outputs reveal one. Name the input and the output that holds it after "
                f"the step, --state INPUT:OUTPUT; the inputs are {_list(given)}, the outputs {_list(made)}"
            )
        return recognized
    outputs = list(declared.states.values())
    twice = next((name for name in outputs if outputs.count(name) > 1), None)
    if twice is not None:
        raise ModelError(
            f"--state: each output must hold one state; got {quoted(twice)} for {_list(k for k, v in declared.states.items() if v == twice)}"
        )
    for name in declared.states:
        if name not in given:
            raise ModelError(f"--constant: must not name a state; got {quoted(name)}, which --state names")
    for name, after in recognized.items():
        if name not in declared.states and after not in outputs:
            raise ModelError(
                f"output {quoted(after)} must be in a pair: by its name it holds the state {quoted(name)} after the step. Add "
                f"--state {name}:{after}, or make the input constant, --constant {name}=VALUE"
            )
    return {name: declared.states[name] for name in given if name in declared.states}


def _require_read(graph: onnx.GraphProto, states: Mapping[str, str]) -> None:
    read = {name for node in nodes_of(graph) for name in node.input} | {each.name for each in graph.output}
    for name, after in states.items():
        if name not in read:
            raise ModelError(
                f"--state {name}:{after}: an operator must read the state; none reads {quoted(name)}. Exporters merge example inputs "
                "that are one tensor: give each input and state an example of its own, and export the model again"
            )


def _constant(info: onnx.ValueInfoProto, value: Any) -> Array:
    dtype, sizes = dtype_of_info(info), sizes_of(info)
    try:
        array: Array = np.array(value)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            whole, cast = array.astype(np.float64), array.astype(dtype)
    except (ValueError, OverflowError) as error:
        raise ModelError(
            f"--constant: {quoted(info.name)} must be numbers of {dtype}; got {value!r:.80}"
        ) from error
    is_kept = (
        np.array_equal(np.isinf(cast), np.isinf(whole))
        if cast.dtype.kind == "f"
        else np.array_equal(cast.astype(np.float64), whole)
    )
    if not is_kept:
        raise ModelError(f"--constant: {quoted(info.name)} must be numbers of {dtype}; got {value!r:.80}")
    if sizes is None:
        return cast
    if cast.ndim == 0 and None not in sizes:
        return np.full([size or 1 for size in sizes], cast)
    fits = cast.ndim == len(sizes) and all(
        size in {None, own} for size, own in zip(sizes, cast.shape, strict=True)
    )
    if not fits:
        raise ModelError(
            f"--constant: {quoted(info.name)} must have the shape {_shown(sizes)}; got {list(cast.shape)}"
        )
    return cast


def _shown(sizes: Sequence[int | None]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in sizes) + "]"


def _axis(info: onnx.ValueInfoProto, sizes: Sequence[int | None], declared: Declaration) -> int:
    """The axis of the rows of an input, which must be open, or have the size 1."""
    name = quoted(info.name)
    if not sizes:
        raise ModelError(
            f"input {name} must have a batch axis; it is a single number. Make it constant, --constant {info.name}=VALUE"
        )
    axis = declared.batch_axes.get(info.name)
    if axis is not None and axis >= len(sizes):
        raise ModelError(
            f"--batch-axis: must be an axis of the tensor; {name} has the shape {_shown(sizes)}, and got {axis}"
        )
    is_declared, axis = axis is not None, axis or 0
    others = [place for place, size in enumerate(sizes) if size is None and place != axis]
    hint = f"--batch-axis {info.name}={others[0] if others else 'AXIS'}"
    if sizes[axis] not in {None, 1}:
        raise ModelError(
            f"input {name} must have a batch axis, open or of size 1; its axis {axis} has the size {sizes[axis]} in "
            f"{_shown(sizes)}. Name the batch axis, {hint}"
            + ("" if others else ", or export the model with an open one (dynamic axes)")
        )
    if not is_declared and sizes[axis] == 1 and others:
        raise ModelError(
            f"input {name} must have one batch axis; axis 0 has the size 1 and axis {others[0]} is open in {_shown(sizes)}. Name "
            f"the batch axis, {hint} (or {info.name}=0 for a batch of one row)"
        )
    return axis


def _row_shape(info: onnx.ValueInfoProto, declared: Declaration, context: int) -> tuple[int, tuple[int, ...]]:
    """The batch axis of an input, and the shape of one row."""
    sizes, own = sizes_of(info), declared.shapes.get(info.name)
    if sizes is None:
        if own is None:
            raise ModelError(
                f"input {quoted(info.name)} must have a shape; the file leaves it open. Give that of one row, "
                f"--shape {info.name}=SIZES"
            )
        sizes = [None] * (len(own) + 1)
    axis = _axis(info, sizes, declared)
    row = [size for place, size in enumerate(sizes) if place != axis]
    if context and (not row or (row[-1] is not None and row[-1] <= context)):
        raise ModelError(
            f"--context: must be shorter than the last axis of {quoted(info.name)}, which is {_shown(sizes)}; got {context}"
        )
    if own is None:
        if None in row:
            raise ModelError(
                f"input {quoted(info.name)} must have a known shape; the file leaves {_shown(row)} of a row open. Give it, "
                f"--shape {info.name}=SIZES{', without the context' if context else ''}"
            )
        own = tuple(size for size in row if size is not None)
        own = (*own[:-1], own[-1] - context) if context else own
    if context and own[-1] < context:
        raise ModelError(
            f"--context: must be at most as long as the new part of the input, {own[-1]} of the {own[-1] + context} elements of "
            f"{quoted(info.name)}; got {context}"
        )
    whole = (*own[:-1], own[-1] + context) if context else own
    if len(whole) != len(row) or any(
        size not in {None, each} for size, each in zip(row, whole, strict=False)
    ):
        added = f", and {context} elements of context" if context else ""
        raise ModelError(
            f"--shape: must fit the shape of a row of {quoted(info.name)}, {_shown(row)}; got {list(own)}{added}"
        )
    return axis, whole


def _input(info: onnx.ValueInfoProto, declared: Declaration) -> Input:
    dtype = dtype_of_info(info)
    context = declared.contexts.get(info.name, 0)
    axis, shape = _row_shape(info, declared, context)
    if context and axis == len(shape):
        raise ModelError(
            f"--context: must be along another axis than the batch, the last one of {quoted(info.name)}"
        )
    return Input(info.name, declared.names.get(info.name, info.name), axis, shape, dtype, context)


def _state(info: onnx.ValueInfoProto, after: onnx.ValueInfoProto, declared: Declaration) -> Input:
    dtype, other = dtype_of_info(info), dtype_of_info(after)
    pair = f"--state {info.name}:{after.name}"
    if dtype != other:
        raise ModelError(
            f"{pair}: both must be of one type; {quoted(info.name)} is {dtype}, {quoted(after.name)} is {other}"
        )
    axis, shape = _row_shape(info, declared, 0)
    before, later = sizes_of(info), sizes_of(after)
    if (
        before is not None
        and later is not None
        and not {after.name, info.name} & declared.batch_axes.keys()
        and (
            len(before) != len(later)
            or any(one != two and None not in {one, two} for one, two in zip(before, later, strict=True))
        )
    ):
        raise ModelError(
            f"{pair}: both must have one shape; {quoted(info.name)} has {_shown(before)}, {quoted(after.name)} has {_shown(later)}"
        )
    initial = initial_row(info.name, declared.initial.get(info.name, 0), shape, dtype)
    name = declared.names.get(info.name, info.name)
    return Input(info.name, name, axis, shape, dtype, after=after.name, initial=initial)


def _require_usable_names(found: Interface) -> None:
    for option, names in (
        ("inputs", [each.name for each in found.inputs]),
        (
            "states",
            [each.name for each in found.states]
            + [context_name(each) for each in found.inputs if each.context],
        ),
        ("outputs", [found.name_of(name) for name in found.outputs]),
    ):
        hidden = next((name for name in names if not name.isprintable()), None)
        if hidden is not None:
            raise ModelError(
                f"--name: {option} must have names of printable characters; got {quoted(hidden)}. Give another one, "
                "--name TENSOR=NAME"
            )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ModelError(f"--name: {option} must have different names; got {quoted(twice)} twice")


def context_name(given: Input) -> str:
    """The name of the state that holds the context of an input."""
    return f"{given.name}/context"


def _number(dtype: str) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
