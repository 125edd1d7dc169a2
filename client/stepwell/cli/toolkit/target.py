"""--server, --timeout-s and the TLS options, which every command but serve takes, and the connection they make."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stepwell.cli.toolkit.render import working
from stepwell.cli.toolkit.types import Duration

if TYPE_CHECKING:
    from stepwell import Client, TlsConfig
    from stepwell.config import ClientConfig

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
"""Shorter than the SDK's, because somebody is waiting."""
TLS_OPTIONS = {
    "ca": ("FILE", "STEPWELL_CLIENT_TLS_CA", "CAs to trust, in PEM. Default: those of the system."),
    "cert": (
        "FILE",
        "STEPWELL_CLIENT_TLS_CERT",
        "Certificate of this client in PEM, for servers that require one.",
    ),
    "key": ("FILE", "STEPWELL_CLIENT_TLS_KEY", "Private key of --tls-cert in PEM, not encrypted."),
    "server_name": (
        "NAME",
        "STEPWELL_CLIENT_TLS_SERVER_NAME",
        "Name that the server's certificate must have. Default: the host of --server.",
    ),
}
"""TLS options by argument of `TlsConfig`. Variables without CLIENT are those of a server on the same machine."""


@dataclass(frozen=True)
class Target:
    """The server that a command talks to."""

    address: str
    """HOST:PORT or unix:PATH; those of replicas are separated by commas."""
    timeout_s: float
    """Time limit of one request, including retries."""
    tls: Mapping[str, str] | None = None
    """Arguments of `TlsConfig`; None: no TLS."""
    token_file: str | None = None
    """The file with the token; None: the variable STEPWELL_TOKEN, if it is set."""
    tenant: str | None = None
    """The tenant to act in, for admins."""
    allow_insecure_token: bool = False

    @classmethod
    def of(cls, options: dict[str, Any]) -> Target:
        """Takes the options of `server_options` out of `options`, and returns the server that they name."""
        given = {name: options.pop(f"tls_{name}") for name in TLS_OPTIONS}
        arguments = {name: value for name, value in given.items() if value}
        uses_tls = options.pop("tls") or arguments
        return cls(
            options.pop("server"),
            options.pop("timeout_s"),
            arguments if uses_tls else None,
            **{name: options.pop(name) for name in ("token_file", "tenant", "allow_insecure_token")},
        )

    def config(self, **others: Any) -> ClientConfig:
        """The configuration of a client. Reads the files.

        Raises:
            click.UsageError: One cannot be used, or the token must not be sent.
        """
        from stepwell import config, errors

        tls = self.tls_config()
        try:
            return config.ClientConfig(
                config.server_address(self.address),
                self.timeout_s,
                tls=tls,
                token=config.token_or_variable(
                    None if self.token_file is None else TokenFile(self.token_file)
                ),
                allow_insecure_token=self.allow_insecure_token,
                tenant=self.tenant,
                **others,
            )
        except errors.InvalidInputError as error:
            raise click.UsageError(as_options(error.message)) from None

    def tls_config(self) -> TlsConfig | None:
        """The TLS settings. Reads the files.

        Raises:
            click.UsageError: One cannot be used.
        """
        from stepwell import config, errors

        try:
            return None if self.tls is None else config.TlsConfig(**self.tls)
        except errors.InvalidInputError as error:
            raise click.UsageError(as_options(error.message)) from None

    @contextlib.contextmanager
    def connect(self, doing: str, *, prints: bool = False) -> Iterator[Client]:
        """Yields a client for the body of a `with`, and shows meanwhile what the command does and where.

        Args:
            doing: What the body does, as "Reading".
            prints: Whether the body prints by itself.
        """
        # gRPC would print lines of its own about a failed connection
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import stepwell

        config = self.config()
        try:
            with (
                contextlib.nullcontext() if prints else working(f"{doing} at {self.address}"),
                stepwell.Client(config) as client,
            ):
                yield client
        except stepwell.UnavailableError as error:
            text = self._where(as_options(error.message))
            raise stepwell.UnavailableError(text, outcome=error.outcome, reason=error.reason) from None

    def _where(self, message: str) -> str:
        """The message about a server that is not available, with the option that names it."""
        address = re.sub("^grpcs?://", "", self.address)
        if f" at {address}" in message:
            return message.replace(f" at {address}", f" at {address} (--server)", 1)
        return f"the server at {self.address} (--server) is not available: {message}"


