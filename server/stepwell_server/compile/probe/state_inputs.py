"""Recognizes inputs of a model that are states, such as those of a decoder with ``initial_state`` and ``return_state``.

The graph shows them, names do not matter: an input that only one recurrent layer reads, as its initial state, and an output
that is the same part of that layer's state after the last time step. Such a pair leaves the interface and becomes the
session's state. Then the model is one without state inputs, whose layers begin with given values, and is proven as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stepwell_server.compile.causality.axes import Scales
from stepwell_server.compile.causality.cut import SCALES, Cut, CutCall, CutError, Cuts, LoopError, cut
from stepwell_server.compile.causality.proof import needed
from stepwell_server.compile.causality.values import OF_SHAPES
from stepwell_server.compile.data_file import initial_row
from stepwell_server.compile.errors import ModelError, quoted
from stepwell_server.compile.graph.interface import Array, Interface, StateInput
from stepwell_server.compile.graph.samples import plain_dtype
from stepwell_server.compile.graph.scopes import named
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.program import Declaration


def cut_apart(
    interface: Interface,
    temporal: Sequence[bool],
    declared: Declaration,
    choices: Sequence[Scales] = SCALES,
) -> tuple[Interface, tuple[bool, ...], Cuts]:
    """Cut a model, and take its state inputs out of the interface, if there are any.

    The first of the ``choices`` of sizes is used at which the model runs.

    Returns:
        the interface, which of its inputs have a time axis, and its graphs.

    Raises:
        CutError: see `cut`.
        ModelError: the declaration does not fit the graph, or no session can keep the state of a recurrent layer.
    """
    cuts = _cut_at(interface, temporal, choices)
    states = recognized(interface, cuts.first, declared)
    if not states:
        return interface, tuple(temporal), cuts
    places = {state.place for state in states}
    timed = tuple(each for place, each in enumerate(temporal) if place not in places)
    without = interface.keeping(states)
    return without, timed, cut(without, timed, cuts.scales)


def _cut_at(interface: Interface, temporal: Sequence[bool], choices: Sequence[Scales]) -> Cuts:
    problem: CutError | None = None
    for scales in choices:
        try:
            return cut(interface, temporal, scales)
        except LoopError:
            raise
        except CutError as error:  # It may leave out more time steps than there are.
            problem = problem or error
    assert problem is not None
    raise problem


def recognized(interface: Interface, side: Cut, declared: Declaration) -> tuple[StateInput, ...]:
    """Return the state inputs of a model.

    Args:
        interface: the model, with all its inputs.
        side: its graph at one size.
        declared: the pairs and initial values that the user declares.

    Raises:
        ModelError: the declaration does not fit the graph.
    """
    found: list[StateInput] = []
    placed = {tensor.name: place for place, tensor in enumerate(side.inputs)}
    begins = _beginnings(side, placed)
    free = [place for place, slots in begins.items() if len(slots) == 1 and place not in _read(side, placed)]
    sources = reversed(_sources(side.outputs.items()))
    ends = {source.name: name for name, source in sources if not _is_rounded(side.outputs[name], source)}
    for place in sorted(free):
        ((index, part),) = begins[place]
        call, info = side.calls[index], interface.inputs[place]
        after = ends.get(call.last[1 + part].name)
        said = declared.states.get(info.name)
        if after is None and said in side.outputs and _is_last_output(side.outputs[said], call, part):
            after = said
        if after is not None and None not in info.shape[1:]:
            zero: Array = np.zeros([int(size or 0) for size in info.shape[1:]], plain_dtype(info.dtype))
            found.append(StateInput(place, info, after, call.layer, call.number, part, zero))
    _require_declared(interface, side, declared, {state.info.name: state.output for state in found})
    return tuple(_begun(state, declared.initial) for state in found)


def _sources(tensors: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return what each tensor is, apart from copies and other types of floating-point numbers."""
    found = []
    for name, tensor in tensors:
        source = tensor
        while source.op.type in {"Identity", "Cast"} and _keeps_values(source.op):
            source = source.op.inputs[0]
        found.append((name, source))
    return found


def _is_rounded(tensor: Any, source: Any) -> bool:
    """Whether casts between these round values to a narrower type than both have: then a call returns other values."""
    narrowest = min(tensor.dtype.size, source.dtype.size)
    while tensor is not source:
        tensor = tensor.op.inputs[0]
        if tensor.dtype.size < narrowest:
            return True
    return False


