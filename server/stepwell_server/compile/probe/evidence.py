"""Long, hard sequences with the results of Keras's own call: the samples that a program is compared with.

Samples can only refuse a model, never admit it. The rows have different difficulties (see `samples.Sampler.hard`).
Every second row is repeated with one disturbed time step. So Keras's call alone reveals layers that look ahead or mix
rows. The comparison with the program reveals layers that look back without carrying a state.

The allowed difference is derived from Keras: its call is repeated with some roundings added to the inputs and to the
result of each layer and cell, at each time step. A program may differ as much as that does up to a time step. So a
chaotic or unbounded cell is not refused because of rounding, and nothing is compared where rounding is as large as the
values. Non-finite values end the comparison of a row.

The added roundings only ever allow more. So Keras is not called with them where a program differs by less than the
tolerance anyway, as nearly all do: those calls took a quarter of a compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.comparison import Comparison, Difference
from stepwell_server.compile.errors import ModelError, NotCausalError, quoted
from stepwell_server.compile.graph.interface import Interface
from stepwell_server.compile.graph.plan import Plan
from stepwell_server.compile.graph.samples import Sampler
from stepwell_server.compile.graph.untraceable import explained
from stepwell_server.compile.graph.watch import all_operations
from stepwell_server.compile.probe.sequences import Steppable
from stepwell_server.compile.probe.whole_call import WholeCall

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float64]
#: Length of the sequences, unless a layer is known to reach further.
STEPS = 512
#: Runs of Keras with added roundings, each with other signs: a single run may miss the effect of a sign.
_PERTURBED_RUNS = 2
#: Above this share of the values, the effect of rounding is too large for a comparison.
_LOST = 0.1
_RUNS_NOT = "the model does not run on a sequence of {} time steps"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One call of the whole model on long sequences."""

    steps: int
    inputs: tuple[Array, ...]
    outputs: Mapping[str, Array]
    measure: Callable[[], Mapping[str, Floats]]
    """Calls Keras for `noise`, with the weights that the model has then."""

    @functools.cached_property
    def noise(self) -> Mapping[str, Floats]:
        """How far added roundings move each output up to a time step, ``(rows, time)`` or ``(rows, 1)``."""
        return self.measure()


def gather(plan: Plan, sampler: Sampler, steps: int, whole: WholeCall) -> list[Evidence]:
    """Call the model on hard sequences of ``steps`` time steps, and check the effect of disturbances.

    Raises:
        NotCausalError: an output changes before the disturbed time step.
        ModelError: two calls differ, a row changes when another row is disturbed, or Keras's call fails.
    """
    rng = np.random.default_rng(17)
    inputs = sampler.hard(rng, plan.temporal, steps)
    disturbed, times = sampler.disturbed(rng, plan.temporal, inputs)
    with explained(plan.interface.model, _RUNS_NOT.format(steps)):
        usual, moved = whole(inputs), whole(disturbed)
        has_moved = any(
            not _same(one, two)
            for spec in plan.outputs
            for one, two in zip(
                *(_kept(x[spec.name], spec.temporal, times) for x in (usual, moved)), strict=True
            )
        )
        again = whole(inputs) if has_moved else usual  # If nothing has moved, two calls do not differ either.
    for spec in plan.outputs:
        if not _same(usual[spec.name], again[spec.name]):
            raise ModelError(
                f"two calls of the model differ: output {quoted(spec.name)} differs for the same inputs"
            )
        _refuse_moves(spec.name, spec.temporal, usual[spec.name], moved[spec.name], times)

    @functools.cache
    def measured() -> dict[str, Floats]:
        return _noise(  # One call for both: each takes a loop over all time steps, whatever its rows.
            plan,
            whole,
            [np.concatenate(pair) for pair in zip(inputs, disturbed, strict=True)],
            {name: np.concatenate([usual[name], moved[name]]) for name in usual},
            sampler.whole,
            sampler.exact,
        )

    def part(rows: slice) -> Callable[[], dict[str, Floats]]:
        return lambda: {name: found[rows] for name, found in measured().items()}

    return [
        Evidence(steps, tuple(inputs), usual, part(slice(len(inputs[0])))),
        Evidence(steps, tuple(disturbed), moved, part(slice(len(inputs[0]), None))),
    ]


def compare(
    plan: Steppable, evidence: Evidence, stepped: Mapping[str, Array], tolerance: float
) -> Comparison:
    """Compare the outputs of a program, stepped through the same inputs, with Keras."""
    return _compared(plan, evidence, stepped, tolerance, evidence.noise)


def compare_first_without_noise(
    plan: Steppable, evidence: Evidence, stepped: Mapping[str, Array], tolerance: float
) -> Comparison:
    """Compare, and allow for the effect of rounding only if there is a difference that it may explain."""
    found = _compared(plan, evidence, stepped, tolerance, None)
    return found if found.is_allowed else compare(plan, evidence, stepped, tolerance)


def _compared(
    plan: Steppable,
    evidence: Evidence,
    stepped: Mapping[str, Array],
    tolerance: float,
    noise: Mapping[str, Floats] | None,
) -> Comparison:
    found = [
        _difference(spec.name, spec.temporal, evidence, stepped[spec.name], tolerance, noise)
        for spec in plan.outputs
    ]
    return Comparison(len(evidence.inputs[0]), evidence.steps, tuple(found))


