"""`stepwell check`: may a model be stepped, and how close is stepping it to Keras?"""

from __future__ import annotations

import click

from stepwell.cli.serve import PassedOn, pass_on


@click.command(
    cls=PassedOn,
    short_help="Prove that a Keras model may be stepped.",
    add_help_option=False,
    examples=(
        "stepwell check model.keras",
        "stepwell check model.keras --data sequences.npy",
        "stepwell check model.keras --import my_layers --json | jq .outputs",
    ),
    exit_codes=(
        ("0", "equal: it may be stepped, and stepping it equals Keras on the sequences"),
        ("1", "differs: by more than rounding on the sequences; or inconclusive"),
        (
            "2",
            "refused: it may not be stepped; or not checked: the command line, the file, the data, missing packages",
        ),
    ),
)
@click.pass_context
def check(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Prove that a Keras model may be stepped, and compare stepping it with Keras."""
    pass_on(ctx, arguments, "stepwell_server.check", "checking")
