"""`stepwell completion`: the script by which a shell completes command lines."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from stepwell.cli.toolkit.help import Command

VARIABLE = "_STEPWELL_COMPLETE"
"""By which the script asks for completions; click makes it of the program's name."""


@click.command(
    cls=Command,
    short_help="Print the script that makes a shell complete.",
    examples=(
        "stepwell completion bash > ~/.local/share/bash-completion/completions/stepwell",
        'stepwell completion zsh > "${fpath[1]}/_stepwell"',
        "stepwell completion fish > ~/.config/fish/completions/stepwell.fish",
    ),
    exit_codes=(("0", "done"), ("2", "the command line is wrong")),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, /, shell: str) -> None:
    """Print the script that makes a shell complete commands, options, files, models and sessions.

    The examples put it where the shell looks for it; eval "$(stepwell completion bash)" does for the shell at hand.

    Names of models and ids of sessions are those of the server that the command line names, or STEPWELL_SERVER. It
    is asked when the key is pressed and has a second; without an answer nothing is offered.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "stepwell", VARIABLE).source())
