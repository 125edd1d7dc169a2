"""`stepwell models`: what a server serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stepwell.cli import _render
from stepwell.cli._help import Command
from stepwell.cli._target import Target, json_option, server_options

if TYPE_CHECKING:
    from stepwell import ModelInfo, TensorInfo


@click.command(
    cls=Command,
    short_help="Show the models of a server.",
    examples=("stepwell models", "stepwell models --json | jq -r '.models[].name'"),
    json_keys=(
        ("front", 'what speaks to the network: "native" or "python"; empty: a server of an older release'),
        ("models", "list, by name; of each:"),
        ("name", "the name it is served under"),
        ("fingerprint", "hash of architecture and weights; a state belongs to one"),
        ("inputs, outputs, state", "lists of name, dtype, shape (one row, one time step), temporal"),
        ("executor", '"litert" or "tensorflow"'),
        ("executor_reason", "why, as a sentence"),
        ("batch_sizes", "batch sizes that it is padded to; empty: any"),
        ("state_row_bytes", "size of the state of one row"),
        ("sessions", "open sessions"),
        ("proof", "how it is known that it may be stepped:"),
        ("proof.compared_steps", "length of the sequences on which it was compared with Keras"),
        ("proof.compared_share", "share of their rows and time steps of which that says something"),
        ("proof.unproven", "what does not follow from its graph and was trusted; empty: nothing"),
    ),
)
@json_option
@server_options
def models(target: Target, as_json: bool) -> None:
    """Show the models of a server: their inputs, outputs and state, and what runs them.

    In a shape, B is the batch size of the session and T the number of time steps. A single time step may leave
    out T. The fingerprint is shown in short; --json has it whole. The last line says which front the server has
    (serve --front).
    """
    with target.connect("Reading the models") as client:
        server = client.server_info()
    if as_json:
        _render.print_json({"front": server.front, "models": [model_json(model) for model in server.models]})
        return
    if not server.models:
        click.echo("no models", err=True)
    else:
        headings = (
            "MODEL",
            "FINGERPRINT",
            "INPUTS",
            "OUTPUTS",
            "STATE",
            "SESSIONS",
            "PROOF",
            "EXECUTOR",
            "WHY",
        )
        _render.print_records(headings, [model_cells(model) for model in server.models], right=("SESSIONS",))
    click.echo(f"front: {server.front or 'unknown, a server of an older release'}")


def model_cells(model: ModelInfo) -> tuple[str, ...]:
    """A model as a row of the table."""
    return (
        model.name,
        model.fingerprint[: _render.FINGERPRINT_DIGITS],
        "\n".join(map(_render.shape_text, model.inputs)),
        "\n".join(map(_render.shape_text, model.outputs)),
        "\n".join(map(_render.shape_text, model.state)),
        str(model.sessions),
        str(model.proof),
        model.executor,
        model.executor_reason,
    )


def model_json(model: ModelInfo) -> dict[str, object]:
    """A model as programs read it."""
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "inputs": [spec_json(spec) for spec in model.inputs],
        "outputs": [spec_json(spec) for spec in model.outputs],
        "state": [spec_json(spec) for spec in model.state],
        "executor": model.executor,
        "executor_reason": model.executor_reason,
        "batch_sizes": list(model.batch_sizes),
        "state_row_bytes": model.state_row_bytes,
        "sessions": model.sessions,
        "proof": {
            "compared_steps": model.proof.compared_steps,
            "compared_share": model.proof.compared_share,
            "unproven": model.proof.unproven,
        },
    }


def spec_json(spec: TensorInfo) -> dict[str, object]:
    """One of a model's tensors as programs read it."""
    return {
        "name": spec.name,
        "dtype": str(spec.dtype),
        "shape": list(spec.shape),
        "temporal": spec.temporal,
    }
