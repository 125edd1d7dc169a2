"""The load-time proof that a model can be stepped: T calls of one step equal one call over T steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.culprit import LOOKS_BACK, culprits
from stepwell_server.compile.errors import ModelError, NotCausalError, gist
from stepwell_server.compile.interface import describe
from stepwell_server.compile.plan import Plan, assignments, make_plan
from stepwell_server.compile.samples import Sampler, make_sampler
from stepwell_server.compile.sequences import difference, run, step_of_function, tolerance, worst
from stepwell_server.compile.trace import trace
from stepwell_server.compile.watch import Observation, watch

#: Two lengths that tell a time axis from a feature axis, and two that try the ends.
_LENGTHS = (5, 7)
_MORE_LENGTHS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A model that can be stepped, with the evidence."""

    plan: Plan
    sampler: Sampler
    function: Any
    """The concrete function of one time step, with variables."""
    observations: tuple[Observation, ...]
    """Whole-sequence calls that its steps were compared with."""


def trace_and_probe(model: Any, progress: Any = None) -> Traced:
    """Trace one time step of ``model`` and prove that it is one.

    Raises:
        NotCausalError: an output at one time step depends on later ones, or on earlier ones other than
            through the state of a recurrent layer.
        ModelError: the model cannot be traced for another reason.
    """
    interface = describe(model)
    problems: list[ModelError] = []
    for temporal in assignments(interface.inputs):
        try:
            return _try(interface, temporal, progress)
        except ModelError as error:
            problems.append(error)
    raise next((problem for problem in problems if isinstance(problem, NotCausalError)), problems[0])


def _try(interface: Any, temporal: Sequence[bool], progress: Any) -> Traced:
    rng = np.random.default_rng(7)
    with _explained(f"the model does not run on sequences of {' and '.join(map(str, _LENGTHS))} time steps"):
        sampler = make_sampler(interface, temporal)
        seen = [_observe(sampler, temporal, steps, rng) for steps in _LENGTHS]
    plan = make_plan(sampler.interface, temporal, seen[0], seen[1])
    with _explained("the model does not run on a sequence of one time step"):
        function = trace(plan)
        if progress is not None:
            progress("probe")
        seen += [_observe(sampler, temporal, steps, rng) for steps in _MORE_LENGTHS]
    traced = Traced(plan, sampler, function, tuple(seen))
    _prove(traced)
    return traced


@contextlib.contextmanager
def _explained(problem: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # Keras and user code raise whatever they like.
        raise ModelError(f"{problem}: {type(error).__name__}: {gist(error)}") from error


def _observe(sampler: Sampler, temporal: Sequence[bool], steps: int, rng: np.random.Generator) -> Observation:
    return watch(sampler.interface, sampler.draw(rng, temporal, steps), steps)


def _prove(traced: Traced) -> None:
    step, allowed = step_of_function(traced.plan, traced.function), tolerance(traced.plan)
    for observation in traced.observations:
        stepped = run(traced.plan, step, observation.inputs, observation.steps)
        name, share = worst(observation.outputs, stepped)
        if share <= allowed:
            continue
        largest = _absolute(observation.outputs[name], stepped[name])
        blamed = culprits(traced.sampler, traced.plan.temporal)
        is_causal = bool(blamed) and all(LOOKS_BACK in clause for clause in blamed)
        raise NotCausalError(
            f"model {'cannot be run step by step' if is_causal else 'is not causal'}: output {name!r} of one call over {observation.steps} steps differs by "
            f"{largest:.2g} from {observation.steps} calls of one step; "
            + (" and ".join(blamed) or "no single layer was found at fault")
        )


def _absolute(one: Any, two: Any) -> float:
    if one.shape != two.shape or not np.isfinite(difference(one, two)):
        return float("inf")
    return float(
        np.max(np.abs(np.nan_to_num(one.astype(np.float64)) - np.nan_to_num(two.astype(np.float64))))
    )
