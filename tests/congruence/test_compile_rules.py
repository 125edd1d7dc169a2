"""Every operation on the proof's list, run for real: the result on a slice is the slice of the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.compile.causality.axes import (
    BATCH,
    TIME,
    Axes,
    Factor,
    LostAxisError,
    Pair,
    Scale,
    Scales,
    labels,
    normal,
)

Array = npt.NDArray[np.float64]
SCALES = Scales(Scale(5, 11), Scale(7, 13))
#: Rows and time steps of the slice, in another order.
ROWS, STEPS = [4, 1, 2], [10, 0, 3, 7, 5]


def _examples() -> dict[str, list[Any]]:
    from support.proof import rule_examples

    return rule_examples.EXAMPLES


def _cuts(example: Callable[[Any], Any]) -> Any:
    """The example's graph at two sizes."""
    import tensorflow as tf

    from stepwell_server.compile.causality.cut import Cut, Cuts

    sides = []
    for scale in (SCALES.first, SCALES.second):
        shape = (scale.rows, scale.steps, 4)
        function = tf.function(example, autograph=False).get_concrete_function(
            tf.TensorSpec(shape, tf.float32)
        )
        outputs = {str(i): tensor for i, tensor in enumerate(function.outputs)}
        sides.append(Cut(scale, function, tuple(function.inputs[:1]), outputs, (), (), (), {}))
    return Cuts((True,), SCALES, *sides)


def _sliced(value: Array, axes: Axes) -> Array:
    """Return the slice of a result, by the reported places of its axes."""
    factors: list[Factor] = [factor for dim in axes for factor in dim]
    value = value.reshape([SCALES.first.of(factor) for factor in factors])
    for i, factor in enumerate(factors):
        if factor == BATCH:
            value = value.take(ROWS, i)
        elif factor == TIME:
            value = value.take(STEPS, i)
    small = Scale(len(ROWS), len(STEPS))
    return value.reshape([math.prod(small.of(factor) for factor in dim) for dim in axes])


def test_every_operation_on_the_list_has_an_example() -> None:
    from stepwell_server.compile.causality.proof import LOOPS
    from stepwell_server.compile.causality.rules import RULES

    assert sorted(_examples()) == sorted([*RULES, *LOOPS])
    assert all(_examples().values())


@pytest.mark.slow
def test_what_a_rule_says_of_the_axes_is_true() -> None:
    from stepwell_server.compile.causality.proof import follow
    from stepwell_server.compile.causality.values import Data

    x = np.random.default_rng(3).uniform(0.1, 0.9, (5, 11, 4)).astype(np.float32)
    for kind, examples in _examples().items():
        for i, example in enumerate(examples):
            where = f"{kind}, example {i}"
            cuts = _cuts(example)
            assert any(op.type == kind for op in cuts.first.graph.get_operations()), where
            known, needs = follow(cuts)
            assert not needs, where
            whole, part = _results(example(x)), _results(example(x[ROWS][:, STEPS]))
            for tensor, one, two in zip(cuts.first.outputs.values(), whole, part, strict=True):
                value = known[tensor.name]
                assert isinstance(value, Data), where
                assert not value.ends, where
                assert set(labels(value.axes)) == {BATCH, TIME}, where
                np.testing.assert_allclose(_sliced(one, value.axes), two, rtol=1e-4, atol=1e-5, err_msg=where)


@pytest.mark.slow
def test_what_an_operation_does_along_the_batch_or_the_time_axis_is_refused_or_noted() -> None:
    from stepwell_server.compile.causality.proof import NotAdmitted, follow
    from stepwell_server.compile.causality.values import Data
    from support.proof import rule_examples

    for kind, examples in rule_examples.REFUSED.items():
        for i, example in enumerate(examples):
            try:
                cuts = _cuts(example)
                known, needs = follow(cuts)
            except NotAdmitted:
                continue
            results = (known[tensor.name] for tensor in cuts.first.outputs.values())
            if needs or all(TIME not in labels(value.axes) for value in results if isinstance(value, Data)):
                continue  # It keeps something, or its elements are not those of the time steps any more.
            pytest.fail(f"{kind}, example {i} passes: {list(known.values())[-1]}")


def _results(found: Any) -> list[Array]:
    import tensorflow as tf

    return [np.asarray(value, np.float64) for value in tf.nest.flatten(found)]


# --- axes ------------------------------------------------------------------------------------------------