class TokenFile:
    """Reads the token from a file whenever one is needed, so that the file may change.

    Raises:
        click.UsageError: It cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self()

    def __call__(self) -> str:
        """Read the token."""
        try:
            return pathlib.Path(self._path).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise click.UsageError(f"--token-file: cannot read {self._path}: {reason}") from None


def as_options(message: str) -> str:
    """Rewrites a message of the SDK so that it names options instead of arguments."""
    message = re.sub(r"TlsConfig\.(\w+)", lambda found: "--tls-" + found[1].replace("_", "-"), message)
    for argument, option in _OPTIONS.items():
        message = message.replace(argument, option)
    return message


_OPTIONS = {
    "allow_insecure_token=True": "--allow-insecure-token",
    "use tls": "use --tls",
    "a TlsConfig": "--tls or another TLS option",
    "connect_timeout_s": "STEPWELL_CONNECT_TIMEOUT_S",
    "(timeout_s)": "(--timeout-s)",
}


def server_options(function: Function) -> Function:
    """Add --server, --timeout-s and the TLS options to a command; its function gets them as `target`."""

    @functools.wraps(function)
    def with_target(*args: Any, **options: Any) -> Any:
        return function(*args, target=Target.of(options), **options)

    added = [
        click.option(
            "--server",
            metavar="ADDRESS",
            envvar="STEPWELL_SERVER",
            default=DEFAULT_SERVER,
            show_default=True,
            show_envvar=True,
            callback=check_address,
            help="Address of the server, HOST:PORT or unix:PATH. Several, separated by commas, are replicas that share a store.",
        ),
        click.option(
            "--timeout-s",
            metavar="TIME",
            type=Duration(),
            default=DEFAULT_TIMEOUT_S,
            show_default=f"{DEFAULT_TIMEOUT_S:g}; to load a model 600",
            callback=check_timeout,
            help="Time limit of one request, including retries.",
        ),
        click.option(
            "--tls",
            is_flag=True,
            envvar="STEPWELL_CLIENT_TLS",
            show_envvar=True,
            help="Use TLS. Any other --tls option implies it.",
        ),
        click.option(
            "--token-file",
            metavar="FILE",
            type=click.Path(),
            envvar="STEPWELL_TOKEN_FILE",
            show_envvar=True,
            help="File with the token to send, for servers that authenticate callers. Default: the variable STEPWELL_TOKEN.",
        ),
        click.option(
            "--allow-insecure-token",
            is_flag=True,
            help="Send the token to another machine even without TLS.",
        ),
        click.option(
            "--tenant",
            metavar="NAME",
            envvar="STEPWELL_TENANT",
            show_envvar=True,
            help="The tenant to act in, for admins. Default: the caller's own.",
        ),
        *(
            click.option(
                f"--tls-{name.replace('_', '-')}",
                metavar=metavar,
                type=click.Path() if metavar == "FILE" else str,
                envvar=variable,
                show_envvar=True,
                help=text,
            )
            for name, (metavar, variable, text) in TLS_OPTIONS.items()
        ),
    ]
    for option in reversed(added):
        option(with_target)
    return with_target  # type: ignore[return-value]


def check_address(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse an invalid address, naming the option or the variable."""
    from stepwell import config, errors

    try:
        return config.server_address(value)
    except errors.InvalidInputError as error:
        raise click.BadParameter(error.message, ctx, param) from None


def check_timeout(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuse an invalid time limit, naming the option."""
    from stepwell import config, errors

    try:
        return config.check_timeout("it", value)
    except errors.InvalidInputError as error:
        raise click.BadParameter(error.message, ctx, param) from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON document, for programs.")
