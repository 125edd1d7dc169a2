"""Tests a program on the processor that will run it.

Which batch sizes give a row the same bits depends on the processor, because kernels are chosen by its features. The
proof that a program computes what Keras does was made where it was compiled. Known answers confirm it here, up to
rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence

import numpy as np

from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.base import ExecutionError
from stepwell_server.engine.executors.step_function import Step, initial_rows, step_of_executor
from stepwell_server.engine.types import Array
from stepwell_server.program import Program, Trial

#: Every small size, odd and even around the widths of vector units, and large ones.
LITERT_SIZES = (*range(1, 18), 32, 33, 64, 100, 128, 256)
#: For a step function with an operator that treats elements differently if they fill no vector: these fill them.
EVEN_SIZES = (16, 32, 64, 128, 256)
TENSORFLOW_SIZES = (1, 2, 4, 8, 16, 32, 64)
#: The most time steps before the bits are compared, so that states are realistic. Rows have any number up to that:
#: padding and numbers of time steps may hide at one of them what differs at others.
_WARM_STEPS = 6
#: The largest size compared if all would take too long, and the most bytes of rows.
_SMALL, _MAX_BYTES = 33, 1 << 28
#: Approximate time limits for the comparison: at compile time, and when a compiled program is loaded.
COMPILE_BUDGET_S, LOAD_BUDGET_S = 30.0, 5.0
#: Rows of known inputs; fewer if a row is large.
_ROWS, _ROWS_BYTES = 64, 1 << 20
#: Rows and time steps with known answers, and the share of values that may differ by more than rounding. Where a
#: model rounds or compares, another last bit can become another number.
_ANSWERED_ROWS, _ANSWERED_STEPS, _MAX_DIFFERING = 16, 4, 0.1

#: Sizes of which one is tried for a step function whose bits depend on the size, and the shuffles of its rows.
_PADDED_SIZES, _PADDED_SHUFFLES = (16, 32, 64), 6
_MIN_ROWS = 64
#: Sizes at which the neighbours of rows are replaced, beside the largest.
_NEIGHBOUR_SIZES = (2, 3, 16, 17)

ANY_SIZE = "LiteRT converts every operation of the model"
SOME_SIZES = f"{ANY_SIZE}, but a row's bits depend on the batch size"
"""Why LiteRT runs a program, as a sentence for users."""
_ONNX_SIZES = {
    0: "ONNX Runtime gives a row the same bits at every batch size",
    1: "each row is run alone, so a batch takes as long as its rows one after the other",
}
_ONNX_EVEN_SIZES = (
    "ONNX Runtime gives a row the same bits at batch sizes that are multiples of 16: batches are padded to {0} or {1} rows, so one row "
    "takes as long as {2}"
)
_ONNX_ONE_SIZE = (
    "ONNX Runtime gives a row the same bits at batch size {0}, not at every size: batches are padded to it, so one row takes as "
    "long as {0}"
)
_NAMES = {"litert": "LiteRT", "tensorflow": "TensorFlow", "onnxruntime": "ONNX Runtime"}


class TrialError(Exception):
    """The program cannot run correctly here. The message is one clause for users."""


def rows_for(row_bytes: int) -> int:
    """The number of rows of known inputs to keep, for rows of this many bytes."""
    return max(4, min(_ROWS, _ROWS_BYTES // max(1, row_bytes)))


def tried(
    program: Program, inputs: tuple[Array, ...], step: Step, tolerance: float, sizes: Sequence[int]
) -> Trial:
    """The trial of ``program``, with the answers of ``step``."""
    return Trial(inputs, _answers(program, inputs, step), tolerance, tuple(sizes))


def sizes_here(program: Program) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Test a program on this processor that was compiled elsewhere; pass the result to `with_sizes`.

    Returns:
        The batch sizes that were compared, and those that give a row the same bits.

    Raises:
        TrialError: the program cannot run here, or computes something else here.
    """
    trial = program.trial
    if trial is None:
        raise TrialError("there are no known answers to test it with here")
    try:
        step = step_of_executor(
            load_executor(dataclasses.replace(program, batch_sizes=untried_sizes(program)), is_exact=True)
        )
        _compare(program, trial, _answers(program, trial.inputs, step))
        sizes = affordable(program, trial.inputs, step, trial.sizes, LOAD_BUDGET_S)
        agreeing = agreeing_here(program, trial.inputs, step, sizes)
    except (
        ExecutionError,
        LookupError,
        RuntimeError,
        ValueError,
    ) as error:  # The interpreter's "I cannot run this".
        raise TrialError(
            f"{_NAMES[program.executor]} cannot run it here: {str(error).strip().splitlines()[0]}"
        ) from error
    return sizes, agreeing


def untried_sizes(program: Program) -> tuple[int, ...]:
    """The batch sizes of a program (`Program.batch_sizes`) while it is tried."""
    return (1,) if program.proof.rows == "alone" else ()


