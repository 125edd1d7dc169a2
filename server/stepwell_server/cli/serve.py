"""`stepwell serve`: serves models until a signal stops it."""

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
    short_help="Serve recurrent models.",
    examples=(
        "stepwell serve forecast=model.keras",
        "stepwell serve forecast=a.keras vad=b.onnx --listen 127.0.0.1:50052",
        "stepwell serve forecast=forecast.stepwell",
        "stepwell serve --config stepwell.toml --drain-timeout-s 2m",
        "stepwell serve forecast=model.keras --import my_layers --metrics-listen 127.0.0.1:9100",
    ),
    exit_codes=(
        ("0", "stopped by SIGTERM or Ctrl-C, after finishing queued work"),
        ("1", "stopped before it was ready, by a bug, or because the store was lost"),
        ("2", "cannot start: a wrong option, model or address, or missing packages"),
    ),
)
@setting_options(SETTINGS)
@config_option
@click.option(
    "--show-config",
    is_flag=True,
    help="Print the effective settings as a config file, with the source of each, and exit.",
)
@click.pass_context
def serve(ctx: click.Context, /, show_config: bool, **_values: Any) -> None:
    """Serve recurrent models over gRPC, with one state per session.

    NAME is the name of a model for clients. PATH is a file that Keras saved (.keras), a step function (.onnx) with a
    declaration next to it (model.toml), or a file from 'stepwell compile' (.stepwell), which needs no TensorFlow. You can give several models. Each option has an environment variable, shown in
    its help; that of the models is STEPWELL_MODELS. Separate several values in a variable by commas. The command line
    overrides variables, and variables override the config file.

    A TIME is a number of seconds, or has units as in 500ms, 90s or 1h30m. A SIZE is a number of bytes, or has a unit as
    in 512MiB or 2GB.
    """
    try:
        found = given(ctx, SETTINGS)
        settings = settings_from(found)
        if show_config:
            click.echo(sources.show(settings, found))
            return
        settings.require_models()
        # Otherwise gRPC writes its own lines into the log, one for each failed TLS handshake.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        # Otherwise numpy starts threads for matrix products, which the server does not compute with numpy.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        with collection_paused():
            from stepwell_server import app
        ctx.exit(app.serve(settings))
    except StartError as error:
        raise Failure(str(error)) from None
    except KeyboardInterrupt:
        raise Failure("stopped before it was ready", SERVER_ERROR) from None


def settings_from(found: Mapping[str, Given]) -> Settings:
    """Return the settings, with defaults for those that are not given.

    Raises:
        StartError: they contradict each other.
    """
    return Settings(**{name: each.value for name, each in found.items()})
