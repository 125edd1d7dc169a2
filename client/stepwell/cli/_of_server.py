"""Commands that the server's package has: its code is found by name and read when one is called, not before."""

from __future__ import annotations

import importlib
import re
from importlib import metadata
from typing import Any

import click

from stepwell.cli._errors import Failure

INSTALL = "pip install 'stepwell[server]'"


class OfServer(click.Command):
    """Stands for a command of the server's package in lists of commands, and becomes it when it is called.

    Args:
        name: The command, and the module of `stepwell_server.cli` that has it.
        short_help: What lists of commands say.
        doing: What it does, as "serving", if it needs the packages of the `server` extra.
    """

    def __init__(self, name: str, short_help: str, doing: str = "") -> None:
        super().__init__(name, short_help=short_help)
        self.doing = doing

    def load(self) -> click.Command:
        """The command itself."""
        try:
            # By name, so that the client's code nowhere imports the server's.
            module = importlib.import_module(f"stepwell_server.cli.{self.name}")
        except ModuleNotFoundError as error:
            raise self.lacking(str(error.name)) from None
        command = getattr(module, str(self.name))
        assert isinstance(command, click.Command)
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse its arguments; without the packages that it needs it goes no further."""
        context = self.load().make_context(info_name, args, parent, **extra)
        missing = missing_packages() if self.doing and not context.resilient_parsing else []
        if missing:
            raise self.lacking(*missing)
        return context

    def lacking(self, *packages: str) -> Failure:
        """What to say if packages are missing."""
        return Failure(
            f"{self.doing or self.name} needs packages that are not installed ({', '.join(packages)}): {INSTALL}"
        )


def missing_packages() -> list[str]:
    """Distributions that the `server` extra asks for and that are not installed."""
    return [name for name in server_packages() if not is_installed(name)]


def server_packages() -> list[str]:
    """Distributions that the `server` extra asks for on this platform, as the installed metadata has them."""
    try:
        requirements = metadata.requires("stepwell") or []
    except metadata.PackageNotFoundError:
        return []
    extra = [line for line in requirements if re.search(r"extra\s*==\s*['\"]server['\"]", line)]
    everywhere = [line for line in extra if "sys_platform" not in line]
    return [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in everywhere]


def is_installed(name: str) -> bool:
    """Whether a distribution is installed."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
