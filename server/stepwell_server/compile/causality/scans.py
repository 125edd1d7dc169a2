"""Loops over time that process one element after the other, such as `keras.ops.scan` and `tf.scan`.

In iteration ``i`` the body reads the element ``i`` of some lists and values that the iteration before it returned, and
writes the element ``i`` of other lists. There is one iteration for each time step, in order. So by induction, what it
writes at ``i`` depends on no later time step, like the output of a recurrent layer, whose state is what it carries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.causality.axes import BATCH, TIME, Axes, Pair, Scales, labels, normal
from stepwell_server.compile.causality.call import Call, Memory, Need
from stepwell_server.compile.causality.refusals import Reason, Refusal
from stepwell_server.compile.causality.values import Const, Data, Items, equal, needed_by, sizes
from stepwell_server.compile.graph.tensorflow_setup import tf

CLAUSE = "loops over"
#: No sequence has more time steps than this, so it is no limit.
_MAX_LIMIT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Body:
    """The variables of a loop in one graph, by their places."""

    graph: Any
    counters: Mapping[int, int]
    """Those that count the iterations, and where they begin."""
    kept: frozenset[int]
    """Those that do not change."""
    written: Mapping[int, Any]
    """Lists of which an iteration writes one element, and that element."""
    carried: Mapping[int, Any]
    """Values that an iteration hands to the next one, and what it returns."""
    read: Mapping[str, int]
    """Elements of lists that an iteration reads, by name, and their lists."""
    before: Mapping[str, int]
    """What the iteration before it handed over, by name."""
    start: int
    """The number of the first element that is read and written."""
    limits: tuple[Any, ...]
    """Where its counters begin, and the numbers or the places of variables below which they are while it runs."""

    @property
    def shown(self) -> tuple[Any, ...]:
        """What must be equal in both traces."""
        places = sorted(self.kept), sorted(self.counters.items()), sorted(self.written), sorted(self.carried)
        return (*places, [*self.read.values()], [*self.before.values()], self.start, len(self.limits))

    @property
    def results(self) -> list[Any]:
        """All tensors that an iteration computes."""
        return [*self.written.values(), *self.carried.values()]


@dataclasses.dataclass(frozen=True)
class Scan:
    """A loop that was proven to run step by step."""

    body: Body
    values: Mapping[str, Data | Const]
    """The abstract value of each tensor of its body."""
    axes: Mapping[int, Axes]
    """The axes of what it writes and carries."""
    first: Mapping[int, Any]
    """The tensors with which these begin, and of written lists that have an element before the first iteration."""
    unmade: frozenset[str]
    """Operations that only create its lists."""


def source(tensor: Any) -> Any:
    """Return what a tensor is a copy of."""
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def body_of(op: Any) -> Body | None:
    """Return the body of a loop if it processes elements in order, or None."""
    graph = op.graph._get_function(op.get_attr("body").name).graph
    places = {tensor.name: place for place, tensor in enumerate(graph.inputs)}
    results = [source(tensor) for tensor in graph.outputs]
    kept = frozenset(i for i, one in enumerate(results) if places.get(one.name) == i)
    counters = {
        i: int(start)
        for i, one in enumerate(results)
        if _is_counted(one, graph.inputs[i]) and (start := number_of(op.inputs[i])) is not None
    }
    written, carried, lists = dict[int, Any](), dict[int, Any](), set[int]()
    indices: set[int | None] = set()
    for i, one in enumerate(results):
        if i in kept or i in counters:
            continue
        if one.dtype != tf.variant:
            carried[i] = one
        elif one.op.type != "TensorListSetItem" or source(one.op.inputs[0]) is not graph.inputs[i]:
            return None
        elif number_of(one.op.inputs[1]) == 0:
            carried[i] = one.op.inputs[2]
            lists.add(i)
        else:
            written[i] = one.op.inputs[2]
            indices.add(places.get(source(one.op.inputs[1]).name))
    read: dict[str, int] = {}
    before = {graph.inputs[i].name: i for i in carried if i not in lists}
    for item in graph.get_operations():
        if item.type == "TensorListGetItem":
            place = places.get(source(item.inputs[0]).name, -1)
            if place in lists and number_of(item.inputs[1]) == 0:
                before[item.outputs[0].name] = place
            elif place in kept:
                read[item.outputs[0].name] = place
                indices.add(places.get(source(item.inputs[1]).name))
            else:
                return None
    starts = {counters.get(-1 if index is None else index) for index in indices}
    limits = tuple(_limits(op, counters, kept))
    start = next(iter(starts), None)
    if len(starts) != 1 or start not in (0, 1) or not limits or None in limits:
        return None
    return Body(graph, counters, kept, written, carried, read, before, start, limits)


def _is_counted(result: Any, param: Any) -> bool:
    """Whether a result is one more than a whole number."""
    if result.op.type != "AddV2" or not result.dtype.is_integer or result.shape.rank != 0:
        return False
    one, two = result.op.inputs
    return source(one) is param and number_of(two) == 1


def _limits(op: Any, counters: Mapping[int, int], kept: Collection[int]) -> Iterator[Any]:
    """Yield where each counter begins, and the number or the variable below which it is; None if that is unknown."""
    graph = op.graph._get_function(op.get_attr("cond").name).graph
    places = {tensor.name: place for place, tensor in enumerate(graph.inputs)}
    waiting = list(graph.outputs)
    while waiting:
        one = source(waiting.pop())
        if one.op.type == "LogicalAnd":
            waiting += one.op.inputs
            continue
        less = [source(value) for value in one.op.inputs]
        counter = counters.get(places.get(less[0].name, -1)) if one.op.type == "Less" else None
        if counter is None:
            yield None
            return
        number = number_of(less[1])
        limit = places.get(less[1].name)
        yield (counter, number, limit) if number is not None or limit in kept else None


def number_of(tensor: Any) -> int | None:
    """Return the whole number that a constant of a graph is, or None."""
    tensor = source(tensor)
    if tensor.op.type != "Const" or not tensor.dtype.is_integer or tensor.shape.rank != 0:
        return None
    return int(tf.make_ndarray(tensor.op.get_attr("value")))


class Loop:
    """A loop over time in both traces."""

    def __init__(
        self,
        one: Any,
        two: Any,
        inputs: Sequence[Data | Const],
        known: Mapping[str, Data | Const],
        scales: Scales,
    ) -> None:
        """``inputs`` are the variables of the loop before its first iteration, and ``known`` are values outside it.

        Raises:
            Refusal: it does not process one element after the other.
        """
        self.name, self._ops, self._inputs, self._known = str(one.name), (one, two), inputs, known
        self._scales, self._even = scales, Call(one, two, (), scales).even
        self.refusal = Refusal(Reason.TIME, f"{CLAUSE} the time axis")
        bodies = [body for op in (one, two) if (body := body_of(op)) is not None]
        if len(bodies) != 2 or bodies[0].shown != bodies[1].shown:
            raise self.refusal
        self.bodies = bodies[0], bodies[1]
        self._body = body = bodies[0]
        self.operations = (needed_by(body.results, body.graph), needed_by(bodies[1].results, bodies[1].graph))
        self._require_one_for_each()
        self._require_no_length()
        self._axes = {place: self._begun(place) for place in body.carried}
        self.values: dict[str, Data] = {name: Data(self._axes[place]) for name, place in body.before.items()}
        self.given: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
        used = {value.name for _, op in self.operations[0] for value in op.inputs}
        numbers = {body.graph.inputs[place].name for place in body.counters}
        for _, op in self.operations[0]:
            if op.outputs[0].name not in body.read and any(value.name in numbers for value in op.inputs):
                raise Refusal(
                    Reason.POSITION, f"uses the number of the time step where it {CLAUSE} the time axis"
                )
        for name, place in body.read.items():
            items = inputs[place]
            if not isinstance(items, Items) or not items.over_time:
                raise self.refusal
            self.values[name] = Data(items.axes)
        for place in body.kept:
            if body.graph.inputs[place].name in used and place not in body.read.values():
                self._keep(place)

    def _require_one_for_each(self) -> None:
        """Require one iteration for each time step, or for each but the first one."""
        body, more = self._body, list[Pair]()
        for i in range(len(body.limits)):
            limits = [self._limit(trace, i) for trace in range(2)]
            if limits[0] == limits[1] >= _MAX_LIMIT:
                continue
            steps = [scale.steps - body.start for scale in self._scales.both]
            starts = [each.limits[i][0] for each in self.bodies]
            more.append(Pair(*(limits[trace] - starts[trace] - steps[trace] for trace in range(2))))
        # A limit that is a fixed number ends the loop on long sequences, perhaps only on longer ones than the traces.
        if not more or not all(each.is_same for each in more) or min(more) != (0, 0):
            raise self.refusal
        for place in body.written:
            lists = [op.inputs[place].op for op in self._ops]
            if body.start:
                lists = [self._reserved(op) for op in lists]
            sizes_of = [op.inputs[1] for op in lists if op.type == "TensorListReserve"]
            if len(sizes_of) != 2 or self._constant(self._known.get(sizes_of[0].name)).pairs() != [
                self._scales.size((TIME,))
            ]:
                raise self.refusal

    def _require_no_length(self) -> None:
        """Refuse a body whose constants have the number of time steps: it may do something else on short sequences."""
        few, many = (
            [tf.make_ndarray(op.get_attr("value")) for _, op in ops if op.type == "Const"]
            for ops in self.operations
        )
        first, second = (scale.rows for scale in self._scales.both)
        for one, two in zip(few, many, strict=False):
            is_same = equal(one, two)
            if not is_same and not (
                one.dtype.kind in "iu" and np.all((one == two) | (one * second == two * first))
            ):
                raise Refusal(
                    Reason.LENGTH, f"depends on the number of time steps where it {CLAUSE} the time axis"
                )

    def _limit(self, trace: int, i: int) -> int:
        """Return the number below which a counter is in one of the traces."""
        _, number, place = self.bodies[trace].limits[i]
        if number is not None:
            return int(number)
        return int(self._constant(self._inputs[place]).arrays()[trace])

    def _constant(self, value: Any) -> Const:
        if not isinstance(value, Const):
            raise self.refusal
        return value

    def _reserved(self, op: Any) -> Any:
        """Return the operation that creates a list whose only element is the first one."""
        if op.type != "TensorListSetItem" or number_of(op.inputs[1]) != 0:
            raise self.refusal
        return op.inputs[0].op

    def _first(self, place: int) -> tuple[Any, Any]:
        """Return what a variable is before the first iteration in both graphs: of a list its first element."""
        one, two = (op.inputs[place] for op in self._ops)
        if one.dtype != tf.variant:
            return one, two
        if any(self._reserved(tensor.op).type != "TensorListReserve" for tensor in (one, two)):
            raise self.refusal
        return one.op.inputs[2], two.op.inputs[2]

    def _begun(self, place: int) -> Axes:
        """Return the axes of a variable before the first iteration, where a session must know it."""
        one, two = self._first(place)
        found = sizes(one, two)
        if (
            not found
            or found[0] != self._scales.size((BATCH,))
            or not all(size.is_same for size in found[1:])
        ):
            raise Refusal(
                Reason.UNPROVEN, f"carries other values than one of each row where it {CLAUSE} the time axis"
            )
        axes = ((BATCH,), *(normal((size.first,)) for size in found[1:]))
        value = self._known.get(one.name)
        if isinstance(value, Const):
            return self._even(value, axes)
        if value is None or value.ends or value.axes != axes:
            raise Refusal(Reason.STATE, f"{CLAUSE} the time axis from a state on that the inputs determine")
        return axes

    def _keep(self, place: int) -> None:
        """Let iterations use a value from outside the loop, which does not change over time."""
        value, params = self._inputs[place], [body.graph.inputs[place] for body in self.bodies]
        if isinstance(value, Data):
            if value.ends or value.has_time or isinstance(value, Items):
                raise self.refusal
            self.values[params[0].name] = value
            return
        if value.first.dtype == tf.resource and not value.is_same:
            raise self.refusal
        if value.first.dtype != tf.resource:
            self._even(value, tuple(map(self._scales.factors, value.shape())))
        for trace, tensor in enumerate((value.first, value.second)):
            self.given[trace][params[trace].name] = value.evaluators[trace].value(tensor)

    def results(self, values: Mapping[str, Data | Const]) -> list[Data | Const]:
        """Return the variables after the loop; ``values`` are those of its body.

        Raises:
            Refusal: an iteration returns something else than one value of each row.
        """
        body, found = self._body, list(self._inputs)
        for place, tensor in (*body.written.items(), *body.carried.items()):
            value = values[tensor.name]
            axes = self._axes.get(place) or (
                value.axes if isinstance(value, Data) else tuple(map(self._scales.factors, value.shape()))
            )
            if isinstance(value, Const):
                self._even(value, axes)
            elif value.ends or value.axes != axes or isinstance(value, Items):
                raise self.refusal
            if list(labels(axes)) != [BATCH]:
                raise self.refusal
            self._axes[place] = axes
            is_list = self._ops[0].inputs[place].dtype == tf.variant
            is_over = place in body.written
            found[place] = (
                Items(axes, ends=not is_over, over_time=is_over) if is_list else Data(axes, ends=True)
            )
            if is_over and body.start:
                self._require_like(self._first(place)[0], axes)
        for place in body.counters:
            one, two = (op.outputs[place] for op in self._ops)
            found[place] = Const(one, two, self._constant(self._inputs[place]).evaluators)
        return found

    def _require_like(self, first: Any, axes: Axes) -> None:
        """Require that the first element of a list is known at the first time step."""
        value = self._known.get(first.name)
        if not isinstance(value, Data) or value.ends or value.axes != axes:
            raise self.refusal

    @property
    def needs(self) -> tuple[Need, ...]:
        """What a session keeps: what iterations carry, and whether the first time step passed if that is needed."""
        carried = [Need(Memory.CARRY, 1, place) for place in self._body.carried]
        written = self._body.written if self._body.start else ()
        begun = [
            place
            for place in (*self._body.carried, *written)
            if isinstance(self._known[self._first(place)[0].name], Data)
        ]
        return (*carried, *(Need(Memory.COUNT, 1, place) for place in begun[:1]))

    def scan(self, values: Mapping[str, Data | Const]) -> Scan:
        """Return what is needed to run one iteration; ``values`` are those of its body."""
        body, op = self._body, self._ops[0]
        places = [*body.carried, *(body.written if body.start else ())]
        lists = [
            op.inputs[place].op
            for place in (*body.carried, *body.written)
            if op.inputs[place].dtype == tf.variant
        ]
        unmade = {
            name
            for made in lists
            for name in (made.name, made.inputs[0].op.name)
            if "TensorList" in made.type
        }
        return Scan(
            body, values, self._axes, {place: self._first(place)[0] for place in places}, frozenset(unmade)
        )