def _difference(
    name: str,
    timed: bool,
    evidence: Evidence,
    stepped: Array,
    tolerance: float,
    noise: Mapping[str, Floats] | None,
) -> Difference:
    one, two = _rows(evidence.outputs[name], timed), _rows(stepped, timed)
    if one.shape != two.shape:
        return Difference(name, math.inf, math.inf, 0.0, 0, 0, (math.inf,))
    if not one.size:
        return Difference(name, 0.0, 0.0, tolerance, 0, 0, (0.0,))
    allowed, ended = _allowed(one, np.zeros(one.shape[:2]) if noise is None else noise[name], tolerance)
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


def compared_share(comparisons: Sequence[Comparison]) -> float:
    """Return the share of rows and time steps that were compared, for the output with the smallest share."""
    outputs = zip(*(comparison.outputs for comparison in comparisons), strict=True)
    skipped = [float(np.mean([sample.skipped for sample in output])) for output in outputs]
    return 1.0 - max(skipped, default=0.0)


def observe(
    plan: Steppable,
    interface: Interface,
    inputs: Sequence[Array],
    steps: int,
    held: frozenset[int],
    kept: Sequence[float],
) -> Evidence:
    """Call the model on given sequences, with and without added roundings: see `WholeCall.perturbed`.

    Raises:
        ModelError: Keras's call fails.
    """
    whole = WholeCall(interface)
    with explained(interface.model, _RUNS_NOT.format(steps)):
        usual = whole(inputs)
    return Evidence(steps, tuple(inputs), usual, lambda: _noise(plan, whole, inputs, usual, held, kept))


def reach(model: object, own_steps: Sequence[int | None]) -> int:
    """Return the number of time steps to try: more than the known reach of any layer."""
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


def _rows(value: Array, timed: bool) -> Floats:
    """Reshape an output to ``(rows, time, rest)``, with one time step if it has no time axis."""
    shape = value.shape[: 2 if timed else 1]
    return value.reshape(*shape, *(() if timed else (1,)), -1).astype(np.float64)


def _noise(
    plan: Steppable,
    whole: WholeCall,
    inputs: Sequence[Array],
    usual: Mapping[str, Array],
    held: frozenset[int],
    kept: Sequence[float],
) -> dict[str, Floats]:
    """Return how far added roundings move each output up to each time step; infinity if Keras's call then fails."""
    found: dict[str, Floats] = {}
    try:
        runs = [whole.perturbed(inputs, held, kept, run) for run in range(_PERTURBED_RUNS)]
    except Exception:  # For example a computed index out of range: the effect of rounding is unknown, so nothing is compared.
        runs = []
    for spec in plan.outputs:
        one = _rows(usual[spec.name], spec.temporal)
        moved = np.full(one.shape[:2], 0.0 if runs else np.inf)
        for run in runs:
            two = _rows(run[spec.name], spec.temporal)
            with np.errstate(invalid="ignore", over="ignore"):
                apart = np.where(one == two, 0.0, np.nan_to_num(np.abs(one - two), nan=np.inf))
            moved = np.maximum(moved, np.max(apart, axis=2, initial=0))
        found[spec.name] = np.maximum.accumulate(moved, axis=1)
    return found


def _allowed(usual: Floats, noise: Floats, tolerance: float) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the allowed difference by row and time, and where a row cannot be compared any more."""
    size = np.max(np.abs(np.nan_to_num(usual, nan=0, posinf=0, neginf=0)), axis=2, initial=0)
    size = np.maximum(np.maximum.accumulate(size, axis=1), 0.1)
    ended = ~np.all(np.isfinite(usual), axis=2) | ~np.isfinite(noise) | (noise > _LOST * size)
    return tolerance * size + noise, np.logical_or.accumulate(ended, axis=1)


def _same(one: Array, two: Array) -> bool:
    return bool(np.array_equal(one, two, equal_nan=np.issubdtype(one.dtype, np.inexact)))


def _kept(value: Array, timed: bool, times: Mapping[int, int]) -> list[Array]:
    """Return what the disturbance must not change: whole rows, or those before the disturbed time step."""
    return [row[: times.get(i)] for i, row in enumerate(value) if timed or i not in times]


def _refuse_moves(name: str, timed: bool, usual: Array, moved: Array, times: Mapping[int, int]) -> None:
    """Refuse changes before the disturbance, and in rows that were not disturbed."""
    one, two = _rows(usual, timed), _rows(moved, timed)
    tolerance = 1e-5 * np.maximum(np.max(np.abs(np.nan_to_num(one)), axis=(1, 2), initial=0), 1e-3)
    for row in range(len(one)):
        until = times.get(row)
        if until is not None and not timed:
            continue
        before = slice(0, until)
        with np.errstate(invalid="ignore"):  # Infinity minus infinity.
            apart = np.max(np.abs(np.nan_to_num(one[row, before] - two[row, before])), initial=0)
        if apart <= tolerance[row]:
            continue
        if until is None:
            raise ModelError(
                f"the rows of a batch are not independent of each other: output {quoted(name)} of one row moves "
                f"by {apart:.2g} "
                "when another row is disturbed"
            )
        raise NotCausalError(
            f"model is not causal: output {quoted(name)} moves by {apart:.2g} before the time step that was disturbed "
            f"({until})"
        )
