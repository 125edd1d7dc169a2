"""`stepwell state`: read and set the state of a session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stepwell.cli.toolkit import complete, render
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Group
from stepwell.cli.toolkit.session import attach
from stepwell.cli.toolkit.target import Target, json_option, server_options

if TYPE_CHECKING:
    from stepwell import State


class _States(Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, and explain that `reset` has another name here."""
        if args[:1] == ["reset"]:
            session = args[1] if args[1:] and not args[1].startswith("-") else "SESSION"
            raise click.UsageError(
                f"there is no command 'reset': stepwell state set {session} --zero sets the initial state",
                ctx,
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=_States,
    short_help="Read and set the state of a session.",
    examples=(
        "stepwell state get user-42 -o user-42.safetensors",
        "stepwell state set user-43 user-42.safetensors",
        "stepwell state set user-42 --zero",
    ),
)
def state() -> None:
    """Read and set the state of a session.

    A state is a set of named tensors with one row for each row of the session, such as 'h' and 'c' of an LSTM layer.
    """


@state.command(
    "get",
    short_help="Show or save the state of a session.",
    examples=("stepwell state get user-42", "stepwell state get user-42 -o user-42.safetensors"),
    json_keys=(
        ("session_id, model, model_fingerprint", "the session, its model, and the model's fingerprint"),
        ("revision, position", "as they were when the state was read"),
        ("state", "by name, in the model's order: dtype, shape and values (nested lists)"),
        ("file", "the saved file; null without -o"),
    ),
)
@click.argument("session_id", metavar="SESSION", shell_complete=complete.sessions)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Save the state to this .safetensors file, with the model's fingerprint.",
)
@json_option
@server_options
def get(target: Target, session_id: str, output: Path | None, as_json: bool) -> None:
    """Show a summary of a session's state, and save the whole state with -o.

    The state is read after the changes that the server has received. Reading it counts as use of the session.
    """
    with target.connect("Reading the state") as client:
        session = attach(client, session_id)
        read = session.get_state()
    if output is not None:
        save_state(read, output)
    if as_json:
        render.print_json({"session_id": session_id, **state_json(read), "file": output and str(output)})
    else:
        print_state(read)
        if output is not None:
            click.echo(f"saved to {output}")


@state.command(
    "set",
    short_help="Set the state of a session from a file, or to the initial one.",
    examples=(
        "stepwell state set user-42 user-42.safetensors",
        "stepwell state set user-42 --zero",
        "stepwell state set user-42 --zero --rows 0,3",
    ),
    json_keys=(("session_id", "the session"), ("revision, position", "after the change")),
)
@click.argument("session_id", metavar="SESSION", shell_complete=complete.sessions)
@click.argument(
    "file",
    metavar="[FILE.safetensors]",
    required=False,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--zero", is_flag=True, help="Set it to the model's initial state, which is zero for most models."
)
@click.option(
    "--rows", metavar="N,N...", callback=lambda _ctx, _param, text: parse_rows(text), help="Only these rows."
)
@json_option
@server_options
def set_state(
    target: Target, session_id: str, file: Path | None, zero: bool, rows: list[int] | None, as_json: bool
) -> None:
    """Set the state of a session to a saved one, or with --zero to the model's initial one.

    A saved state fits sessions of the same model, and of retrained versions of it. It must have as many rows as are
    set.

    A file for all rows also sets the position; --zero sets it to 0. With --rows the other rows and the position stay.
    The revision keeps counting changes. To move a session with its revision and the answer to its last change, use
    'stepwell sessions export' and 'import'.
    """
    if (file is None) != zero:
        raise click.UsageError("give either a FILE.safetensors or --zero")
    new = None if file is None else load_state(file)
    with target.connect("Setting the state") as client:
        session = attach(client, session_id)
        # a state of many sessions has no position
        position = 0 if new is None or rows else new.position or 0
        session.reset_states(new, rows=rows, position=position)
    if as_json:
        render.print_json(
            {"session_id": session.id, "revision": session.revision, "position": session.position}
        )
    else:
        click.echo(f"revision {session.revision}, position {session.position}")


def parse_rows(text: str | None) -> list[int] | None:
    """Read row numbers separated by commas."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} must be row numbers separated by commas, as in 0,3") from None


def save_state(read: State, output: Path) -> None:
    """Save a state to the file that -o names."""
    try:
        read.save(output)
    except OSError as error:
        raise Failure(f"cannot write -o {output}: {error.strerror}") from None


def load_state(file: Path) -> State:
    """Read a saved state."""
    from stepwell import InvalidInputError, State

    try:
        return State.load(file)
    except OSError as error:
        raise Failure(f"cannot read {file}: {error.strerror}") from None
    except InvalidInputError as error:
        raise Failure(f"cannot use {file}: {error.message}") from None


def print_state(read: State) -> None:
    """Print a summary of a state."""
    rows: list[Sequence[str]] = [
        (name, str(array.dtype), render.array_shape(array), *render.summary_cells(array))
        for name, array in read.items()
    ]
    headings = ("TENSOR", "DTYPE", "SHAPE", "MIN", "MEAN", "MAX", "ZEROS")
    render.print_table(headings, rows, right=("MIN", "MEAN", "MAX", "ZEROS"))
    click.echo(f"{read.model} at revision {read.revision}, position {read.position}")


def state_json(read: State) -> dict[str, object]:
    """A state as JSON."""
    return {
        "model": read.model,
        "model_fingerprint": read.fingerprint,
        "revision": read.revision,
        "position": read.position,
        "state": {name: render.array_json(array) for name, array in read.items()},
    }
