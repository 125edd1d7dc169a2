"""The abstract value of a tensor in the proof: data with axes, or a constant.

A constant depends on no input of the model except through its shape. Its value is computed, in both traces, only
if a rule needs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorflow.python.eager import context, execute

from stepwell_server.compile.causality.axes import Axes, Pair, time_of
from stepwell_server.compile.causality.constants import Origin, origin
from stepwell_server.compile.graph.tensorflow_setup import tf

Array = npt.NDArray[np.generic]
#: Operations that read only the shape of a tensor, which is fixed in a trace.
OF_SHAPES = {"Shape", "ShapeN", "Size", "Rank"}
#: Attributes that do not affect the result of an operation, or are shapes of this trace.
_UNIMPORTANT = {"shape", "Tshape", "output_shapes", "num_elements", "container", "shared_name"}
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
#: Maximum of elements of a constant: those of one value for each row and time step of the longest trace.
_MAX_ELEMENTS = 2**25 + 2**10
_read: ContextVar[set[str] | None] = ContextVar("_read", default=None)


class TooManyElementsError(Exception):
    """A constant is too large to be computed."""


class Before(enum.Enum):
    """The elements of a time axis that come before the first time step, if there are any: see `axes.Time`."""

    CONSTANT = "one constant: padding, and what layers make of it"
    CONSTANTS = "several constants"
    ROW = "one value of each row, which a session knows from its first step on"
    UNKNOWN = "values that a session does not know: they must be left out"


@dataclasses.dataclass(frozen=True)
class Data:
    """A tensor that depends on the model's inputs."""

    axes: Axes
    ends: bool = False
    """It belongs to the end of the sequence: it holds the value of the last time step."""
    before: Before = Before.CONSTANT

    @property
    def has_time(self) -> bool:
        """It has a value for each time step."""
        return time_of(self.axes) is not None


@dataclasses.dataclass(frozen=True)
class Items(Data):
    """A list of tensors in a TensorFlow loop, each with these axes."""

    is_empty: bool = False
    """It is empty, so its axes are unknown."""
    over_time: bool = False
    """It has one for each time step, in order."""


