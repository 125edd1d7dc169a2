"""One operation while it is created again for one time step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from stepwell_server.compile.causality.axes import BATCH, Axes, elements, time_of
from stepwell_server.compile.causality.call import Memory, Need
from stepwell_server.compile.causality.constants import BROADCAST
from stepwell_server.compile.causality.values import Array, Const, Data
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.streaming.replay import Constants, is_fixed, plain_sizes, reduced, step_shape

Carry = Callable[[Any], Any]


class States:
    """The states of operations that look back: read before the step, and written for the next one."""

    def __init__(
        self,
        before: Mapping[tuple[str, Need], Any],
        gaps: Mapping[tuple[str, Need], int] | None = None,
        rings: Collection[tuple[str, Need]] = (),
    ) -> None:
        """``gaps``: of a window, every so many rows are read. ``before`` has only those of the windows in ``rings``."""
        self._before, self._gaps, self._rings = before, gaps or {}, rings
        self.after: dict[tuple[str, Need], Any] = {}
        self.firsts: dict[str, Any] = {}
        """The first elements that operations keep, by name, at the current time step."""

    def before(self, owner: str, need: Need, dtype: Any) -> Any:
        """Return a state, ``(rows, ...)``."""
        value = self._before[owner, need]
        return value if value.dtype == dtype else tf.cast(value, dtype)

    def gap(self, owner: str, need: Need) -> int:
        """Return which rows of a window are read: every so many."""
        return self._gaps[owner, need]

    def window(self, owner: str, need: Need, row: Any, early: Any = None) -> Any:
        """Return the rows that are read of those kept of an input, ``(rows, ..., sizes...)``, and the current one.

        ``early`` is the value of rows from before the first time step, if each row of the batch has its own.
        """
        rows = self._window(owner, need, row)
        if early is None:
            return rows
        since, gap = Need(Memory.SINCE, need.rows, need.input), self.gap(owner, need)
        count = self.before(owner, since, tf.int32)
        self.after[owner, since] = tf.minimum(count + 1, need.rows)
        is_early = tf.expand_dims(count, 1) < tf.range(need.rows, -1, -gap)
        mask = tf.reshape(is_early, [-1, int(rows.shape[1]), *[1] * (len(row.shape) - 1)])
        return tf.where(mask, tf.reshape(early, [-1, 1, *row.shape[1:]]), rows)

    def _window(self, owner: str, need: Need, row: Any) -> Any:
        before, now = self.before(owner, need, row.dtype), tf.expand_dims(row, 1)
        if (owner, need) in self._rings:
            self.after[owner, need] = row
            return tf.concat([before, now], 1)
        gap = self._gaps[owner, need]
        kept = [_part(before, 1, need.rows - 1)] if need.rows > 1 else []
        self.after[owner, need] = tf.concat([*kept, now], 1)
        if gap == 1:
            return tf.concat([before, now], 1)
        sizes = [size for _ in range(need.rows // gap) for size in (1, gap - 1)]
        return tf.concat([*tf.split(before, sizes, 1)[::2], now], 1)

    def elements(self, owner: str, need: Need, value: Any, axes: Axes) -> Any:
        """Return the elements that are kept of an input, then those of this time step, ``(rows, elements, sizes...)``."""
        place = time_place(axes)
        sizes = plain_sizes(axes[:place]), plain_sizes(axes[place + 1 :])
        now = tf.reshape(value, [-1, *sizes[0], need.per, *sizes[1]])
        at, rank = 1 + len(sizes[0]), len(now.shape)
        now = now if at == 1 else tf.transpose(now, [0, at, *range(1, at), *range(at + 1, rank)])
        found = tf.concat([self.before(owner, need, now.dtype), now], 1)
        self.after[owner, need] = _part(found, need.per, need.rows)
        return found

    def delayed(
        self, owner: str, needs: tuple[Need, ...], i: int, value: Any, axes: Axes, early: Any = None
    ) -> Any:
        """Return what an input was some time steps ago, if its owner needs that; ``early`` as in `window`."""
        for need in needs:
            if need.kind is Memory.DELAY and need.input == i and need.per > 1:
                kept = self.elements(owner, need, value, axes)
                value = in_place(_part(kept, 0, need.per), axes, time_place(axes))
            elif need.kind is Memory.DELAY and need.input == i:
                row = tf.reshape(value, [-1, *plain_sizes(axes)])
                oldest = _part(self.window(owner, need, row, early), 0, 1)
                value = tf.reshape(oldest, step_shape(axes))
        return value

    def begun(self, owner: str, needs: tuple[Need, ...], before: Any, first: Any) -> Any:
        """Return a state before the step: at the first one, ``first``, which the inputs determine."""
        need = next(need for need in needs if need.kind is Memory.COUNT)
        count = self.before(owner, need, tf.int32)
        self.after[owner, need] = tf.ones_like(count)
        return tf.where(tf.reshape(count < 1, [-1, *[1] * (len(before.shape) - 1)]), first, before)


class StatesBefore(States):
    """The states before the first time step, where each row of the batch has one value: windows are full of it."""

    def __init__(self, states: States) -> None:
        super().__init__({})
        self._states = states

    def delayed(
        self, _owner: str, _needs: tuple[Need, ...], _i: int, value: Any, _axes: Axes, _early: Any = None
    ) -> Any:
        """Return the value: it was the same."""
        return value

    def window(self, owner: str, need: Need, row: Any, _early: Any = None) -> Any:
        """Return a window of that value."""
        return tf.stack([row] * (need.rows // self._states.gap(owner, need) + 1), 1)

    def before(self, _owner: str, _need: Need, _dtype: Any) -> Any:
        """Refuse others.

        Raises:
            ValueError: always.
        """
        raise ValueError("other states than windows have no value before the first time step")


class Operation:
    """One operation of the graph of many time steps, and its inputs at one time step."""

    def __init__(
        self,
        op: Any,
        values: Mapping[str, Data | Const],
        made: Mapping[str, Any],
        constants: Constants,
        states: States,
        needs: tuple[Need, ...],
        numbers: Mapping[int, Any] | None = None,
        early: Mapping[int, Any] | None = None,
    ) -> None:
        """``early`` has the values of inputs before the first time step, where each row of the batch has its own."""
        self.op, self.needs, self._values, self._constants, self._states = (
            op,
            needs,
            values,
            constants,
            states,
        )
        self._numbers, self._early = numbers or {}, early or {}
        self._data: dict[int, Any] = {}
        for i, tensor in enumerate(op.inputs):
            value = values.get(tensor.name)
            if isinstance(value, Data):
                self._data[i] = states.delayed(
                    op.name, needs, i, made[tensor.name], value.axes, self._early.get(i)
                )

    @property
    def kind(self) -> str:
        """Type of the operation."""
        return str(self.op.type)

    def axes(self, i: int = 0) -> Axes:
        """Return the axes of an input that is data."""
        value = self._values[self.op.inputs[i].name]
        assert isinstance(value, Data)
        return value.axes

    def out(self, i: int = 0) -> Axes:
        """Return the axes of a result."""
        value = self._values[self.op.outputs[i].name]
        assert isinstance(value, Data)
        return value.axes

    def is_data(self, i: int) -> bool:
        """Whether an input is data."""
        return i in self._data

    def data(self, i: int = 0) -> Any:
        """Return an input that is data."""
        return self._data[i]

    def array(self, i: int) -> Array:
        """Return the value of a constant input."""
        value = self._values[self.op.inputs[i].name]
        assert isinstance(value, Const)
        return value.array

    def constant(self, i: int) -> Any:
        """Return an input that is a constant; of one that has rows and time steps, one of each.

        Raises:
            ValueError: those share a dimension with others, or the operation needs all of them.
        """
        if i in self._numbers:
            return self._numbers[i]
        tensor = self.op.inputs[i]
        value = self._values[tensor.name]
        assert isinstance(value, Const)
        if is_fixed(value):
            return self._constants.make(tensor)
        if self.kind not in BROADCAST:
            raise ValueError("a constant has rows or time steps")
        out = self.out()
        return tf.constant(reduced(value, out[len(out) - len(value.shape()) :]), tensor.dtype)

    def filled(self, i: int, axes: Axes) -> Any:
        """Return an input with all its rows; ``axes`` are its dimensions."""
        if self.is_data(i):
            return self.data(i)
        if i in self._numbers:
            return self._numbers[i]
        tensor = self.op.inputs[i]
        value = self._values[tensor.name]
        assert isinstance(value, Const)
        if is_fixed(value):
            return self._constants.make(tensor)
        return spread(reduced(value, axes), tensor.dtype, axes, next(iter(self._data.values())))

    def spread_like(self, i: int, axes: Axes, like: Any) -> Any:
        """Return a constant input with as many rows as ``like`` has; ``axes`` are its dimensions."""
        value = self._values[self.op.inputs[i].name]
        assert isinstance(value, Const)
        return spread(reduced(value, axes), self.op.inputs[i].dtype, axes, like)

    def one_of(self, i: int, axes: Axes) -> Any:
        """Return a constant input with one of its rows and time steps; ``axes`` are its dimensions."""
        value = self._values[self.op.inputs[i].name]
        assert isinstance(value, Const)
        return tf.constant(reduced(value, axes), self.op.inputs[i].dtype)

    def inputs(self) -> list[Any]:
        """Return all inputs."""
        return [self.data(i) if self.is_data(i) else self.constant(i) for i in range(len(self.op.inputs))]

    def need(self, kind: Memory) -> Need | None:
        """Return what it needs of a kind."""
        return next((need for need in self.needs if need.kind is kind), None)

    def row(self, i: int = 0) -> Any:
        """Return an input as ``(rows, sizes of the plain dimensions...)``."""
        return tf.reshape(self.data(i), [-1, *plain_sizes(self.axes(i))])

    def first(self) -> Any:
        """Return an input, or the first one that came if it needs that."""
        first, count = self.need(Memory.FIRST), self.need(Memory.COUNT)
        if first is None or count is None:
            return self.data()
        row = self.row()
        before, _ = self.carry(count, tf.int32, tf.ones_like)
        is_first = tf.reshape(before < 1, [-1, *[1] * (len(row.shape) - 1)])
        _, kept = self.carry(first, row.dtype, lambda kept: tf.where(is_first, row, kept))
        self._states.firsts[self.op.name] = found = tf.reshape(kept, step_shape(self.axes()))
        return found

    def behind(self, padding: Any, i: int = 0) -> Any:
        """Return an input; while time steps before its first one stand for padding, return that, of one row."""
        need = self.need(Memory.COUNT)
        if need is None:
            return self.data(i)
        axes, each, most = self.axes(i), need.per, tf.constant(need.rows, tf.int32)
        place = time_place(axes) if each > 1 else 0
        sizes = plain_sizes(axes[:place]), plain_sizes(axes[place + (each > 1) :])
        before, _ = self.carry(need, tf.int32, lambda count: tf.minimum(count + each, most))
        numbers = tf.expand_dims(before, 1) + tf.range(each)  # Of the elements of this time step.
        is_padding = tf.reshape(numbers < most, [-1, *[1] * len(sizes[0]), each, *[1] * len(sizes[1])])
        if padding.shape.rank:
            padding = tf.reshape(padding, [-1, *sizes[0], 1, *sizes[1]])
        now = tf.reshape(self.data(i), [-1, *sizes[0], each, *sizes[1]])
        return tf.reshape(tf.where(is_padding, padding, now), step_shape(axes))

    def is_earlier(self, need: Need) -> Any:
        """Return which rows of a window are in front of the first element of its input, or None: none ever are."""
        count = self.need(Memory.COUNT)
        if count is None:
            return None
        time = elements(self.axes(need.input)[time_place(self.axes(need.input))])
        assert time is not None
        most = tf.constant(count.rows, tf.int32)
        before, _ = self.carry(count, tf.int32, lambda count: tf.minimum(count + need.per, most))
        places = tf.range(need.rows + need.per) - need.rows - time.start
        return tf.expand_dims(before, 1) + places < 0

    def window(self, need: Need, value: Any, early: Any = None) -> Any:
        """Return the rows that it reads of those kept of an input, and the current one: ``(rows, ..., sizes...)``.

        ``early`` is the value before the first time step, if the operation itself determines that.

        Where a time step brings several elements, they are all elements that it keeps, and those of this time step.
        """
        if need.per > 1:
            return self._states.elements(self.op.name, need, value, self.axes(need.input))
        row = tf.reshape(value, [-1, *plain_sizes(self.axes(need.input))])
        early = self._early.get(need.input) if early is None else early
        return self._states.window(self.op.name, need, row, early)

    def carry(self, need: Need, dtype: Any, after: Carry) -> tuple[Any, Any]:
        """Return a state before and after the step, which ``after`` computes."""
        before = self._states.before(self.op.name, need, dtype)
        self._states.after[self.op.name, need] = found = after(before)
        return before, found

    def shaped(self, value: Any) -> Any:
        """Return ``(rows, sizes...)`` in the shape of the result."""
        return tf.reshape(value, step_shape(self.out()))


def time_place(axes: Axes) -> int:
    """Return the dimension with the time axis."""
    return next((i for i, dim in enumerate(axes) if time_of([dim]) is not None), 0)


def time_start(axes: Axes) -> int:
    """Return where a time axis begins."""
    time = time_of(axes)
    assert time is not None
    return time.start


def in_place(rows: Any, axes: Axes, place: int) -> Any:
    """Return the rows of a window, ``(rows, kept + 1, sizes...)``, with the axes of the input that they are from."""
    before = len(plain_sizes(axes[:place]))
    order = [0, *range(2, 2 + before), 1, *range(2 + before, len(rows.shape))]
    if not any(BATCH in dim for dim in axes[:place]):  # Time comes before the rows: see `Proof.needs`.
        order[:2] = [1, 0]
    shape = step_shape(axes)
    shape[place] = int(rows.shape[1])
    is_same = order == list(range(len(order)))
    return tf.reshape(rows if is_same else tf.transpose(rows, order), shape)


def _part(rows: Any, first: int, count: int) -> Any:
    """Return some rows of a window.

    LiteRT splits many times faster than it takes a StridedSlice. A Slice of an open number of rows has no place in memory
    before it runs: see `engine.executors.litert`.
    """
    sizes = [first, count, int(rows.shape[1]) - first - count]
    parts = tf.split(rows, [size for size in sizes if size], 1)
    return parts[1 if first else 0]


def spread(value: Array, dtype: Any, axes: Axes, like: Any) -> Any:
    """Return a constant with the rows of ``like``, whose first dimension is the rows.

    Raises:
        ValueError: the rows share a dimension with others.
    """
    constant = tf.constant(value, dtype)
    times: list[Any] = [1] * len(axes)
    for axis, dim in enumerate(axes):
        time = time_of([dim])
        if BATCH in dim:
            times[axis] = tf.shape(like)[0]
        elif time is not None:
            times[axis] = time.per
    return tf.tile(constant, tf.stack(times))
