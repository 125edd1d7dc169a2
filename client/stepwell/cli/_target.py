"""--server and --timeout-s, which every command but serve takes, and the connection they make."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stepwell.cli._render import working

if TYPE_CHECKING:
    from stepwell import Client

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_SERVER = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
"""Shorter than the SDK's: someone is waiting."""


@dataclass(frozen=True)
class Target:
    """The server that a command talks to."""

    address: str
    """HOST:PORT."""
    timeout_s: float
    """Longest time that one request may take, retries included."""

    @contextlib.contextmanager
    def connect(self, doing: str) -> Iterator[Client]:
        """A client for the body of a `with`, while people see what is being done and where.

        Args:
            doing: What the body does, as "Reading".
        """
        import stepwell

        try:
            with (
                working(f"{doing} at {self.address}"),
                stepwell.connect(self.address, timeout_s=self.timeout_s) as client,
            ):
                yield client
        except stepwell.UnavailableError as error:
            text = f"the server at {self.address} (--server) is not available: {error.message}"
            raise stepwell.UnavailableError(text, outcome=error.outcome, reason=error.reason) from None


def server_options(function: Function) -> Function:
    """Add --server and --timeout-s to a command; its function gets them as `target`."""

    @click.option(
        "--server",
        metavar="ADDRESS",
        envvar="STEPWELL_SERVER",
        default=DEFAULT_SERVER,
        show_default=True,
        show_envvar=True,
        callback=check_address,
        help="The server, HOST:PORT.",
    )
    @click.option(
        "--timeout-s",
        metavar="SECONDS",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        callback=check_timeout,
        help="Longest time that one request may take, retries included.",
    )
    @functools.wraps(function)
    def with_target(*args: Any, server: str, timeout_s: float, **options: Any) -> Any:
        return function(*args, target=Target(server, timeout_s), **options)

    return with_target  # type: ignore[return-value]


def check_address(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Refuse what is no address, naming the option or the variable."""
    from stepwell import config, errors

    try:
        return config.server_address(value)
    except errors.InvalidInputError as error:
        raise click.BadParameter(error.message, ctx, param) from None


def check_timeout(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuse what is no time limit, naming the option."""
    from stepwell import config, errors

    try:
        return config.check_timeout("it", value)
    except errors.InvalidInputError as error:
        raise click.BadParameter(error.message, ctx, param) from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for programs.")