_PRIMES: dict[int, tuple[int, ...]] = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 6: (2, 3), 12: (2, 3, 2)}
_PLAIN = st.sampled_from(list(_PRIMES))


@st.composite
def _reshapes(draw: st.DrawFn) -> tuple[Axes, list[Pair]]:
    """Axes of a tensor, and the sizes of another tensor of as many elements."""
    factors: list[Factor] = [*draw(st.permutations([BATCH, TIME])), *draw(st.lists(_PLAIN, max_size=3))]
    factors = list(draw(st.permutations(factors)))
    cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=3)))
    dims = [factors[a:b] for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]
    axes = tuple(normal(dim) for dim in dims)
    primes: list[tuple[int, int]] = []
    for factor in factors:
        if isinstance(factor, int):
            primes += [(prime, prime) for prime in _PRIMES[factor]]
        else:
            primes.append((SCALES.first.of(factor), SCALES.second.of(factor)))
    order = draw(st.permutations(primes)) if draw(st.booleans()) else primes
    ends = sorted(draw(st.lists(st.integers(0, len(order)), max_size=3)))
    parts = [order[a:b] for a, b in zip([0, *ends], [*ends, len(order)], strict=True)]
    return axes, [Pair(math.prod(a for a, _ in part), math.prod(b for _, b in part)) for part in parts]


@pytest.mark.slow
@settings(max_examples=600)
@given(_reshapes())
def test_a_reshape_is_what_numpy_does_to_each_element(case: tuple[Axes, list[Pair]]) -> None:
    """Label every element by its row and time step, and look where the labels are after the reshape."""
    axes, sizes = case
    try:
        found = SCALES.reshape(axes, sizes)
    except LostAxisError:
        return
    for scale, side in ((SCALES.first, 0), (SCALES.second, 1)):
        for axis in (BATCH, TIME):
            before = _labelled(axes, scale, axis)
            np.testing.assert_array_equal(
                before.reshape([size[side] for size in sizes]), _labelled(found, scale, axis)
            )


def _labelled(axes: Axes, scale: Scale, axis: Factor) -> npt.NDArray[np.int64]:
    """Return a tensor of such axes in which every element is its place on ``axis``."""
    factors: list[Factor] = [factor for dim in axes for factor in dim]
    shape = [scale.of(factor) for factor in factors]
    value: npt.NDArray[np.int64] = np.zeros(shape, np.int64)
    for i, factor in enumerate(factors):
        if factor is axis:
            value = value + np.arange(scale.of(factor)).reshape(
                [-1 if j == i else 1 for j in range(len(shape))]
            )
    return value.reshape([math.prod(scale.of(factor) for factor in dim) for dim in axes])


def test_reshapes_that_keep_the_axes_apart_are_followed() -> None:
    x: Axes = ((BATCH,), (TIME,), (12,))
    b, t = Pair(5, 7), Pair(11, 13)
    whole = Pair(55, 91)

    def n(size: int) -> Pair:
        return Pair(size, size)

    assert SCALES.reshape(x, [whole, n(12)]) == ((BATCH, TIME), (12,))
    assert SCALES.reshape(x, [b, t, n(3), n(4)]) == ((BATCH,), (TIME,), (3,), (4,))
    assert SCALES.reshape(x, [b, Pair(33, 39), n(4)]) == ((BATCH,), (TIME, 3), (4,))
    assert SCALES.reshape(((BATCH, TIME, 6),), [b, n(1), t, n(6)]) == ((BATCH,), (), (TIME,), (6,))
    assert SCALES.reshape(((6, BATCH), (TIME,)), [n(2), Pair(15, 21), t]) == ((2,), (3, BATCH), (TIME,))
    for wrong in ([t, b, n(12)], [b, n(12), t], [whole, n(3)], [b, n(3), Pair(44, 52)]):
        with pytest.raises(LostAxisError):
            SCALES.reshape(x, wrong)


@given(st.sets(st.sampled_from([BATCH, TIME])), st.integers(1, 50))
def test_a_size_says_which_axes_are_in_it(axes: set[Factor], rest: int) -> None:
    in_order = [axis for axis in (BATCH, TIME) if axis in axes]
    size = SCALES.size([*in_order, rest])
    assert SCALES.factors(size) == normal([*in_order, rest])


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_size_of_something_else_is_lost_or_is_that_product(first: int, second: int) -> None:
    try:
        found = SCALES.factors(Pair(first, second))
    except LostAxisError:
        return
    assert SCALES.size(found) == (first, second)
