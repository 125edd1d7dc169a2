"""The store's document of a model's versions.

JSON, since documents are few and people may read them. Each commit of it is one change: of loaded versions, the
default, a label, or the sessions' moves.
"""

from __future__ import annotations

import json
from typing import Any

from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.versions.history import History, MigrationStep, Move, MoveKind
from stepwell_server.engine.versions.registry import KnownVersion, Versions
from stepwell_server.program import StateSpec, TensorSpec

PREFIX = "models/"
"""Document names begin with this, followed by the model's name."""
_FORM = 3
"""The format version. A server reads only its own."""


class DocumentError(Exception):
    """A document cannot be read. The message says which one and why."""


def name_of(model: str) -> str:
    """The name of a model's document."""
    return PREFIX + model


def encode(own: Versions) -> bytes:
    """Encode a document."""
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
    """Decode a document. Nothing is loaded yet, so the default becomes `wanted`.

    Raises:
        DocumentError: it is not a document of this form.
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
