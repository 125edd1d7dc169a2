"""Whether sessions can move between versions with their states, and what a version's tensors are called.

A retrained model is the same model: if two versions differ only in names that Keras generated, the later one is
served with the names of the earlier one. So client code and stored states still fit.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from stepwell_server.architecture.connections import moved
from stepwell_server.architecture.differences import Differences, compare
from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.versions.registry import KnownVersion, Versions
from stepwell_server.program import Program

_MAX_SHOWN = 8
"""A message shows at most this many differences."""
_SAME_ARCHITECTURE = (
    "Give the layers the names that are served (name=...), or copy the weights into the first model"
    " (old.set_weights(new.get_weights())), or call keras.backend.clear_session() before you build the model again"
)
_OTHER_ARCHITECTURE = "Load it with sessions=keep or sessions=reset, or under another name"
_SAME_STATES = f"Give the layers the names that are served (name=...) to carry sessions all the same. {_OTHER_ARCHITECTURE}"

_MOVED = f"Give each of these layers the name of the served layer that it stands for (name=...). {_OTHER_ARCHITECTURE}"


def as_served(own: Versions, version: int, program: Program) -> Program:
    """The program of a version, with the names under which it is to be served.

    A version that was served before keeps its names. Any other version gets those of the default version or,
    failing that, of the latest version that is the same model, if there is one.
    """
    for known in _candidates(own, version):
        is_same = known.fingerprint == program.fingerprint or known.structure == program.structure != ""
        if (
            is_same
            and known.layout.has_shapes_of(Layout.of(program))
            and len(known.inputs) == len(program.inputs)
        ):
            return program.called(known.names)
    return program


def _candidates(own: Versions, version: int) -> Iterator[KnownVersion]:
    default = own.chosen
    for number in dict.fromkeys((version, default, *sorted(own.known, reverse=True))):
        if number in own.known:
            yield own.known[number]


def refusal(own: Versions, previous: int, version: int, program: Program) -> str:
    """Why sessions cannot be carried to a version, and a fix; empty: they can.

    Args:
        own: The model.
        previous: The version that its sessions are on.
        version: The number that the other version has, or would get.
        program: The other version's program, `as_served`.
    """
    known, layout = own.known[previous], Layout.of(program)
    source = own.loaded.get(previous)
    clauses = known.layout.differences(layout)
    if clauses:
        found = Differences((), is_of_names=False)
        if source is not None and source.program.architecture and program.architecture:
            found = compare(source.program.architecture, program.architecture)
        fix = _OTHER_ARCHITECTURE
        has_same_names = Counter(known.names.state) == Counter(spec.name for spec in layout.states)
        if known.layout.has_shapes_of(layout) and (found.is_of_names or not has_same_names):
            fix = _SAME_ARCHITECTURE if found.is_of_names else _SAME_STATES
        return _sentence(own, previous, version, [*found.clauses, *clauses], fix)
    return "" if source is None else _moved(own, previous, version, source.program, program)


def _moved(own: Versions, previous: int, version: int, old: Program, new: Program) -> str:
    """Why equal names do not mean equal layers; empty: they do, as far as can be determined."""
    before, after = old.architecture, new.architecture
    if before is None or after is None or before.structure == after.structure:
        return ""
    state = (new.file_names or new.names).state
    specs = [dataclasses.replace(spec, name=name) for spec, name in zip(new.state, state, strict=True)]
    names = moved(before, (old.file_names or old.names).state, after, specs)
    if not names:
        return ""
    shown = " and ".join(repr(name) for name in names[:_MAX_SHOWN])
    why = (
        f"Keras made up the names of the layers {shown}, and these layers are connected in another way, so that it is not"
        " clear which state belongs to which"
    )
    return _sentence(own, previous, version, [why, *compare(before, after).clauses], _MOVED)


def _sentence(own: Versions, previous: int, version: int, clauses: list[str], fix: str) -> str:
    shown = "; ".join(clauses[:_MAX_SHOWN])
    if len(clauses) > _MAX_SHOWN:
        shown += f"; and {len(clauses) - _MAX_SHOWN} more differences"
    return (
        f"sessions can be carried from version {previous} of model {own.name!r} to {version} only if states and outputs are"
        f" equal; {shown}. {fix}"
    )
