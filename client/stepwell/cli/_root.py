"""The root command: it lists the other commands, and turns their errors into lines and exit codes."""

from __future__ import annotations

from typing import Any

import click

from stepwell.cli._of_server import OfServer
from stepwell.cli.toolkit import errors
from stepwell.cli.toolkit.help import Group
from stepwell.cli.toolkit.lazy import Lazy


class Root(Group):
    """A group that reports every expected error of its commands."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the command line up to the command's name."""
        errors.open_closed_streams()
        errors.accept_any_text()
        with errors.reported():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with errors.reported():
            return super().invoke(ctx)


def show_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Print the version of the installed distribution and exit."""
    if wanted and not ctx.resilient_parsing:
        from importlib import metadata

        try:
            click.echo(f"stepwell {metadata.version('stepwell')}")
        except metadata.PackageNotFoundError:
            raise errors.Failure("the version is not known: stepwell is not installed") from None
        ctx.exit()


@click.group(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    examples=(
        "stepwell serve forecast=model.keras",
        "stepwell models",
        "stepwell console --demo",
        "stepwell step user-42 --open forecast --input '[[0.1, 0.2, 0.3]]'",
        "stepwell state get user-42",
        "stepwell COMMAND --help",
    ),
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=show_version,
    help="Show the version.",
)
def main() -> None:
    """Serve recurrent models to many users at once, one state per session.

    A server keeps one state for every session and advances it step by step. Start a server with 'stepwell serve'. The
    other commands are its clients: they use --server, or the environment variable STEPWELL_SERVER, or
    127.0.0.1:50051.

    Errors are one line on stderr. Exit codes: 0 done, 1 the server rejected the call, could not be reached or did not
    answer in time, 2 the command line is invalid, 130 interrupted.
    """


for command in (
    OfServer("serve", "Serve recurrent models.", "serving"),
    OfServer("check", "Prove that a model can be stepped.", "checking"),
    OfServer("compile", "Compile a Keras model or an ONNX step function into one file.", "compiling"),
    OfServer("doctor", "Find problems of this machine and of a server's settings."),
    OfServer("store", "Check, back up, restore, encrypt and repair stores.", "looking at a store"),
    OfServer("tokens", "Add, list and revoke the tokens of callers."),
    Lazy("models", "Show the models of a server; load, unload and choose versions.", "stepwell.cli.models"),
    Lazy("sessions", "List, show, close, export and import sessions.", "stepwell.cli.sessions"),
    Lazy("step", "Advance a session by one time step or more.", "stepwell.cli.step"),
    Lazy("state", "Read and set the state of a session.", "stepwell.cli.state"),
    Lazy("top", "Show what a server does, live.", "stepwell.cli.top"),
    Lazy("console", "Watch sessions and their states in a browser.", "stepwell.cli.console"),
    Lazy("bench", "Load a server and measure steps/s and latencies.", "stepwell.cli.bench"),
    Lazy("envoy-config", "Write the configuration of an Envoy in front of replicas.", "stepwell.cli.envoy"),
    Lazy("completion", "Print a shell completion script.", "stepwell.cli.completion"),
):
    main.add_command(command)
