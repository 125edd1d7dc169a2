"""Creates operations of one graph again in another."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.causality.axes import BATCH, Time, elements
from stepwell_server.compile.causality.cut import Cut
from stepwell_server.compile.causality.proof import captured
from stepwell_server.compile.causality.values import OF_SHAPES, Const, Data, equal, needed_by
from stepwell_server.compile.graph.tensorflow_setup import tf

Array = npt.NDArray[np.generic]
#: Attributes that TensorFlow derives from the inputs, or that matter only in training.
_LEFT_OUT = {"_output_shapes", "_gradient_op_type"}
#: TensorFlow computes them without gaps only, on a CPU.
_WITHOUT_GAPS = {"Conv3D", "DepthwiseConv2dNative"}


class Constants:
    """Creates the constants of a graph, and reads its weights, in the current graph."""

    def __init__(self, side: Cut, given: Mapping[str, Any] | None = None) -> None:
        """``given`` has the constants that a function of the graph gets, by name."""
        self._side = side
        self._made: dict[str, Any] = dict(captured(side) if given is None else given)

    def of_function(self, given: Mapping[str, Any]) -> Constants:
        """Return the same for a function of the graph, such as the body of a loop."""
        return Constants(self._side, given)

    def make(self, tensor: Any) -> Any:
        """Return a constant."""
        if tensor.name not in self._made:
            for _, op in needed_by([tensor], tensor.graph):
                if op.outputs and op.outputs[0].name not in self._made:
                    self._add(op)
        return self._made[tensor.name]

    def _add(self, op: Any) -> None:
        if op.type in OF_SHAPES:
            shape = op.inputs[0].shape.as_list()
            found = {"Shape": shape, "ShapeN": shape, "Size": int(np.prod(shape)), "Rank": len(shape)}[
                op.type
            ]
            results = [tf.constant(found, op.outputs[0].dtype)]
        else:
            results = again(op, [self._made[value.name] for value in op.inputs])
        self._made.update((made.name, result) for made, result in zip(op.outputs, results, strict=True))

    def watch_weights(self) -> None:
        """Let the current function own the variables, as if Keras had read them: freezing looks for them."""
        for variable in self._side.function.variables:
            tf.compat.v1.get_default_graph().watch_variable(variable)


def again(op: Any, inputs: Sequence[Any], **changed: Any) -> list[Any]:
    """Create an operation again with other inputs, and some other attributes."""
    attributes = {name: value for name, value in op.node_def.attr.items() if name not in _LEFT_OUT}
    for name, value in changed.items():
        attributes[name] = _attribute(value)
    graph = tf.compat.v1.get_default_graph()
    types = [output.dtype.base_dtype for output in op.outputs]
    return list(graph.create_op(op.type, list(inputs), types, name=op.name, attrs=attributes).outputs)


def _attribute(value: Any) -> Any:
    made = tf.compat.v1.AttrValue()
    if isinstance(value, bytes):
        made.s = value
    else:
        made.list.i.extend(value)
        made.list.SetInParent()
    return made


def first_elements(
    side: Cut, wanted: Mapping[str, tuple[Any, Data, int]], later: Collection[str] = ()
) -> dict[str, Array]:
    """Return the first elements of tensors along the time axis, of one row.

    They must depend on no input: zeros are used. The whole graph is computed once.

    Args:
        side: the graph of the model.
        wanted: tensors, their axes, and the number of elements, by any key.
        later: tensors of which no element comes before the first time step; zeros are used, too.

    Returns:
        arrays of the shape ``(elements, sizes...)``, by the same keys; the sizes are those of the plain dimensions.
    """

    def compute() -> dict[str, Any]:
        made: dict[str, Any] = dict(captured(side))
        for _, op in needed_by([tensor for tensor, _, _ in wanted.values()], side.graph, later):
            if op.outputs and op.outputs[0].name in made:
                continue
            if op.type == "Placeholder" or any(value.name in later for value in op.outputs):
                results = [
                    None if value.dtype == tf.variant else tf.zeros(value.shape, value.dtype)
                    for value in op.outputs
                ]
            elif op.type in OF_SHAPES:
                constants = Constants(side)
                results = [constants.make(value) for value in op.outputs]
            else:
                results = _computed(op, [made[value.name] for value in op.inputs])
            made.update((one.name, result) for one, result in zip(op.outputs, results, strict=True))
        return {
            key: _first(side, made[tensor.name], data, count) for key, (tensor, data, count) in wanted.items()
        }

    function = tf.function(compute, autograph=False)
    return {key: np.asarray(value) for key, value in function().items()}


def _computed(op: Any, inputs: list[Any]) -> list[Any]:
    if op.type not in _WITHOUT_GAPS or set(op.get_attr("dilations")) == {1}:
        return again(op, inputs)
    options: dict[str, Any] = {"padding": op.get_attr("padding").decode()}
    if op.type == "Conv3D":
        return [tf.nn.convolution(*inputs, dilations=op.get_attr("dilations")[1:-1], **options)]
    return [
        tf.nn.depthwise_conv2d(
            *inputs, op.get_attr("strides"), dilations=op.get_attr("dilations")[1:-1], **options
        )
    ]


def _first(side: Cut, value: Any, data: Data, count: int) -> Any:
    factors = [factor for dim in data.axes for factor in dim]
    value = tf.reshape(value, [side.scale.of(factor) for factor in factors])
    rows, time = factors.index(BATCH), next(i for i, x in enumerate(factors) if isinstance(x, Time))
    value = tf.gather(value, range(count), axis=time)
    value = tf.gather(value, [0], axis=rows)
    rest = [i for i in range(len(factors)) if i not in (rows, time)]
    value = tf.transpose(value, [rows, time, *rest])
    return tf.cast(value[0], tf.float32) if value.dtype == tf.bfloat16 else value[0]


def reduced(const: Const, dims: Sequence[Any]) -> Array:
    """Return a constant that is uniform over rows and time steps, with one of each; ``dims`` are its dimensions.

    Of a time step that brings several elements, it has all of them, or one if they are equal.

    Raises:
        ValueError: rows or time steps share a dimension with others.
    """
    array = const.array
    for axis, (size, dim) in enumerate(zip(const.shape(), dims, strict=True)):
        if not size.is_same:
            time = elements(dim)
            if time is not None and len(dim) > 1:
                array = np.take(array, range(time.per), axis)
                continue
            one = np.take(array, [0], axis)
            if len(dim) > 1 and not equal(array, np.broadcast_to(one, array.shape)):
                raise ValueError("a constant has rows or time steps in one dimension with others")
            array = one
    return array


def is_fixed(const: Const) -> bool:
    """Whether the shape of a constant depends on neither rows nor time steps."""
    return all(size.is_same for size in const.shape())


def plain_sizes(axes: Iterable[Any]) -> list[int]:
    """Return the sizes of one row of one time step, in order."""
    return [size for dim in axes for factor in dim if (size := _size(factor))]


def _size(factor: Any) -> int:
    """Return the size of a factor in one row of one time step; 0 if it has none."""
    if isinstance(factor, Time):
        return factor.per if factor.per > 1 else 0
    return factor if isinstance(factor, int) else 0


def step_shape(axes: Iterable[Any]) -> list[int]:
    """Return the shape of one time step; -1 where the rows are."""
    return [-1 if BATCH in dim else math.prod(plain_sizes([dim])) for dim in axes]
