"""What the proof knows of a tensor: that it holds data, with its axes, or that it is constant.

A constant is one that no input of the model reaches but through its shape. Its value is computed, in both
traces, only where a rule asks for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import secrets
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorflow.python.eager import context, execute

from stepwell_server.compile.causality.axes import TIME, Axes, Pair, labels
from stepwell_server.compile.graph.tensorflow_setup import tf

Array = npt.NDArray[np.generic]
#: Operations that read the shape of a tensor, which a trace fixes, and not its values.
OF_SHAPES = {"Shape", "ShapeN", "Size", "Rank"}
#: What a node says of itself that is not part of what it computes, or is a shape of this trace.
_UNIMPORTANT = {"shape", "Tshape", "output_shapes", "container", "shared_name"}
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_read: ContextVar[set[str] | None] = ContextVar("_read", default=None)


@dataclasses.dataclass(frozen=True)
class Data:
    """A tensor that depends on the model's inputs."""

    axes: Axes
    ends: bool = False
    """It is about the end of the sequence: it holds, for all time steps together, the last one's value."""

    @property
    def has_time(self) -> bool:
        """It holds something for each time step."""
        return TIME in labels(self.axes)


@dataclasses.dataclass(frozen=True)
class Items(Data):
    """A list of tensors in TensorFlow's own kind of loop, each of which has these axes."""

    is_empty: bool = False
    """Nothing was put into it, so nothing is known of the axes."""


@dataclasses.dataclass(frozen=True)
class Const:
    """A tensor that does not, as it stands in the graphs of the two traces."""

    first: Any
    second: Any
    evaluators: tuple[Evaluator, Evaluator]

    def arrays(self) -> tuple[Array, Array]:
        """Return its values in the two traces."""
        return self.evaluators[0].array(self.first), self.evaluators[1].array(self.second)

    @property
    def is_same(self) -> bool:
        """It has one value in both traces."""
        if self.evaluators[0].digest(self.first) == self.evaluators[1].digest(self.second):
            return True
        first, second = self.arrays()
        return first.dtype == second.dtype and first.shape == second.shape and equal(first, second)

    def pairs(self) -> list[Pair]:
        """Return its integers, flat, as they stand in the two traces.

        Raises:
            ValueError: it has more of them in one trace than in the other.
        """
        first, second = (np.ravel(value) for value in self.arrays())
        if len(first) != len(second):
            raise ValueError("the number of values depends on the length of the sequence")
        return [Pair(int(one), int(two)) for one, two in zip(first, second, strict=True)]

    def shape(self) -> list[Pair]:
        """Return its sizes in the two traces."""
        return sizes(self.first, self.second)


@contextlib.contextmanager
def weights_recorded() -> Iterator[set[str]]:
    """Collect what weights are looked at meanwhile to compute a constant: with others, the constant may be another one."""
    read = set[str]()
    token = _read.set(read)
    try:
        yield read
    finally:
        _read.reset(token)


