"""What the store keeps of a model's versions, as one document of its name.

JSON, as there are few and people may look at them. Each commit of it is one change: of what is loaded, of the default,
of a label, of what sessions do.
"""

from __future__ import annotations

import json
from typing import Any

from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.versions.history import History, How, Migrated, Move
from stepwell_server.engine.versions.registry import Known, Versions
from stepwell_server.program import StateSpec, TensorSpec

PREFIX = "models/"
"""Of the names of these documents; the model's follows."""
_FORM = 3
"""Of what is written here. A server reads its own alone."""


class DocumentError(Exception):
    """A document cannot be read. The message says which one and why."""


def name_of(model: str) -> str:
    """What the document of a model is called."""
    return PREFIX + model


def encode(own: Versions) -> bytes:
    """The document."""
    told = {
        "form": _FORM,
        "change": own.change,
        "default": own.chosen,
        "highest": own.highest,
        "labels": own.labels,
        "epoch": own.history.epoch,
        "moves": [_move(move) for move in own.history.moves],
        "versions": [_version(known) for _, known in sorted(own.known.items())],
    }
    return json.dumps(told, separators=(",", ":")).encode()


def decode(model: str, content: bytes) -> Versions:
    """What `encode` was given, without what is loaded: the default is what is wanted.

    Raises:
        DocumentError: it was not made so.
    """
    try:
        told = json.loads(content)
        if told["form"] != _FORM:
            when = "a later" if told["form"] > _FORM else "an earlier"
            raise ValueError(
                f"its form is {told['form']}, and this server reads {_FORM}: {when} server wrote it"
            )
        return Versions(
            model,
            wanted=int(told["default"]),
            labels={str(label): int(version) for label, version in told["labels"].items()},
            history=History(
                int(told["epoch"]),
                tuple(_read_move(*move) for move in told["moves"]),
            ),
            known={int(each["version"]): _known(each) for each in told["versions"]},
            highest=int(told["highest"]),
            change=int(told.get("change", 0)),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(
            f"what the store keeps of the versions of model {model!r} cannot be read: {error}"
        ) from error


def _move(move: Move) -> list[Any]:
    steps = [[step.function, step.target] for step in move.migrations]
    return [move.epoch, move.source, move.target, move.how.value, steps, move.others]


def _read_move(epoch: int, source: int, target: int, how: str, steps: list[Any], others: list[Any]) -> Move:
    return Move(
        int(epoch),
        int(source),
        int(target),
        How(how),
        tuple(Migrated(str(function), int(version)) for function, version in steps),
        tuple((int(first), int(last)) for first, last in others),
    )


def _version(known: Known) -> dict[str, Any]:
    return {
        "version": known.version,
        "fingerprint": known.fingerprint,
        "states": [[spec.name, spec.shape, spec.dtype] for spec in known.layout.states],
        "outputs": [[spec.name, spec.shape, spec.dtype, spec.temporal] for spec in known.layout.outputs],
        "source": known.source,
        "loaded": known.loaded,
        "tenant": known.tenant,
        "wanted": known.is_wanted,
        "leaving": known.is_leaving,
        "replaced": known.replaced,
        "inputs": known.inputs,
        "structure": known.structure,
    }


def _known(told: dict[str, Any]) -> Known:
    return Known(
        int(told["version"]),
        str(told["fingerprint"]),
        Layout(
            tuple(StateSpec(name, tuple(shape), dtype) for name, shape, dtype in told["states"]),
            tuple(
                TensorSpec(name, tuple(shape), dtype, temporal)
                for name, shape, dtype, temporal in told["outputs"]
            ),
        ),
        str(told["source"]),
        float(told["loaded"]),
        str(told["tenant"]),
        bool(told["wanted"]),
        bool(told.get("leaving", False)),
        replaced=int(told.get("replaced", 0)),
        inputs=tuple(map(str, told["inputs"])),
        structure=str(told["structure"]),
    )