def _is_last_output(tensor: Any, call: CutCall, part: int) -> bool:
    """Whether a tensor is the output of a layer at the last time step, and that is a part of its state, as ``h`` of a GRU.

    Only a declaration makes it a state, as it may be meant to be an output.
    """
    (_, output), (_, state) = _sources([("", call.after[0]), ("", call.after[1 + part])])
    ((_, source),) = _sources([("", tensor)])
    if call.mask is not None or output is not state or _is_rounded(tensor, source):
        return False
    if source.name == call.last[0].name:
        return True
    op = source.op
    if op.type != "StridedSlice" or op.inputs[0].name != call.outputs.name:
        return False
    if any(value.op.type != "Const" for value in op.inputs[1:]):
        return False
    begins, _, strides = (tf.make_ndarray(value.op.get_attr("value")).tolist() for value in op.inputs[1:])
    others = 2 ** len(begins) - 1 - 2  # All entries but that of the time axis.
    is_whole = all(op.get_attr(f"{side}_mask") & others == others for side in ("begin", "end"))
    is_last = begins[1:2] == [-1] and op.get_attr("shrink_axis_mask") == 2 and set(strides) == {1}
    return is_whole and is_last and not op.get_attr("ellipsis_mask") and not op.get_attr("new_axis_mask")


def _keeps_values(op: Any) -> bool:
    one, two = op.inputs[0].dtype, op.outputs[0].dtype
    return bool(one == two or (one.is_floating and two.is_floating))


def _beginnings(side: Cut, placed: Mapping[str, int]) -> dict[int, list[tuple[int, int]]]:
    """Return which parts of which calls' initial states an input is, by its place."""
    found: dict[int, list[tuple[int, int]]] = {}
    for index, call in enumerate(side.calls):
        initial = [(str(part), tensor) for part, tensor in enumerate(call.initial)]
        for part, source in _sources(initial):
            if source.name in placed and not _is_rounded(call.initial[int(part)], source):
                found.setdefault(placed[source.name], []).append((index, int(part)))
    return found


def _read(side: Cut, placed: Mapping[str, int]) -> set[int]:
    """Return the places of inputs that anything but an initial state reads."""
    wanted = [(name, tensor) for name, tensor in side.outputs.items()]
    for call in (*side.calls, *side.parts):
        mask = [] if call.mask is None else [call.mask]
        wanted += [("", tensor) for tensor in (*call.sequences, *mask, *call.after)]
    for call in side.parts:
        wanted += [("", tensor) for tensor in call.initial]
    for _, op in needed(side):
        if op.type not in OF_SHAPES and not (op.type in {"Identity", "Cast"} and _keeps_values(op)):
            wanted += [("", tensor) for tensor in op.inputs]
    return {placed[source.name] for _, source in _sources(wanted) if source.name in placed}


def _require_declared(
    interface: Interface, side: Cut, declared: Declaration, found: Mapping[str, str]
) -> None:
    names = [info.name for info in interface.inputs]
    for before, after in declared.states.items():
        pair = f"--state {before}:{after}"
        if before not in names:
            raise ModelError(
                f"{pair}: must name an input of the model; there is no {quoted(before)}, {_are(names)}"
            )
        if after not in side.outputs:
            raise ModelError(
                f"{pair}: must name an output of the model; there is no {quoted(after)}, {_are(side.outputs)}"
            )
        if before not in found:
            raise ModelError(f"{pair}: {_why_not(interface, side, names.index(before))}")
        if found[before] != after:
            raise ModelError(
                f"{pair}: must name the output that holds this state after the last time step; that is "
                f"{quoted(found[before])}: --state {before}:{found[before]}"
            )
    for name in declared.initial:
        if name not in found:
            raise ModelError(
                f"--initial: must name the input of a state; got {quoted(name)}; "
                + (
                    f"the states are {', '.join(map(quoted, found))}"
                    if found
                    else "the model has no state inputs"
                )
            )


def _why_not(interface: Interface, side: Cut, place: int) -> str:
    """Explain why an input is no state."""
    placed = {tensor.name: index for index, tensor in enumerate(side.inputs)}
    slots = _beginnings(side, placed).get(place, [])
    name = quoted(interface.inputs[place].name)
    if not slots:
        return f"must name the initial state of a recurrent layer (initial_state=...); no layer takes {name} as that"
    who = named(interface.model, side.calls[slots[0][0]].layer)
    if len(slots) > 1:
        return f"a state must belong to one call of a layer; {len(slots)} take {name} as their initial state: give each an input of its own"
    if place in _read(side, placed):
        return (
            f"only a layer's initial state may be what reads a state; other operations than {who} read {name}, and a call over "
            "several time steps would give them its first value at each step: let them read the outputs of that layer"
        )
    return (
        f"the state of {who} after the last time step must be an output of the model; none holds that of {name}: build the layer "
        "with return_state=True, and return its state"
    )


def _are(names: Iterable[str]) -> str:
    return f"there are {', '.join(map(quoted, names))}"


def _begun(state: StateInput, initial: Mapping[str, Any]) -> StateInput:
    """Return a state with the initial value that the user declares."""
    name, zero = state.info.name, state.initial
    if name not in initial:
        return state
    return dataclasses.replace(state, initial=initial_row(name, initial[name], zero.shape, zero.dtype.name))
