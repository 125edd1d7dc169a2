"""`stepwell serve`: serve models until a signal says stop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import click

from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure
from stepwell.cli.toolkit.help import Command
from stepwell_server.cli.options import config_option, given, setting_options
from stepwell_server.errors import StartError
from stepwell_server.process.garbage_collection import collection_paused
from stepwell_server.settings import Settings, sources
from stepwell_server.settings.fields import settings_of
from stepwell_server.settings.sources import Given

SETTINGS = settings_of(Settings)


@click.command(
    cls=Command,
    short_help="Serve Keras models.",
    examples=(
        "stepwell serve forecast=model.keras",
        "stepwell serve forecast=a.keras words=b.keras --listen 127.0.0.1:50052",
        "stepwell serve forecast=forecast.stepwell",
        "stepwell serve --config stepwell.toml --drain-timeout-s 2m",
        "stepwell serve forecast=model.keras --import my_layers --metrics-listen 127.0.0.1:9100",
    ),
    exit_codes=(
        ("0", "stopped by SIGTERM or Ctrl-C, after finishing what was queued"),
        ("1", "stopped before it was ready, by a defect, or because the store is gone"),
        ("2", "it cannot start: the command line, a model, an address, or packages that are missing"),
    ),
)
@setting_options(SETTINGS)
@config_option
@click.option(
    "--show-config",
    is_flag=True,
    help="Print the settings as such a file, with where each came from, and start nothing.",
)
@click.pass_context
def serve(ctx: click.Context, /, show_config: bool, **_values: Any) -> None:
    """Serve recurrent Keras models, one state per session, over gRPC.

    NAME is what clients call a model. PATH is the file that Keras saved (.keras), or one that 'stepwell compile' made of
    it (.stepwell), which needs no TensorFlow. Give as many as you like. Each option has an environment variable, named
    in its help; STEPWELL_MODELS is that of the models. Several values
    in one variable have commas between them. The command line wins over a variable, a variable over the config file.

    A TIME is a number of seconds or has units, as in 500ms, 90s or 1h30m; a SIZE is a number of bytes or has one, as
    in 512MiB or 2GB.
    """
    try:
        found = given(ctx, SETTINGS)
        settings = settings_from(found)
        if show_config:
            click.echo(sources.show(settings, found))
            return
        settings.require_models()
        # gRPC would write lines of its own into the log, one for each handshake of TLS that fails
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        # numpy would start a thread for each core but one, and the server multiplies no matrices by it
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        with collection_paused():
            from stepwell_server import app
        ctx.exit(app.serve(settings))
    except StartError as error:
        raise Failure(str(error)) from None
    except KeyboardInterrupt:
        raise Failure("stopped before it was ready", SERVER_ERROR) from None


def settings_from(found: Mapping[str, Given]) -> Settings:
    """Return the settings of which some are given.

    Raises:
        StartError: they contradict each other.
    """
    return Settings(**{name: each.value for name, each in found.items()})