class Evaluator:
    """Computes constants of one graph: operation by operation, each once, outside of the graph."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        """Prepare for a graph; ``given`` has the values of its placeholders that have one, by name."""
        self._values: dict[str, Any] = dict(given)
        self._given = frozenset(given)
        self._digests: dict[str, bytes] = {name: str(id(value)).encode() for name, value in given.items()}

    def value(self, tensor: Any) -> Any:
        """Return the value of a constant as an eager tensor.

        Raises:
            ValueError: it cannot be computed.
        """
        if tensor.name in self._given and (read := _read.get()) is not None:
            read.add(tensor.name)
        if tensor.name not in self._values:
            for op in self._ordered(tensor.op, self._values):
                if _is_of_open_shape(op):
                    raise ValueError("a shape depends on values")
                try:
                    results = self._results(op)
                except Exception as error:  # TensorFlow raises whatever it likes.
                    raise ValueError(f"a constant cannot be computed ({op.type})") from error
                for result, value in zip(op.outputs, results, strict=True):
                    self._values[result.name] = value
        return self._values[tensor.name]

    def array(self, tensor: Any) -> Array:
        """Return the value of a constant."""
        return np.asarray(self.value(tensor))

    def digest(self, tensor: Any) -> bytes:
        """Return a hash of how a constant is made: those of one hash have one value.

        Weights are told by which variable is read, not by their values.
        """
        if tensor.name not in self._digests:
            for op in self._ordered(tensor.op, self._digests):
                made = hashlib.sha256(f"{op.type} {attributes(op)}".encode())
                if _calls_functions(op) or _is_of_open_shape(op):
                    made.update(secrets.token_bytes())  # What it gives stands in no attribute.
                for value in op.inputs:
                    made.update(str(value.shape).encode() if op.type in OF_SHAPES else self.digest(value))
                for i, result in enumerate(op.outputs):
                    self._digests[result.name] = made.digest() + i.to_bytes(4)
        return self._digests[tensor.name]

    def _results(self, op: Any) -> list[Any]:
        if op.type in OF_SHAPES:
            return [_of_shape(op, i) for i in range(len(op.outputs))]
        return _run(op, [self.value(value) for value in op.inputs])

    def _ordered(self, wanted: Any, done: Mapping[str, Any]) -> list[Any]:
        """Return the operations that ``wanted`` needs and that are not done, in the order of need."""
        order: list[Any] = []
        waiting, seen = [(wanted, False)], set()
        while waiting:
            op, is_ready = waiting.pop()
            if is_ready:
                order.append(op)
            elif op.name not in seen and not (op.outputs and op.outputs[0].name in done):
                seen.add(op.name)
                waiting.append((op, True))
                if op.type not in OF_SHAPES:
                    waiting += [(x.op, False) for x in op.inputs if x.name not in done]
        return order


def attributes(op: Any) -> dict[str, Any]:
    """Return what an operation is told besides its inputs, without functions and the shapes of this trace.

    Functions have another name in each trace, whatever they compute.
    """
    return {
        name: value.SerializeToString(deterministic=True)
        for name, value in sorted(op.node_def.attr.items())
        if name not in _UNIMPORTANT and not name.startswith("_") and not _is_function(value)
    }


def _is_of_open_shape(op: Any) -> bool:
    """Whether it reads a shape that the sizes of the trace do not fix: values do."""
    return op.type in OF_SHAPES and not all(value.shape.is_fully_defined() for value in op.inputs)


def _calls_functions(op: Any) -> bool:
    return any(_is_function(value) for value in op.node_def.attr.values())


def _is_function(value: Any) -> bool:
    return bool(value.HasField("func") or value.list.func)


def sizes(first: Any, second: Any) -> list[Pair]:
    """Return the sizes of a tensor in the two traces.

    Raises:
        ValueError: they are not known, or it has more dimensions in one trace than in the other.
    """
    one, two = first.shape, second.shape
    if not (one.is_fully_defined() and two.is_fully_defined()) or len(one) != len(two):
        raise ValueError("its shape depends on values")
    return [Pair(a, b) for a, b in zip(one.as_list(), two.as_list(), strict=True)]


def equal(one: Array, two: Array) -> bool:
    """Return whether two arrays hold the same; "not a number" is the same as itself."""
    may_be_nan = np.issubdtype(one.dtype, np.inexact)
    return bool(np.array_equal(one, two, equal_nan=may_be_nan))


def _of_shape(op: Any, i: int) -> Any:
    shape = op.inputs[i].shape
    if op.type == "Rank":
        return tf.constant(len(shape))
    if op.type == "Size":
        return tf.constant(shape.num_elements(), op.outputs[0].dtype)
    return tf.constant(shape.as_list(), op.outputs[i].dtype)


def _run(op: Any, inputs: list[Any]) -> list[Any]:
    """Run one operation eagerly."""
    if op.type == "Const":
        return [tf.constant(tf.make_ndarray(op.get_attr("value")))]
    if op.type in _CALLS:
        return list(op.graph._get_function(op.get_attr("f").name)(*inputs))
    if op.type == "Placeholder" or _calls_functions(op):
        raise ValueError(f"the operation {op.type} cannot be computed by itself")
    attributes: list[Any] = []
    for attribute in op.op_def.attr:
        attributes += [attribute.name, _plain(op.get_attr(attribute.name))]
    return list(execute.quick_execute(op.type, len(op.outputs), inputs, tuple(attributes), context.context()))


def _plain(value: Any) -> Any:
    """Return an attribute's value as the eager runtime takes it."""
    if isinstance(value, tf.DType):
        return value.as_datatype_enum
    if isinstance(value, tf.TensorShape):
        return value.as_list()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
