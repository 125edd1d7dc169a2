"""`stepwell serve`: serve models until a signal says stop."""

from __future__ import annotations

import os
from typing import Any

import click
from click.core import ParameterSource

from stepwell.cli._errors import SERVER_ERROR, Failure
from stepwell.cli._help import Command
from stepwell.cli._types import Duration, Size
from stepwell_server.cli import config_file
from stepwell_server.cli.setting import ModelsArgument, given, origin, setting
from stepwell_server.cli.values import (
    AddressOrOff,
    AnyAddress,
    DataFile,
    FunctionName,
    ModelName,
    ModuleName,
    Named,
    PathOf,
    PerModel,
    Policy,
    Share,
    Url,
    WholeNumber,
)
from stepwell_server.process.importing import without_collecting
from stepwell_server.settings import Settings, SettingsError
from stepwell_server.store.valkey.connection.url import StoreUrl, UrlError
from stepwell_server.store.valkey.connection.url import parse as parse_store_url

MAX_IDLE_S = 3650 * 86_400
"""The longest limit that a record takes (`core.idle.MAX_IDLE_MS`): a command must not load numpy to show its help."""

FILE, FOLDER = PathOf("file"), PathOf("dir")
ROWS = COUNT = click.IntRange(1, 10**18)
THREADS = click.IntRange(1, 4096)
MOST_OF_GRPC = 2**31 - 1
"""Of bytes in a message of protobuf, and of what gRPC's options can say."""
_WINS = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
"""Sources of a value; the first one has it."""