def with_sizes(program: Program, sizes: Sequence[int], agreeing: Sequence[int]) -> Program:
    """The program with the list of batch sizes to use.

    Raises:
        TrialError: no batch size can be used.
    """
    if not agreeing:
        if program.executor == "onnxruntime":
            raise TrialError(
                "the same row run twice alone gives different bits: does the graph draw random numbers? Remove that operator"
            )
        raise TrialError("no batch size gives a row the same bits in every place")
    if program.proof.rows == "alone":
        return dataclasses.replace(program, batch_sizes=(1,))
    if program.executor == "onnxruntime":
        is_any = tuple(agreeing) == tuple(sizes) and len(sizes) > 1 and min(sizes) == 1
        used = () if is_any else tuple(agreeing)
        size = max(used, default=0)
        reason = _ONNX_SIZES.get(size, _ONNX_ONE_SIZE.format(size))
        if len(used) > 1:
            reason = _ONNX_EVEN_SIZES.format(", ".join(map(str, used[:-1])), used[-1], min(used))
        return dataclasses.replace(program, batch_sizes=used, executor_reason=reason)
    if tuple(agreeing) == tuple(sizes):
        return dataclasses.replace(program, batch_sizes=(), executor_reason=ANY_SIZE)
    return dataclasses.replace(program, batch_sizes=tuple(agreeing), executor_reason=SOME_SIZES)


def agreeing_here(
    program: Program, inputs: Sequence[Array], step: Step, sizes: Sequence[int]
) -> tuple[int, ...]:
    """The batch sizes to use of those in ``sizes``; for ONNX Runtime all of them, or one, as it has many kernels.

    If not all agree there, one size is tried, a multiple of 16, because vector units then treat all rows alike; then
    each row alone.
    """
    agreeing = agreeing_sizes(program, inputs, step, sizes)
    if program.executor != "onnxruntime":
        return agreeing
    if agreeing == tuple(sizes) and all(
        _ignores_neighbours(program, inputs, step, size)
        for size in {*_NEIGHBOUR_SIZES, max(sizes)} & {*sizes}
    ):
        return agreeing
    for size in _PADDED_SIZES:
        if (
            size <= max(sizes)
            and agreeing_sizes(program, inputs, step, (size,), _PADDED_SHUFFLES)
            and _ignores_neighbours(program, inputs, step, size)
        ):
            return (size,)
    return agreeing_sizes(program, inputs, step, (1,))


