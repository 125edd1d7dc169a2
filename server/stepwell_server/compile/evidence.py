"""Long, hard sequences, and what Keras's own call over them gives: the samples that a program is held against.

They add refusals, and admit nothing. Rows differ in what they try (see `samples.Sampler.hard`). Every
second row is drawn anew with one time step disturbed, so that what looks ahead, or mixes rows, shows in
Keras's call alone; what looks back where no state is carried shows beside the program.

The allowed difference is relative to what noise of one rounding on the inputs does to Keras's own call
(the largest until that time step): a chaotic or unbounded cell is not refused for its rounding, and where
rounding has grown to the size of the values nothing is compared. Non-finite values end a row's comparison.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.causality.cut import all_operations, time_distributed
from stepwell_server.compile.comparison import Comparison, Difference
from stepwell_server.compile.errors import ModelError, NotCausalError
from stepwell_server.compile.graph import concrete
from stepwell_server.compile.interface import Interface
from stepwell_server.compile.patch import attribute, relaxed
from stepwell_server.compile.plan import Plan
from stepwell_server.compile.samples import Sampler
from stepwell_server.compile.sequences import Stepped, rounding
from stepwell_server.compile.tensorflow_setup import tf
from stepwell_server.compile.untraceable import failed
from stepwell_server.compile.watch import plain, recurrent_layers

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]
Whole = Callable[[Sequence[Array]], dict[str, Array]]
"""Keras's call of a model on whole sequences: outputs by name."""
#: How long the sequences are where nothing says that a layer reaches further.
STEPS = 512
#: Times the effect of noise of one rounding on each input. Stepping rounds at other places than one call
#: over the sequence does, some tens of times in each time step.
NOISES = 64
#: Above this share of the values the effect of rounding is as large as they are: nothing to compare.
_LOST = 0.1


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One call of the whole model on long sequences."""

    steps: int
    inputs: tuple[Array, ...]
    outputs: Mapping[str, Array]
    noise: Mapping[str, Floats]
    """What rounding on the inputs does to each output, ``(rows, time)`` or ``(rows, 1)``."""


def gather(plan: Plan, sampler: Sampler, steps: int, whole: Whole) -> list[Evidence]:
    """Call the model on hard sequences of ``steps`` time steps, and look at what disturbances do.

    Raises:
        NotCausalError: an output moves before the time step that was disturbed.
        ModelError: two calls differ, a row moves when another one is disturbed, or Keras's call fails.
    """
    rng, base = np.random.default_rng(17), rounding(plan.interface.model)
    held, kept = sampler.whole, sampler.exact
    temporal = plan.temporal
    inputs = sampler.hard(rng, temporal, steps)
    disturbed, times = sampler.disturbed(rng, temporal, inputs)
    with _explained(plan.interface.model, steps):
        usual, again = whole(inputs), whole(inputs)
        noisy = whole(_noisy(rng, inputs, base, held, kept))
        moved = whole(disturbed)
        moved_noisy = whole(_noisy(rng, disturbed, base, held, kept))
    for spec in plan.outputs:
        name, timed = spec.name, spec.temporal
        if not _same(usual[name], again[name]):
            raise ModelError(f"two calls of the model differ: output {name!r} is another for the same inputs")
        _refuse_moves(name, timed, usual[name], moved[name], times)
    return [
        Evidence(steps, tuple(inputs), usual, _noise(plan, usual, noisy)),
        Evidence(steps, tuple(disturbed), moved, _noise(plan, moved, moved_noisy)),
    ]


def compare(plan: Stepped, evidence: Evidence, stepped: Mapping[str, Array], tolerance: float) -> Comparison:
    """Return how what a program gives, stepped through the same inputs and shaped alike, differs from Keras."""
    rows = len(evidence.inputs[0])
    found = [
        _difference(spec.name, spec.temporal, evidence, stepped[spec.name], tolerance)
        for spec in plan.outputs
    ]
    return Comparison(rows, evidence.steps, tuple(found))


def _difference(name: str, timed: bool, evidence: Evidence, stepped: Array, tolerance: float) -> Difference:
    one, two = _rows(evidence.outputs[name], timed), _rows(stepped, timed)
    if one.shape != two.shape:
        return Difference(name, math.inf, math.inf, 0.0, 0, 0, (math.inf,))
    if not one.size:
        return Difference(name, 0.0, 0.0, tolerance, 0, 0, (0.0,))
    allowed, ended = _allowed(one, evidence.noise[name], tolerance)
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    with np.errstate(invalid="ignore"):
        apart = np.max(np.where(same, 0.0, np.nan_to_num(np.abs(one - two), nan=np.inf)), axis=2)
    share = np.where(ended, 0.0, apart / allowed)
    row, time = (int(i) for i in np.unravel_index(int(np.argmax(share)), share.shape))
    return Difference(
        output=name,
        share=float(share[row, time]),
        absolute=float(apart[row, time]) if not ended[row, time] else 0.0,
        allowed=float(allowed[row, time]),
        row=row,
        time=time if timed else evidence.steps - 1,
        by_step=tuple(float(x) for x in np.max(np.where(ended, 0.0, apart), axis=0)),
        skipped=float(np.mean(ended)),
    )


def compared_share(plan: Stepped, samples: Sequence[Evidence], tolerance: float) -> float:
    """Return which share of the rows and time steps says something, of the output where it is least."""
    shares = [1.0]
    for spec in plan.outputs:
        ended = [
            _allowed(_rows(sample.outputs[spec.name], spec.temporal), sample.noise[spec.name], tolerance)[1]
            for sample in samples
        ]
        shares.append(float(1 - np.mean(np.concatenate([value.reshape(-1) for value in ended]))))
    return min(shares)


def observe(
    plan: Stepped,
    interface: Interface,
    inputs: Sequence[Array],
    steps: int,
    held: frozenset[int],
    kept: Sequence[float],
) -> Evidence:
    """Call the model on given sequences, and once more with noise of one rounding on them.

    But for ``held`` inputs, and for values that are exactly one of ``kept``.

    Raises:
        ModelError: Keras's call fails.
    """
    whole, base = whole_call(interface), rounding(interface.model)
    with _explained(interface.model, steps):
        usual = whole(inputs)
        noisy = whole(_noisy(np.random.default_rng(19), inputs, base, held, kept))
    return Evidence(steps, tuple(inputs), usual, _noise(plan, usual, noisy))


@contextlib.contextmanager
def _explained(model: Any, steps: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Keras and user code raise whatever they like.
        raise failed(model, f"the model does not run on a sequence of {steps} time steps", error) from error


def reach(model: object, own_steps: Sequence[int | None]) -> int:
    """Return how many time steps to try: more than any layer reaches as far as that can be read from it."""
    total = max((steps or 0 for steps in own_steps), default=0)
    for layer in all_operations(model):
        sizes = [
            getattr(layer, name, None)
            for name in ("kernel_size", "pool_size", "padding", "cropping", "size", "n")
        ]
        spread = max(
            (_largest(getattr(layer, name, None)) for name in ("dilation_rate", "strides")), default=1
        )
        total += max(map(_largest, sizes)) * max(spread, 1)
    return max(STEPS, min(2 * total, 16 * STEPS))


def _largest(value: object) -> int:
    if isinstance(value, (tuple, list)):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int) else 0


def whole_call(interface: Interface) -> Whole:
    """Return Keras's call of the model as a compiled function: eager, a loop over time takes seconds.

    It reads the model's variables each time.
    """
    model = interface.model

    def call(*tensors: object) -> dict[str, object]:
        with relaxed(model), contextlib.ExitStack() as stack:
            for layer in recurrent_layers(model).values():
                stack.enter_context(attribute(layer, "unroll", False))
            for operation in all_operations(model):
                merged = time_distributed(operation)
                if merged is not None:  # Keras would make a copy of the layer for each time step.
                    stack.enter_context(attribute(operation, "call", merged))
            return interface.call(tensors)

    functions: dict[tuple[Any, ...], Any] = {}

    def whole(inputs: Sequence[Array]) -> dict[str, Array]:
        casts = zip(inputs, interface.inputs, strict=True)
        tensors = [tf.cast(value, info.dtype) for value, info in casts]
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in functions:
            functions[shapes] = concrete(call, *(tf.TensorSpec(x.shape, x.dtype) for x in tensors))
        results = functions[shapes](*tensors)
        return {name: plain(value) for name, value in results.items()}

    return whole


def _noisy(
    rng: np.random.Generator,
    inputs: Sequence[Array],
    base: float,
    held: frozenset[int],
    kept: Sequence[float],
) -> list[Array]:
    """Return inputs with a change of one rounding in each number.

    Not in indices, nor where a whole input holds integers as floats: a rounding would make others of them. Nor in
    ``kept`` values, which the model compares with: a rounding would turn a masked time step into one that counts.
    """
    noisy: list[Array] = []
    for i, value in enumerate(inputs):
        if i in held or not np.issubdtype(value.dtype, np.floating) or np.array_equal(value, np.rint(value)):
            noisy.append(value)
            continue
        signs = rng.choice([-1.0, 1.0], value.shape)
        moved = np.asarray(value.astype(np.float64) * (1 + signs * base), value.dtype)
        exact = np.isin(value, np.asarray(kept, value.dtype))
        noisy.append(np.where(exact, value, moved))
    return noisy


def _rows(value: Array, timed: bool) -> Floats:
    """Return an output as ``(rows, time, all the rest)``; without a time axis, of one time step."""
    shape = value.shape[: 2 if timed else 1]
    return value.reshape(*shape, *(() if timed else (1,)), -1).astype(np.float64)


def _noise(plan: Stepped, usual: Mapping[str, Array], noisy: Mapping[str, Array]) -> dict[str, Floats]:
    found = {}
    for spec in plan.outputs:
        one, two = _rows(usual[spec.name], spec.temporal), _rows(noisy[spec.name], spec.temporal)
        moved = np.max(np.abs(np.nan_to_num(one - two, nan=np.inf)), axis=2, initial=0)
        found[spec.name] = np.maximum.accumulate(moved, axis=1)
    return found


def _allowed(usual: Floats, noise: Floats, tolerance: float) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the allowed difference by row and time, and from where on a row says nothing."""
    size = np.max(np.abs(np.nan_to_num(usual, nan=0, posinf=0, neginf=0)), axis=2, initial=0)
    size = np.maximum(np.maximum.accumulate(size, axis=1), 0.1)
    effect = NOISES * noise
    ended = ~np.all(np.isfinite(usual), axis=2) | ~np.isfinite(noise) | (effect > _LOST * size)
    return tolerance * size + effect, np.logical_or.accumulate(ended, axis=1)


def _same(one: Array, two: Array) -> bool:
    return bool(np.array_equal(one, two, equal_nan=np.issubdtype(one.dtype, np.inexact)))


def _refuse_moves(name: str, timed: bool, usual: Array, moved: Array, times: Mapping[int, int]) -> None:
    """Refuse what moves before the disturbance, and rows that were not disturbed."""
    one, two = _rows(usual, timed), _rows(moved, timed)
    tolerance = 1e-5 * np.maximum(np.max(np.abs(np.nan_to_num(one)), axis=(1, 2), initial=0), 1e-3)
    for row in range(len(one)):
        until = times.get(row)
        if until is not None and not timed:
            continue
        before = slice(0, until)
        apart = np.max(np.abs(np.nan_to_num(one[row, before] - two[row, before])), initial=0)
        if apart <= tolerance[row]:
            continue
        if until is None:
            raise ModelError(
                f"the rows of a batch are not independent of each other: output {name!r} of one row moves by {apart:.2g} "
                "when another row is disturbed"
            )
        raise NotCausalError(
            f"model is not causal: output {name!r} moves by {apart:.2g} before the time step that was disturbed "
            f"({until})"
        )
