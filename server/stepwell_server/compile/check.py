"""The proof that an artefact computes what Keras does, and a row's bits whatever shares its batch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.evidence import compare
from stepwell_server.compile.probe import Traced
from stepwell_server.compile.sequences import Step, initial_states, run, tolerance, worst

Array = npt.NDArray[np.generic]
#: Every small size, odd and even around the widths of vector units, and large ones.
LITERT_SIZES = (*range(1, 18), 32, 33, 64, 100, 128, 256)
TENSORFLOW_SIZES = (1, 2, 4, 8, 16, 32, 64)
#: Time steps before the bits are compared, so that states are ones the model reaches.
_WARM_STEPS = 3
#: How long the bits may be compared, and the largest size compared where that would not be enough.
_BUDGET_S, _SMALL = 30.0, 33


class CheckError(Exception):
    """The artefact does not compute what Keras does. The message is one clause for people."""


class DiffersError(CheckError):
    """What was traced gives other values over a long sequence than Keras's call does."""


def check_against_keras(traced: Traced, step: Step) -> None:
    """Compare the artefact with the short and the long calls of the whole model.

    Raises:
        CheckError: they differ by more than rounding.
    """
    allowed = tolerance(traced.plan.interface.model)
    for observation in traced.observations:
        stepped = run(traced.plan, step, observation.inputs, observation.steps)
        name, share = worst(observation.outputs, stepped)
        if share > allowed:
            raise CheckError(f"output {name!r} differs from Keras by {share:.2g} of its largest value")
    for sample in traced.evidence:
        stepped = run(traced.plan, step, sample.inputs, sample.steps)
        found = compare(traced.plan, sample, stepped, allowed).worst
        if found is not None and not found.is_allowed:
            raise DiffersError(str(found))


def agreeing_sizes(traced: Traced, step: Step, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the most numerous batch sizes out of ``sizes`` that give every row the same bits.

    Each size runs over the same rows twice, shuffled differently, so that a row meets other places and
    other neighbours; there are twice as many rows as fit the largest size for that.
    """
    rows = 2 * max(sizes)
    inputs, states = _reached(traced, step, rows)
    groups: dict[bytes, list[int]] = {}
    rng = np.random.default_rng(11)
    for size in sizes:
        bits = {_bits(step, inputs, states, size, rng.permutation(rows)) for _ in range(2)}
        if len(bits) == 1:
            groups.setdefault(bits.pop(), []).append(size)
    return _best(groups)


def affordable(traced: Traced, step: Step, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return ``sizes``, without the large ones if checking those would take minutes."""
    rows = 16
    inputs, states = _reached(traced, step, rows)
    start = time.perf_counter()
    step(inputs, states)
    row_s = (time.perf_counter() - start) / rows
    if row_s * 4 * max(sizes) * len(sizes) <= _BUDGET_S:
        return tuple(sizes)
    return tuple(size for size in sizes if size <= _SMALL)


def _best(groups: Mapping[bytes, list[int]]) -> tuple[int, ...]:
    if not groups:
        return ()
    best = max((len(group), max(group), group) for group in groups.values())
    return tuple(best[-1])


def _reached(traced: Traced, step: Step, rows: int) -> tuple[tuple[Array, ...], Sequence[Array]]:
    rng = np.random.default_rng(13)
    states: Sequence[Array] = initial_states(traced.plan, rows)
    for _ in range(_WARM_STEPS):
        _, states = step(_one_step(traced, rng, rows), states)
    return _one_step(traced, rng, rows), states


def _one_step(traced: Traced, rng: np.random.Generator, rows: int) -> tuple[Array, ...]:
    drawn = traced.sampler.draw(rng, traced.plan.temporal, 1, rows)
    return tuple(
        value[:, 0] if timed else value for value, timed in zip(drawn, traced.plan.temporal, strict=True)
    )


def _bits(step: Step, inputs: Sequence[Array], states: Sequence[Array], size: int, order: Array) -> bytes:
    """Return a digest of all results by row, computed ``size`` rows at a time in the given order."""
    rows = len(order)
    kept: list[Array] = []
    for start in range(0, rows, size):
        chosen = np.resize(np.roll(order, -start), size)
        outputs, after = step([x[chosen] for x in inputs], [x[chosen] for x in states])
        if not kept:
            kept = [np.zeros((rows, *x.shape[1:]), x.dtype) for x in (*outputs, *after)]
        for whole, part in zip(kept, (*outputs, *after), strict=True):
            whole[chosen] = part
    digest = hashlib.sha256()
    for array in kept:
        digest.update(array.tobytes())
    return digest.digest()