class Store(click.Choice):  # type: ignore[type-arg]  # of strings; click 8.1 knows no other
    """disk, memory, or the URL of a store that several servers share."""

    def __init__(self) -> None:
        super().__init__(["disk", "memory"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read it."""
        if isinstance(value, StoreUrl):
            return value
        if "://" in value:
            try:
                return parse_store_url(value)
            except UrlError as error:
                self.fail(str(error), param, ctx)
        if value not in self.choices:
            # meant to be a URL with a password, maybe
            got = "a text with '@'" if "@" in value else repr(value)
            self.fail(
                f"must be disk, memory, or the URL of a Valkey, valkey://HOST/0 say; got {got}", param, ctx
            )
        return super().convert(value, param, ctx)


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
@click.argument(
    "models",
    cls=ModelsArgument,
    nargs=-1,
    metavar="NAME=PATH...",
    envvar="STEPWELL_MODELS",
    type=Named("NAME=PATH", FILE, versions=True),
)
@setting(
    "--listen",
    metavar="ADDRESS",
    type=AnyAddress(),
    help="Address to serve gRPC on: HOST:PORT, where port 0 lets the system choose and the line on stdout says which; or "
    "unix:PATH, a socket for users of the server's account only.",
)
@setting(
    "--insecure-listen",
    is_flag=True,
    help="Listen beyond loopback also without TLS, also where whoever calls is served, and with metrics for everybody: say so "
    "where something else, such as a proxy, sees to who gets that far.",
)
@setting(
    "--tls-cert",
    metavar="FILE",
    type=FILE,
    help="Certificate of the server in PEM, followed by those between it and its CA: callers must speak TLS then. It is "
    "read again when it changes.",
)
@setting("--tls-key", metavar="FILE", type=FILE, help="Private key of --tls-cert in PEM, not encrypted.")
@setting(
    "--tls-client-ca",
    metavar="FILE",
    type=FILE,
    help="Certificates of CAs in PEM: callers must show a certificate that one of them has signed.",
)
@setting(
    "--auth-tokens",
    metavar="FILE",
    type=FILE,
    help="Callers by the tokens that they send, as 'stepwell tokens' writes them; nobody else is served then. It is read "
    "again when it changes, and so are the next two.",
)
@setting(
    "--auth-certificates",
    metavar="FILE",
    type=FILE,
    help="Callers by the certificates that they show, in TOML: tables [[caller]] with san, name, tenant and role. Needs "
    "--tls-client-ca.",
)
@setting(
    "--auth-jwks",
    metavar="FILE",
    type=FILE,
    help="Public keys, a JWKS, whose JWTs callers may send as tokens.",
)
@setting(
    "--auth-jwt-audience",
    metavar="TEXT",
    help="The audience (aud) that a JWT must be for. Needed with --auth-jwks.",
)
@setting(
    "--auth-jwt-issuer",
    metavar="TEXT",
    help="The issuer (iss) that a JWT must be from. Needed with --auth-jwks.",
)
@setting(
    "--auth-jwt-tenant-claim", metavar="NAME", help="The claim of a JWT that names the tenant of its caller."
)
@setting(
    "--auth-jwt-role-claim",
    metavar="NAME",
    help="The claim of a JWT that is the role of its caller, or a list with it: user, viewer or admin.",
)
@setting(
    "--max-connection-age-s",
    metavar="TIME",
    type=Duration(),
    help="Time, give or take a tenth, after which a connection takes no more calls and its client is to make a new one; 0 "
    "means never.",
)
@setting(
    "--max-connection-age-grace-s",
    metavar="TIME",
    type=Duration(),
    help="Time that calls of such a connection have to end before it is closed.",
)
@setting(
    "--front",
    type=click.Choice(["auto", "native", "python"]),
    help="What speaks to the network: native, the front in Rust; python, grpc.aio, which is slower; auto, native where it "
    "is installed.",
)
@setting(
    "--store",
    metavar="disk|memory|URL",
    type=Store(),
    help="Where sessions are kept: on disk under --data-dir; in memory, where they end with the server; or in a Valkey that "
    "several servers share, valkey://HOST[:PORT][,HOST[:PORT]...]/DB?..., valkeys:// over TLS: see docs/valkey.md. Needs "
    "the extra valkey.",
)
@setting(
    "--data-dir",
    metavar="DIR",
    type=FOLDER,
    help="Folder of the store on disk, for one server at a time. Default: stepwell in the user's data folder.",
)
@setting(
    "--durability",
    type=click.Choice(["sync", "async"]),
    help="What an acknowledged change survives: sync, the loss of power of the machine that keeps it; async, kill -9 of this "
    "server.",
)
@setting(
    "--encryption-key-file",
    metavar="FILE",
    type=FILE,
    help="Keys that encrypt states that are kept, of the file's owner alone: the first encrypts, all decrypt. 'stepwell store "
    "new-key' makes one.",
)
@setting(
    "--max-batch-rows",
    metavar="N",
    type=ROWS,
    help="Rows that run together at most, over all sessions of a pass.",
)
@setting(
    "--resident-rows",
    metavar="N|NAME=N",
    multiple=True,
    type=PerModel("N", WholeNumber()),
    help="Rows of state kept ready to step, of each model, or of the one that is named; sessions beyond are paged out until "
    "they are stepped. May be given again. Default: 65536, or as many as take the model's part of a quarter of the memory, "
    "which the models divide equally.",
)
@setting(
    "--max-session-idle-s",
    metavar="TIME",
    type=Duration(),
    help="Time after which an unused session expires, whatever limit it has of its own; 0 means never.",
)
@setting(
    "--unnamed-session-idle-s",
    metavar="TIME",
    type=Duration(largest=MAX_IDLE_S),
    help="Time after which an unused session expires that was opened without an id and without a limit of its own; 0 means "
    "never.",
)
@setting(
    "--quotas",
    metavar="FILE",
    type=FILE,
    help="TOML file of quotas of tenants and callers, read again when it changes: see docs/security.md. Default: none.",
)
@setting(
    "--metrics-tenants",
    metavar="N",
    type=COUNT,
    help="Tenants that have metrics of their own, with --quotas; the others share the label other.",
)
@setting(
    "--compute-threads",
    metavar="N",
    type=THREADS,
    help="Threads that run models. Default: as many as there are cores.",
)
@setting(
    "--metrics-listen",
    metavar="HOST:PORT|off",
    type=AddressOrOff(),
    help=(
        "Address to serve Prometheus metrics on, under /metrics; off: nowhere. Default: 127.0.0.1:9464, or nowhere if it is"
        " in use."
    ),
)
@setting(
    "--metrics-token-file",
    metavar="FILE",
    type=FILE,
    help="File that holds a token: whoever scrapes metrics must send it as 'Authorization: Bearer TOKEN'. Beyond loopback "
    "metrics need it.",
)
@setting(
    "--audit-log",
    metavar="FILE",
    type=FILE,
    help="File that gets a line of JSON for each session that is opened, closed, reset, forked, read, exported or imported, "
    "for each list and for each caller who is refused; - is standard error. SIGHUP opens it anew.",
)
@setting(
    "--audit-when-full",
    type=click.Choice(["drop", "refuse"]),
    help="What happens when the audit log is written too slowly: drop, lines are left out, counted and their number "
    "written later; refuse, calls that must have a line are refused until there is room.",
)
@setting(
    "--bad-models",
    type=click.Choice(["refuse", "skip"]),
    help="What a model that cannot be loaded does: refuse, the server does not start; skip, it serves the others, and log, "
    "/readyz and metrics say which one failed.",
)
@setting(
    "--models-dir",
    "--models",
    "models_dir",
    metavar="DIR",
    type=FOLDER,
    help="Folder of models: NAME/VERSION.keras, NAME/VERSION.stepwell, or NAME/VERSION/ with one such file.",
)
@setting(
    "--watch-models",
    is_flag=True,
    help="Look at the folder again and again: load versions that are put there, unload those that are taken away.",
)
@setting(
    "--version-policy",
    metavar="POLICY|NAME=POLICY",
    multiple=True,
    type=PerModel("POLICY", Policy()),
    help="Which versions in the folder are served: 'latest N', the N highest; all; or versions such as 3,5. For all names, or "
    "for one. May be given again. Default: latest 1.",
)
@setting(
    "--sessions",
    type=click.Choice(["keep", "carry", "migrate", "reset"]),
    help="What becomes of sessions that follow the default version of a name when the folder gives it another one: keep, they "
    "stay on theirs until they end; carry, they go on with their states; migrate, a --migration makes their new states; "
    "reset, they begin anew.",
)
@setting(
    "--migration",
    "migrations",
    metavar="NAME=MODULE:FUNCTION",
    multiple=True,
    type=Named("NAME=MODULE:FUNCTION", FunctionName()),
    help="Function that makes states for another version of a model, and the name by which a change of version asks for it. "
    "May be given again.",
)
@setting(
    "--wait-for-models/--no-wait-for-models",
    help="Whether the server is ready when all models are; or at once, and each model as soon as it is loaded: then one that "
    "cannot be loaded stops nothing. By default it waits.",
)
@setting(
    "--allow-model-upload",
    is_flag=True,
    help="Let admins send files of models to load them (stepwell models load --upload). Without it they name files on the "
    "server's disk.",
)
@setting(
    "--trace-endpoint",
    metavar="URL",
    type=Url(),
    help="Collector that gets traces by OTLP: http://HOST:4317 by gRPC, http://HOST:4318 by HTTP, https for TLS. Default: "
    "that of OTEL_EXPORTER_OTLP_ENDPOINT, or none. Needs the extra otel.",
)
@setting(
    "--trace-sample",
    metavar="RATIO",
    type=Share(),
    help="Share of calls to trace, from 0 to 1, where the caller does not say: what a caller traces is traced.",
)
@setting(
    "--import",
    "imports",
    metavar="MODULE",
    multiple=True,
    type=ModuleName(),
    help="Module to import before a model is loaded, for its own layers and functions. May be given again.",
)
@setting(
    "--probe-steps",
    metavar="NAME=N",
    multiple=True,
    type=Named("NAME=N", click.IntRange(1, 100_000)),
    help="Time steps over which a model is compared with Keras when it is compiled, if more than 512 and twice what its "
    "layers reach.",
)
@setting(
    "--trust-causality",
    metavar="NAME",
    multiple=True,
    type=ModelName(),
    help="Model to serve although its graph does not prove that it may be stepped. It is still compared with Keras. May "
    "be given again.",
)
@setting(
    "--check-with",
    metavar="NAME=FILE.npy",
    multiple=True,
    type=Named("NAME=FILE.npy", DataFile("file")),
    help="Sequences of your own, (batch, T, features), or an .npz of them by the names of the inputs: the start is "
    "refused if stepping the model through them differs from Keras.",
)
@setting(
    "--cache-dir",
    metavar="DIR",
    type=FOLDER,
    help="Folder for compiled models. Default: stepwell in the user's cache folder.",
)
@setting(
    "--max-model-bytes",
    metavar="SIZE",
    type=Size(1),
    help="What a model's file may hold when it is unpacked; a larger one is refused.",
)
@setting(
    "--max-compile-memory-bytes",
    metavar="SIZE",
    type=Size(1),
    help="Memory that compiling a model may take. Default: three quarters of what there is. Linux only.",
)
@setting(
    "--compile-timeout-s",
    metavar="TIME",
    type=Duration(),
    help="Time that compiling a model may take; 0 means as long as it takes.",
)
@setting(
    "--max-message-bytes",
    metavar="SIZE",
    type=Size(1024, MOST_OF_GRPC),
    help="Size of a request or reply at most.",
)
@setting(
    "--max-connections",
    metavar="N",
    type=COUNT,
    help="Connections at most; for more of them, idle ones are closed. Default: 16384, or as many as the limit of open "
    "files leaves room for. The native front only.",
)
@setting(
    "--max-connections-per-address",
    metavar="N",
    type=click.IntRange(0, MOST_OF_GRPC),
    help="Connections from one IP address at most; 0: no limit. All callers behind a proxy have one address. The native "
    "front only.",
)
@setting(
    "--max-calls-per-connection",
    metavar="N",
    type=click.IntRange(1, MOST_OF_GRPC),
    help="Calls that one connection may have under way; more of them wait at the client.",
)
@setting(
    "--max-held-bytes",
    metavar="SIZE",
    type=Size(1024),
    help="Bytes of requests and replies in memory, of all calls; beyond, calls are refused with a delay. Default: 256 "
    "MiB, or four times --max-message-bytes if that is more. The native front only.",
)
@setting(
    "--drain-timeout-s",
    metavar="TIME",
    type=Duration(),
    help="Time that a stopping server gives to work which is queued.",
)
@setting(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="debug: every request; info: every session.",
)
@setting(
    "--log-format",
    type=click.Choice(["text", "json"]),
    help="Lines of key=value, or one JSON object per line.",
)
@click.option(
    "--config",
    metavar="FILE",
    type=FILE,
    envvar="STEPWELL_CONFIG",
    show_envvar=True,
    is_eager=True,
    expose_value=False,
    callback=config_file.load,
    help="TOML file with settings: the names of the options without the dashes before them, and a table models.",
)
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
    in its help; STEPWELL_MODELS is that of the models. What may be given again has commas
    between the values there. The command line wins over a variable, a variable over the config file.

    A TIME is a number of seconds or has units, as in 500ms, 90s or 1h30m; a SIZE is a number of bytes or has one, as
    in 512MiB or 2GB.
    """
    try:
        settings = settings_of(ctx)
        if show_config:
            click.echo(config_file.show(ctx, settings))
            return
        settings.require_models()
    except SettingsError as error:
        raise Failure(str(error)) from None
    # gRPC would write lines of its own into the log, one for each handshake of TLS that fails
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # numpy would start a thread for each core but one, and the server multiplies no matrices by it
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with without_collecting():
        from stepwell_server import app

    try:
        ctx.exit(app.serve(settings))
    except app.StartError as error:
        raise Failure(str(error)) from None
    except KeyboardInterrupt:
        raise Failure("stopped before it was ready", SERVER_ERROR) from None


def settings_of(ctx: click.Context) -> Settings:
    """The settings that a command was given.

    Raises:
        SettingsError: they contradict each other.
    """
    values = given(ctx)
    if values.get("store", "disk") != "disk" and "data_dir" in values:
        leave_one(ctx, values)
    return Settings(**values)


def leave_one(ctx: click.Context, values: dict[str, Any]) -> None:
    """Of a data folder and another store than that on disk leave that which wins; nobody can mean both."""
    store, data_dir = (
        next(parameter for parameter in ctx.command.params if parameter.name == name)
        for name in ("store", "data_dir")
    )
    ranks = [
        _WINS.index(source) for p in (store, data_dir) if (source := ctx.get_parameter_source(str(p.name)))
    ]
    if ranks[0] == ranks[1]:
        raise SettingsError(
            f"{origin(ctx, data_dir)}: with {origin(ctx, store)} {values['store']} nothing is kept on disk; give one of the two"
        )
    loser = "data_dir" if ranks[0] < ranks[1] else "store"
    del values[loser]
    ctx.set_parameter_source(loser, ParameterSource.DEFAULT)