@dataclasses.dataclass(frozen=True)
class Const:
    """A tensor that does not depend on inputs, in the graphs of the two traces."""

    first: Any
    second: Any
    evaluators: tuple[Evaluator, Evaluator]

    def arrays(self) -> tuple[Array, Array]:
        """Return its values in the two traces."""
        return self.evaluators[0].array(self.first), self.evaluators[1].array(self.second)

    @property
    def array(self) -> Array:
        """Its value in the first trace."""
        return self.evaluators[0].array(self.first)

    @property
    def is_same(self) -> bool:
        """It has the same value in both traces."""
        if self.evaluators[0].digest(self.first) == self.evaluators[1].digest(self.second):
            return True
        first, second = self.arrays()
        return first.dtype == second.dtype and first.shape == second.shape and equal(first, second)

    @property
    def origin(self) -> Origin:
        """How it is computed."""
        known = self.evaluators[0].origins
        for one, two in _in_pairs(self.first.op, self.second.op, known):
            is_alike = one.type == two.type and len(one.inputs) == len(two.inputs)
            is_alike = is_alike and attributes(one) == attributes(two)
            known[one.name] = origin(one, two, known, self._is_other_same) if is_alike else Origin.OTHER
        return known[self.first.op.name]

    def _is_other_same(self, first: Any, second: Any) -> bool:
        return Const(first, second, self.evaluators).is_same

    def pairs(self) -> list[Pair]:
        """Return its integers in the two traces, flattened.

        Raises:
            ValueError: it has more in one trace than in the other.
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
    """Record the weights that are read to compute constants: other weights may give other constants."""
    read = set[str]()
    token = _read.set(read)
    try:
        yield read
    finally:
        _read.reset(token)


class Evaluator:
    """Computes constants of one graph, outside the graph and each operation once."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        """``given`` has the values of placeholders, by name."""
        self._values: dict[str, Any] = dict(given)
        self.origins: dict[str, Origin] = {}
        """How constants are computed, by operation."""
        self._given = frozenset(given)
        self._digests: dict[str, bytes] = {name: str(id(value)).encode() for name, value in given.items()}

    def value(self, tensor: Any) -> Any:
        """Return the value of a constant as an eager tensor.

        Raises:
            ValueError: it cannot be computed.
            TooManyElementsError: it is too large, or another one is that it needs.
        """
        if tensor.name in self._given and (read := _read.get()) is not None:
            read.add(tensor.name)
        if tensor.name not in self._values:
            for op in self._ordered(tensor.op, self._values):
                if _is_of_open_shape(op):
                    raise ValueError("a shape depends on values")
                if any((value.shape.num_elements() or 0) > _MAX_ELEMENTS for value in op.outputs):
                    raise TooManyElementsError
                try:
                    with tf.init_scope():  # A graph may be in progress.
                        results = self._results(op)
                except Exception as error:  # TensorFlow may raise anything.
                    raise ValueError(f"a constant cannot be computed ({op.type})") from error
                for result, value in zip(op.outputs, results, strict=True):
                    self._values[result.name] = value
        return self._values[tensor.name]

    def array(self, tensor: Any) -> Array:
        """Return the value of a constant."""
        return np.asarray(self.value(tensor))

    def digest(self, tensor: Any) -> bytes:
        """Return a hash of the computation of a constant: equal hashes mean equal values.

        Weights are identified by their variable, not by their values.
        """
        if tensor.name not in self._digests:
            for op in self._ordered(tensor.op, self._digests):
                made = hashlib.sha256(f"{op.type} {attributes(op)}".encode())
                if _calls_functions(op) or _is_of_open_shape(op):
                    made.update(secrets.token_bytes())  # Its result is not determined by its attributes.
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
        """Return the operations that ``wanted`` still needs, dependencies first."""
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


def _in_pairs(one: Any, two: Any, known: Collection[str]) -> Iterator[tuple[Any, Any]]:
    """Yield the operations that two others need, side by side, dependencies first, without those that are known."""
    waiting, seen = [(one, two, False)], set[str]()
    while waiting:
        first, second, is_ready = waiting.pop()
        if is_ready:
            yield first, second
        elif first.name not in known and first.name not in seen:
            seen.add(first.name)
            waiting.append((first, second, True))
            if first.type not in OF_SHAPES:
                pairs = zip(first.inputs, second.inputs, strict=False)
                waiting += [(value.op, other.op, False) for value, other in pairs]


def needed_by(wanted: Iterable[Any], graph: Any, known: Collection[str] = ()) -> list[tuple[int, Any]]:
    """Return the operations of a graph that some tensors need, in graph order, with their indices.

    What is needed only for ``known`` tensors is left out.
    """
    seen: set[str] = set()
    waiting = list(wanted)
    while waiting:
        op = waiting.pop().op
        if op.name not in seen:
            seen.add(op.name)
            is_end = op.type in OF_SHAPES or any(output.name in known for output in op.outputs)
            waiting += () if is_end else op.inputs
    return [(i, op) for i, op in enumerate(graph.get_operations()) if op.name in seen]


def attributes(op: Any) -> dict[str, Any]:
    """Return the attributes of an operation, without functions and the shapes of this trace.

    The names of functions differ between traces.
    """
    return {
        name: value.SerializeToString(deterministic=True)
        for name, value in sorted(op.node_def.attr.items())
        if name not in _UNIMPORTANT and not name.startswith("_") and not _is_function(value)
    }


def _is_of_open_shape(op: Any) -> bool:
    """Whether it reads a shape that depends on values."""
    return op.type in OF_SHAPES and not all(value.shape.is_fully_defined() for value in op.inputs)


def _calls_functions(op: Any) -> bool:
    return any(_is_function(value) for value in op.node_def.attr.values())


def _is_function(value: Any) -> bool:
    return bool(value.HasField("func") or value.list.func)


def sizes(first: Any, second: Any) -> list[Pair]:
    """Return the sizes of a tensor in the two traces.

    Raises:
        ValueError: they are unknown, or the number of dimensions differs.
    """
    one, two = first.shape, second.shape
    if not (one.is_fully_defined() and two.is_fully_defined()) or len(one) != len(two):
        raise ValueError("its shape depends on values")
    return [Pair(a, b) for a, b in zip(one.as_list(), two.as_list(), strict=True)]


def equal(one: Array, two: Array) -> bool:
    """Whether two arrays are equal; NaN equals NaN."""
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
    """Return an attribute's value in the form for the eager runtime."""
    if isinstance(value, tf.DType):
        return value.as_datatype_enum
    if isinstance(value, tf.TensorShape):
        return value.as_list()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
