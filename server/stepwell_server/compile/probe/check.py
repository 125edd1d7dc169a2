"""Checks that an artefact computes what Keras does."""

from __future__ import annotations

from stepwell_server.compile.errors import quoted
from stepwell_server.compile.probe.evidence import compare_first_without_noise, compared_share
from stepwell_server.compile.probe.probe import TracedModel
from stepwell_server.compile.probe.sequences import run, tolerance, worst
from stepwell_server.engine.executors.step_function import Step


class CheckError(Exception):
    """The artefact does not compute what Keras does. The message is a clause."""


class DiffersError(CheckError):
    """The traced function and Keras's call differ over a long sequence."""


def check_against_keras(traced: TracedModel, step: Step) -> float:
    """Compare the artefact with the short and the long calls of the whole model.

    Returns:
        The share of rows and time steps of the long calls that could be compared.

    Raises:
        CheckError: they differ by more than rounding.
    """
    allowed = tolerance(traced.plan.interface.model)
    for observation in traced.observations:
        stepped = run(traced.plan, step, observation.inputs, observation.steps)
        name, share = worst(observation.outputs, stepped)
        if share > allowed:
            raise CheckError(f"output {quoted(name)} differs from Keras by {share:.2g} of its largest value")
    comparisons = []
    for sample in traced.evidence:
        stepped = run(traced.plan, step, sample.inputs, sample.steps)
        comparisons.append(compare_first_without_noise(traced.plan, sample, stepped, allowed))
        found = comparisons[-1].worst
        if found is not None and not found.is_allowed:
            raise DiffersError(str(found))
    return compared_share(comparisons)