def _ignores_neighbours(program: Program, inputs: Sequence[Array], step: Step, size: int) -> bool:
    """Whether rows keep their bits when others in the batch become extreme, small, or copies of one row.

    Shuffles alone may miss it: if every batch has an extreme row, what is computed from the extremes never changes.
    """
    reached, states = _reachable(program, inputs, step, max(_MIN_ROWS, size))
    largest = np.argsort(_largest(reached), kind="stable")
    ordinary = np.resize(largest[: max(1, len(largest) // 2)], size)
    places = np.arange(size)
    expected = _rows_of(step, reached, states, ordinary)
    for other in (largest[-1], largest[0], ordinary[size // 2]):
        for kept in (places % 2 == 0, places % 2 == 1, places == 0, places == size - 1):
            found = _rows_of(step, reached, states, np.where(kept, ordinary, other))
            if any(
                one[kept].tobytes() != two[kept].tobytes() for one, two in zip(expected, found, strict=True)
            ):
                return False
    return True


def _largest(arrays: Sequence[Array]) -> Array:
    """The largest magnitude of each row."""
    rows = len(arrays[0])
    found = [np.abs(array.reshape(rows, -1).astype(np.float64)).max(axis=1, initial=0) for array in arrays]
    whole: Array = np.max(found, axis=0)
    return whole


def _rows_of(step: Step, inputs: Sequence[Array], states: Sequence[Array], rows: Array) -> list[Array]:
    outputs, after = step([x[rows] for x in inputs], [x[rows] for x in states])
    return [*outputs, *after]


def agreeing_sizes(
    program: Program, inputs: Sequence[Array], step: Step, sizes: Sequence[int], shuffles: int = 2
) -> tuple[int, ...]:
    """The largest group of batch sizes out of ``sizes`` that give every row the same bits.

    Each size runs over the same rows in several random orders, so each row gets other positions and neighbours. There
    are twice as many rows as the largest size for that.
    """
    rows = max(_MIN_ROWS, 2 * max(sizes))
    reached, states = _reachable(program, inputs, step, rows)
    rng = np.random.default_rng(11)
    found = {size: set[bytes]() for size in sizes}
    for _ in range(shuffles):
        order = rng.permutation(rows)
        wrapped = np.concatenate(
            [order, order[: max(sizes)]]
        )  # The last batch wraps around to the first rows.
        drawn, before = [x[wrapped] for x in reached], [x[wrapped] for x in states]
        for size in sizes:
            found[size].add(_bits(step, drawn, before, size, order))
    groups: dict[bytes, list[int]] = {}
    for size, bits in found.items():
        if len(bits) == 1:
            groups.setdefault(bits.pop(), []).append(size)
    return _best(groups)


def affordable(
    program: Program, inputs: Sequence[Array], step: Step, sizes: Sequence[int], budget_s: float
) -> tuple[int, ...]:
    """``sizes`` without the large ones if checking those would exceed ``budget_s`` or the memory limit."""
    row_bytes = sum(spec.row_bytes for spec in (*program.inputs, *program.outputs))
    if 2 * max(sizes) * (row_bytes + 2 * program.state_row_bytes) > _MAX_BYTES:
        return tuple(size for size in sizes if size <= _SMALL)
    rows = 16
    reached, states = _reachable(program, inputs, step, rows)
    start = time.perf_counter()
    step(reached, states)
    row_s = (time.perf_counter() - start) / rows
    if row_s * 4 * max(sizes) * len(sizes) <= budget_s:
        return tuple(sizes)
    return tuple(size for size in sizes if size <= _SMALL)


def _answers(program: Program, inputs: Sequence[Array], step: Step) -> tuple[Array, ...]:
    """The last outputs of a few rows after a few time steps."""
    count = len(inputs[0])
    rows = np.arange(min(_ANSWERED_ROWS, count))
    states: Sequence[Array] = initial_rows(program.initial, len(rows))
    outputs: Sequence[Array] = ()
    for time_step in range(_ANSWERED_STEPS):
        outputs, states = step([x[(rows + 7 * time_step) % count] for x in inputs], states)
    return tuple(outputs)


def _compare(program: Program, trial: Trial, found: Sequence[Array]) -> None:
    for spec, known, here in zip(program.outputs, trial.outputs, found, strict=True):
        if not known.size:
            continue
        with np.errstate(invalid="ignore"):  # signalling NaNs, which an answer may hold
            one, two = known.astype(np.float64), here.astype(np.float64)
        largest = np.max(np.abs(one), initial=0.1, where=np.isfinite(one))
        same = (one == two) | (np.isnan(one) & np.isnan(two))
        with np.errstate(invalid="ignore"):
            same |= np.abs(one - two) <= trial.tolerance * largest
        if np.mean(~same) > _MAX_DIFFERING:
            raise TrialError(
                f"output {spec.name!r} has other values on this processor than where the program was compiled, by more "
                f"than rounding ({np.mean(~same):.0%} of them); compile the model on a machine of this kind"
            )


def _best(groups: Mapping[bytes, list[int]]) -> tuple[int, ...]:
    if not groups:
        return ()
    best = max((len(group), max(group), group) for group in groups.values())
    return tuple(best[-1])


def _reachable(
    program: Program, inputs: Sequence[Array], step: Step, rows: int
) -> tuple[list[Array], Sequence[Array]]:
    """Inputs and states of ``rows`` rows, each with a history of its own."""
    rng = np.random.default_rng(13)
    states: Sequence[Array] = initial_rows(program.initial, rows)
    lengths = np.arange(rows) % (_WARM_STEPS + 1)
    for steps in range(_WARM_STEPS):
        _, after = step(_shuffled(rng, inputs, rows), states)
        continues = lengths > steps
        states = [
            np.where(continues.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            for new, old in zip(after, states, strict=True)
        ]
    return _shuffled(rng, inputs, rows), states


def _shuffled(rng: np.random.Generator, inputs: Sequence[Array], rows: int) -> list[Array]:
    """Drawn rows, every other one with coarse numbers.

    Those are equal, zero and whole, which drawn numbers hardly are, so comparisons give what they would never give.
    """
    chosen = rng.integers(len(inputs[0]), size=rows)
    return [_coarse(x[chosen]) for x in inputs]


def _coarse(values: Array) -> Array:
    if values.dtype.kind != "f" or not values.size:
        return values
    values[1::2] = np.clip(np.trunc(values[1::2] * 2) / 2, values.min(), values.max())  # none is out of range
    return values


def _bits(step: Step, inputs: Sequence[Array], states: Sequence[Array], size: int, order: Array) -> bytes:
    """A digest of all results by row, computed ``size`` rows at a time; the inputs are in the given order."""
    parts = []
    for start in range(0, len(order), size):
        part = slice(start, start + size)
        outputs, after = step([x[part] for x in inputs], [x[part] for x in states])
        parts.append((*outputs, *after))
    back, digest = np.argsort(order), hashlib.sha256()
    for results in zip(*parts, strict=True):
        digest.update(np.concatenate(results)[back].tobytes())
    return digest.digest()
