"""The load-time proof that a model can be stepped: from its graph, and on samples, which can only refuse it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.causality.axes import Scales
from stepwell_server.compile.causality.blame import (
    length_problem,
    loop_problem,
    misplaced_bias,
    one_step_problem,
    refusal_of,
)
from stepwell_server.compile.causality.call import Need
from stepwell_server.compile.causality.cut import (
    FAR,
    SCALES,
    Cut,
    CutError,
    Cuts,
    LoopError,
    cut_far,
    cut_few_steps,
)
from stepwell_server.compile.causality.one_step import require_same
from stepwell_server.compile.causality.proof import NotAdmitted, needed, prove
from stepwell_server.compile.causality.proof import Proof as GraphProof
from stepwell_server.compile.causality.refusals import Reason
from stepwell_server.compile.causality.values import TooManyElementsError, weights_recorded
from stepwell_server.compile.errors import ModelError, NotCausalError, quoted
from stepwell_server.compile.graph.interface import Interface, describe
from stepwell_server.compile.graph.plan import Plan, assignments, make_plan
from stepwell_server.compile.graph.samples import Sampler, fitted, make_sampler
from stepwell_server.compile.graph.scopes import named
from stepwell_server.compile.graph.trace import trace
from stepwell_server.compile.graph.untraceable import explained
from stepwell_server.compile.graph.watch import Observation, all_operations, watch
from stepwell_server.compile.probe import evidence
from stepwell_server.compile.probe.evidence import Evidence
from stepwell_server.compile.probe.first_difference import first_to_differ, undefined_cast
from stepwell_server.compile.probe.sequences import run, step_of_function, tolerance, worst
from stepwell_server.compile.probe.state_inputs import cut_apart
from stepwell_server.compile.probe.whole_call import WholeCall, refuse_kept_states, refuse_training
from stepwell_server.compile.streaming.memory import StreamingMemory
from stepwell_server.program import Proof, ProofOptions

#: Two lengths that distinguish a time axis from a feature axis, and two edge cases; beyond the number of time steps that
#: Keras itself needs, because the model leaves some out.
LENGTHS = (5, 7)
MORE_LENGTHS = (1, 2)
SEED = 7
#: Refused even with --trust-causality: for example, served sessions would share written variables and random numbers.
_NEVER_TRUSTED = {Reason.RANDOM, Reason.WRITES, Reason.PYTHON, Reason.STATE, Reason.LAYOUT}
#: Refusals that longer traces may not have.
_OF_LENGTH = {
    *(Reason.TIME, Reason.PAIRS, Reason.MATRIX, Reason.BEGINNING),
    *(Reason.AHEAD, Reason.LENGTH, Reason.UNPROVEN),
}
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TracedModel:
    """A traced model that can be stepped, with the evidence."""

    plan: Plan
    sampler: Sampler
    function: Any
    """The concrete function of one time step, with variables."""
    observations: tuple[Observation, ...]
    """Short calls of the whole model by Keras."""
    evidence: tuple[Evidence, ...]
    """Long calls on hard sequences."""
    proof: Proof
    whole: WholeCall
    options: ProofOptions
    is_of_weights: bool
    """The proof depends on weights: with other weights it may differ."""
    memory: StreamingMemory | None = None
    """The states of operations that look back, if there are any."""


def trace_and_probe(
    model: Any, progress: Progress | None = None, options: ProofOptions | None = None
) -> TracedModel:
    """Trace one time step of ``model`` and prove that it is one.

    Raises:
        NotCausalError: an output at a time step depends on later time steps, or on earlier ones other than through the
            state of a recurrent layer.
        ModelError: the model cannot be traced or proven for another reason.
    """
    interface = describe(model)
    problems: list[ModelError] = []
    for temporal in assignments(interface):
        try:
            return _try(interface, temporal, progress, options or ProofOptions())
        except ModelError as error:
            problems.append(error)
    raise problems[0]


class _ShortError(Exception):
    """Traces at these sizes do not prove the model, but longer ones may."""

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.scales = scales


def _try(
    interface: Interface, temporal: Sequence[bool], progress: Progress | None, options: ProofOptions
) -> TracedModel:
    """Prove a model by the shortest traces that are long enough."""
    choices: Sequence[Scales] = SCALES
    while True:
        try:
            return _try_at(choices, interface, temporal, progress, options)
        except _ShortError as error:
            choices = choices[choices.index(error.scales) + 1 :]


def _try_at(
    choices: Sequence[Scales],
    interface: Interface,
    temporal: Sequence[bool],
    progress: Progress | None,
    options: ProofOptions,
) -> TracedModel:
    rng = np.random.default_rng(SEED)
    try:
        interface, temporal, cuts = cut_apart(interface, temporal, options.declaration, choices)
    except LoopError as error:
        raise loop_problem(interface, error) from error
    except CutError as error:
        raise length_problem(interface, temporal, error) from error
    with explained(
        interface.model,
        f"the model does not run on sequences of {' and '.join(map(str, LENGTHS))} time steps",
    ):
        sampler = fitted(make_sampler(interface, temporal), cuts.compared(), cuts.table_sizes())
    _refuse_complex(cuts)
    refuse_kept_states(interface, cuts)
    with weights_recorded() as weights:
        unproven, proof = _admit(interface, cuts, sampler, options)
    least = 0 if proof is None else proof.steps
    lengths = [least + steps for steps in LENGTHS]
    with explained(
        interface.model,
        f"the model does not run on sequences of {' and '.join(map(str, lengths))} time steps",
    ):
        seen = [observe(sampler, temporal, steps, rng) for steps in lengths]
        refuse_training(sampler, temporal, lengths[0])
    looks_back = proof is not None and proof.looks_back
    plan = make_plan(sampler.interface, temporal, seen[0], seen[1], looks_back=looks_back)
    memory = None
    if proof is not None and looks_back:
        with _refusing(sampler, temporal):
            memory = StreamingMemory(cuts.first, proof, [spec.name for spec in plan.state])
        with explained(interface.model, "the values before the first time step cannot be computed"):
            plan = memory.added_to(plan)
    with explained(interface.model, f"the model does not run on a sequence of {_counted(least + 1)}"):
        with _refusing(sampler, temporal), weights_recorded() as more:
            function = trace(plan) if memory is None else memory.trace(plan)
        if progress is not None:
            progress("probe")
        seen += [observe(sampler, temporal, least + steps, rng) for steps in MORE_LENGTHS]
    whole = WholeCall(sampler.interface)
    found = evidence.gather(plan, sampler, _steps(sampler, cuts, options, least), whole)
    if unproven:
        _require_conclusive(plan, found, unproven)
    result = Proof(steps=found[0].steps, unproven=unproven)
    traced = TracedModel(
        plan,
        sampler,
        function,
        tuple(seen),
        tuple(found),
        result,
        whole,
        options,
        is_of_weights=bool(weights | more),
        memory=memory,
    )
    _compare(traced)
    return traced


def _require_conclusive(plan: Plan, samples: Sequence[Evidence], unproven: str) -> None:
    """Refuse a model that is admitted by samples only, if rounding makes most of these meaningless."""
    allowed = tolerance(plan.interface.model)
    share = evidence.compared_share(
        [evidence.compare(plan, sample, sample.outputs, allowed) for sample in samples]
    )
    if share < 0.5:
        raise ModelError(
            f"--trust-causality names the model, but samples can check only {share:.0%} of their rows and time "
            f"steps: elsewhere one rounding of the inputs moves Keras's own values by a tenth or more; {unproven}"
        )


def _counted(steps: int) -> str:
    return "one time step" if steps == 1 else f"{steps} time steps"


def _steps(sampler: Sampler, cuts: Cuts, options: ProofOptions, left_out: int) -> int:
    """Return the number of time steps of the comparison with Keras."""
    interface, temporal = sampler.interface, cuts.temporal
    steps = max(options.steps or 0, evidence.reach(interface.model, _own_steps(interface, temporal)))
    # `cut.SCALES`: more than the first trace has
    return max(steps, cuts.first.scale.steps + 3, left_out + LENGTHS[0]) if any(temporal) else 1


def _refuse_complex(cuts: Cuts) -> None:
    """Refuse complex outputs, which the protocol does not support."""
    for name, output in cuts.first.outputs.items():
        if output.dtype.is_complex:
            raise ModelError(
                f"output {quoted(name)} must have real numbers or booleans; it has "
                f"{output.dtype.name}: return its real and imaginary parts separately, and combine them in the client"
            )


def _admit(
    interface: Interface, cuts: Cuts, sampler: Sampler, options: ProofOptions
) -> tuple[str, GraphProof | None]:
    """Return what the graph does not prove, but --trust-causality accepts, and the proof; empty: everything is proven.

    Raises:
        ModelError: something is not proven and not trusted.
    """
    try:
        proof = prove(cuts)
        if proof.begins_before(cuts.first.scale):
            raise NotAdmitted(
                Reason.LENGTH, None, "pads with more elements than sequences have that are proven"
            )
        _require_same_far(interface, cuts, proof)
        for few in _few_steps(interface, cuts, proof.steps):
            require_same(cuts, few, proof.numbers)
    except NotAdmitted as found:
        if found.reason in _OF_LENGTH and cuts.scales != SCALES[-1] and cuts.may_be_short():
            raise _ShortError(cuts.scales) from found
        if not options.trust or found.reason in _NEVER_TRUSTED:
            raise refusal_of(sampler, cuts.temporal, found) from found
        return f"{named(sampler.interface.model, found.layer)} {found}", None
    return "", proof


@contextlib.contextmanager
def _refusing(sampler: Sampler, temporal: Sequence[bool]) -> Iterator[None]:
    try:
        yield
    except NotAdmitted as found:
        raise refusal_of(sampler, temporal, found) from found


def _few_steps(interface: Interface, cuts: Cuts, left_out: int) -> Iterator[Cut]:
    """Trace the model on one time step, and on one more than it leaves out. Keras may fail on fewer than that."""
    for steps in sorted({1, left_out + 1}):
        try:
            yield cut_few_steps(interface, cuts, steps)
        except CutError as error:
            if steps == left_out + 1:
                is_one = steps == 1
                problem = (
                    one_step_problem(interface, error)
                    if is_one
                    else length_problem(interface, cuts.temporal, error)
                )
                raise problem from error


def _require_same_far(interface: Interface, cuts: Cuts, proof: GraphProof) -> None:
    """Repeat the proof with a far longer sequence.

    Raises:
        NotAdmitted: the model computes something different there.
        ModelError: the model does not run on it.
    """
    needs = _needs_far(interface, cuts)
    for index, op in needed(cuts.first):
        names = (op.name, *(output.name for output in op.outputs))
        if any(needs.get(name) != proof.needs.get(name) for name in names):
            layer = cuts.first.owner(index)
            raise NotAdmitted(Reason.LENGTH, layer, "computes something different for a long sequence")
    if needs != proof.needs:  # Of a loop whose outputs over time are not needed.
        raise NotAdmitted(Reason.LENGTH, None, "computes something different for a long sequence")


def _needs_far(interface: Interface, cuts: Cuts) -> Mapping[str, tuple[Need, ...]]:
    """Return what operations keep according to the proof with the longest sequence on which it can be done.

    On longer ones than the shortest of them, sizes may exceed 32-bit integers, and constants the memory.

    Raises:
        NotAdmitted: the model computes something different there.
        ModelError: the model does not run on the shortest of them.
    """
    *longer, shortest = FAR
    for scale in longer:
        with contextlib.suppress(CutError, TooManyElementsError):
            return prove(cut_far(interface, cuts, scale)).needs
    try:
        far = cut_far(interface, cuts, shortest)
    except CutError as error:
        raise length_problem(interface, cuts.temporal, error) from error
    return prove(far).needs


def _own_steps(interface: Interface, temporal: Sequence[bool]) -> list[int | None]:
    return [info.shape[1] for info, timed in zip(interface.inputs, temporal, strict=True) if timed]


def observe(sampler: Sampler, temporal: Sequence[bool], steps: int, rng: np.random.Generator) -> Observation:
    """Call the Keras model on a random sequence."""
    return watch(sampler.interface, sampler.draw(rng, temporal, steps), steps)


def _compare(traced: TracedModel) -> None:
    """Step through the samples and compare: the short ones always, the long ones if the graph does not prove everything.

    Otherwise the check of the artefact, which is what will run, uses the long ones.
    """
    model = traced.plan.interface.model
    step, allowed = step_of_function(traced.plan, traced.function), tolerance(model)
    for observation in traced.observations:
        stepped = run(traced.plan, step, observation.inputs, observation.steps)
        name, share = worst(observation.outputs, stepped)
        if share > allowed:
            first = first_to_differ(traced.plan, traced.sampler, observation.inputs, observation.steps)
            difference = (
                f"output {quoted(name)} of one call over {observation.steps} steps differs by {share:.2g} of its "
                f"largest value "
                f"from {observation.steps} calls of one step"
            )
            raise (
                misplaced_bias(model, all_operations(model), {observation.steps})
                or undefined_cast(model, traced.function, first, difference)
                or NotCausalError(f"model cannot be run step by step: {first.clause}{difference}")
            )
    if not traced.proof.unproven:
        return
    for sample in traced.evidence:
        stepped = run(traced.plan, step, sample.inputs, sample.steps)
        found = evidence.compare(traced.plan, sample, stepped, allowed).worst
        if found is not None and not found.is_allowed:
            first = first_to_differ(traced.plan, traced.sampler, sample.inputs, sample.steps)
            raise undefined_cast(model, traced.function, first, str(found)) or NotCausalError(
                f"model cannot be run step by step, although --trust-causality names it: {found}; {first.clause}"
                f"{traced.proof.unproven}"
            )
