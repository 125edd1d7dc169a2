"""What the store keeps of a model's versions, as one document of its name.

JSON, as there are few and people may look at them. Each commit of it is one change: of what is loaded, of the default,
of a label, of what sessions do.
"""

from __future__ import annotations

import json
from typing import Any

from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.versions.history import History, MigrationStep, Move, MoveKind
from stepwell_server.engine.versions.registry import KnownVersion, Versions
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
    fields = {
        "form": _FORM,
        "change": own.change,
        "default": own.chosen,
        "highest": own.highest,
        "labels": own.labels,
        "epoch": own.history.epoch,
        "moves": [_move(move) for move in own.history.moves],
        "versions": [_version(known) for _, known in sorted(own.known.items())],
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def decode(model: str, content: bytes) -> Versions:
    """What `encode` was given, without what is loaded: the default is what is wanted.

    Raises:
        DocumentError: it was not made so.
    """
    try:
        fields = json.loads(content)
        if fields["form"] != _FORM:
            when = "a later" if fields["form"] > _FORM else "an earlier"
            raise ValueError(
                f"its form is {fields['form']}, and this server reads {_FORM}: {when} server wrote it"
            )
        return Versions(
            model,
            wanted=int(fields["default"]),
            labels={str(label): int(version) for label, version in fields["labels"].items()},
            history=History(
                int(fields["epoch"]),
                tuple(_read_move(*move) for move in fields["moves"]),
            ),
            known={int(each["version"]): _known(each) for each in fields["versions"]},
            highest=int(fields["highest"]),
            change=int(fields.get("change", 0)),
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
        MoveKind(how),
        tuple(MigrationStep(str(function), int(version)) for function, version in steps),
        tuple((int(first), int(last)) for first, last in others),
    )


def _version(known: KnownVersion) -> dict[str, Any]:
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


def _known(fields: dict[str, Any]) -> KnownVersion:
    return KnownVersion(
        int(fields["version"]),
        str(fields["fingerprint"]),
        Layout(
            tuple(StateSpec(name, tuple(shape), dtype) for name, shape, dtype in fields["states"]),
            tuple(
                TensorSpec(name, tuple(shape), dtype, temporal)
                for name, shape, dtype, temporal in fields["outputs"]
            ),
        ),
        str(fields["source"]),
        float(fields["loaded"]),
        str(fields["tenant"]),
        bool(fields["wanted"]),
        bool(fields.get("leaving", False)),
        replaced=int(fields.get("replaced", 0)),
        inputs=tuple(map(str, fields["inputs"])),
        structure=str(fields["structure"]),
    )
