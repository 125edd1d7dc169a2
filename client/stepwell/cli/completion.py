"""`stepwell completion`: prints the completion script of a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from stepwell.cli.toolkit.help import Command

VARIABLE = "_STEPWELL_COMPLETE"
"""Environment variable with which the script requests completions; click derives it from the program's name."""


@click.command(
    cls=Command,
    short_help="Print a shell completion script.",
    examples=(
        "stepwell completion bash > ~/.local/share/bash-completion/completions/stepwell",
        'stepwell completion zsh > "${fpath[1]}/_stepwell"',
        "stepwell completion fish > ~/.config/fish/completions/stepwell.fish",
    ),
    exit_codes=(("0", "done"), ("2", "the command line is invalid")),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, /, shell: str) -> None:
    """Print a script that makes a shell complete commands, options, files, models and sessions.

    The examples install it permanently. For the current shell only, use eval "$(stepwell completion bash)".

    Models and sessions come from the server of the command line, or of STEPWELL_SERVER. The server is asked when you
    press the key and has one second to answer; without an answer there are no suggestions.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "stepwell", VARIABLE).source())
