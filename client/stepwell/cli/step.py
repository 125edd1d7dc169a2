"""`stepwell step`: advance a session."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import click

from stepwell.cli.toolkit import complete, render, values
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.session import attach, attach_or_open
from stepwell.cli.toolkit.target import Target, json_option, server_options
from stepwell.cli.toolkit.types import Duration

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stepwell import ModelInfo, Session


@click.command(
    cls=Command,
    short_help="Advance a session by one time step or more.",
    examples=(
        "stepwell step user-42 --open forecast --input '[[0.1, 0.2, 0.3]]'",
        "stepwell step user-42 --input history.csv --outputs last",
        "stepwell step user-42 --input x=@x.json --input y=y.npy --json",
    ),
    values=(
        ("JSON", "nested lists, or an object of them by input name"),
        ("@FILE.json", "the same in a file"),
        ("-", "the same from stdin"),
        ("FILE.npy", "one array"),
        ("FILE.npz", "several arrays, by input name"),
        ("FILE.csv", "one line per time step, one column per feature; for a batch size of 1"),
    ),
    json_keys=(
        ("session_id, model", "the session and its model"),
        ("revision, position", "after the step"),
        ("outputs", "by name: dtype, shape and values (nested lists); empty with --outputs none"),
    ),
)
@click.argument("session_id", metavar="SESSION", shell_complete=complete.sessions)
@click.option(
    "--model", metavar="NAME", shell_complete=complete.models, help="Fail unless the session has this model."
)
@click.option(
    "--open",
    "open_model",
    metavar="NAME",
    shell_complete=complete.models,
    help="Open the session with this model if it does not exist.",
)
@click.option(
    "--batch-size",
    metavar="N",
    type=click.IntRange(min=1),
    help="With --open: rows of the session. Default: 1.",
)
@click.option(
    "--max-idle-s",
    metavar="TIME",
    type=Duration(),
    help="With --open: idle time after which a newly opened session expires. 0 means no limit. "
    "Default: no limit.",
)
@click.option(
    "--input",
    "inputs",
    metavar="[NAME=]VALUE",
    multiple=True,
    required=True,
    callback=values.read_inputs,
    shell_complete=values.complete_file,
    help="An input. Repeat the option for several inputs.",
)
@click.option(
    "--outputs",
    type=click.Choice(["all", "last", "none"]),
    default="all",
    show_default=True,
    help="The time steps whose outputs to print.",
)
@json_option
@server_options
def step(
    target: Target,
    session_id: str,
    model: str | None,
    open_model: str | None,
    batch_size: int | None,
    max_idle_s: float | None,
    inputs: tuple[values.Values, ...],
    outputs: Literal["all", "last", "none"],
    as_json: bool,
) -> None:
    """Advance a session by one time step, or by T with a time axis, and print the outputs.

    An input has the shape (B, F...) for one time step or (B, T, F...) for T time steps, where B is the session's
    batch size; 'stepwell models' shows the shapes. The server applies the whole step or nothing of it.
    """
    from stepwell.errors import InvalidInputError

    check_options(model, open_model, batch_size, max_idle_s)
    with target.connect("Stepping the session") as client:
        if open_model is None:
            session = attach(client, session_id, model)
        else:
            session = attach_or_open(client, session_id, open_model, batch_size, max_idle_s)
        info = client.model(session.model)
        try:
            result = session.step(values.fit(inputs, info.inputs), outputs=outputs)
        except InvalidInputError as error:
            raise InvalidInputError(values.as_json_hint(error.message, inputs), reason=error.reason) from None
    arrays = named_outputs(result, info)
    if as_json:
        render.print_json(step_json(session, arrays))
    else:
        print_outputs(session, arrays)


def check_options(
    model: str | None, open_model: str | None, batch_size: int | None, max_idle_s: float | None
) -> None:
    """Refuse options that contradict each other."""
    if max_idle_s is not None and open_model is None:
        raise click.UsageError("--max-idle-s must be given with --open; an existing session keeps its own")
    if batch_size is not None and open_model is None:
        raise click.UsageError("--batch-size must be given with --open; an existing session keeps its own")
    if None not in (model, open_model) and model != open_model:
        raise click.UsageError(f"--model and --open must name the same model; got {model} and {open_model}")


def named_outputs(result: Any, info: ModelInfo) -> Mapping[str, NDArray[Any]]:
    """The outputs by name, also if the SDK returns a single array or none."""
    if result is None:
        return {}
    return result if isinstance(result, Mapping) else {info.outputs[0].name: result}


def print_outputs(session: Session, outputs: Mapping[str, NDArray[Any]]) -> None:
    """Print the outputs for people."""
    for name, array in outputs.items():
        click.echo(f"{name} {array.dtype} {render.array_shape(array)}")
        click.echo(render.array_text(array))
    click.echo(f"revision {session.revision}, position {session.position}")


def step_json(session: Session, outputs: Mapping[str, NDArray[Any]]) -> dict[str, object]:
    """The result of a step as JSON."""
    return {
        "session_id": session.id,
        "model": session.model,
        "revision": session.revision,
        "position": session.position,
        "outputs": {name: render.array_json(array) for name, array in outputs.items()},
    }
