"""Commands of the server's package. They are entry points: the client's code never imports the server's."""

from __future__ import annotations

import re
from typing import Any

import click

from stepwell import _install
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.lazy import Lazy

INSTALL = {
    "serve": f"{_install.SERVER}, or for compiled models (.stepwell) only {_install.SERVE}, {_install.IN_A_CLONE}",
    "server": _install.advice(_install.SERVER),
}
"""How to install an extra. `server` has all of `serve`, and the compiler of models."""


COMMANDS, MODEL_FILES = "stepwell.commands", "stepwell.model_files"
"""Groups of entry points: commands by name, and what reads files of compiled models."""


def entry_point(group: str, name: str) -> Any:
    """Loads an entry point of the installed distribution.

    Raises:
        Failure: It has no such entry point.
    """
    from importlib import metadata

    # `metadata.entry_points` would read the files of every installed distribution at each start.
    for distribution in metadata.Distribution.discover(name="stepwell"):
        for found in distribution.entry_points.select(group=group, name=name):
            return found.load()
    raise Failure(
        f"the installed stepwell lacks {name!r} (an entry point of {group}): "
        f"install Stepwell again, {INSTALL['server']}"
    )


class OfServer(Lazy):
    """Stands for a command of the server's package, and explains what to install if it is missing.

    Args:
        name: The command; the server's package has an entry point of this name.
        short_help: Its line in lists of commands.
        doing: What it does, as "serving", if it needs packages of an extra.
        extra: The extra, `serve` or `server`.
    """

    def __init__(self, name: str, short_help: str, doing: str = "", extra: str = "serve") -> None:
        super().__init__(name, short_help, "")
        self.doing = doing
        self.extra = extra

    def load(self) -> click.Command:
        """Returns the command itself."""
        try:
            command: click.Command = entry_point(COMMANDS, str(self.name))
        except ModuleNotFoundError as error:
            raise self.lacking(str(error.name)) from None
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parses its arguments, and fails if packages that it needs are missing."""
        context = super().make_context(info_name, args, parent, **extra)
        missing = missing_packages(self.extra) if self.doing and not context.resilient_parsing else []
        if missing:
            raise self.lacking(*missing)
        return context

    def lacking(self, *packages: str) -> Failure:
        """The error for missing packages."""
        return Failure(
            f"{self.doing or self.name} needs packages that are not installed ({', '.join(packages)}): "
            f"{INSTALL[self.extra]}"
        )


def missing_packages(extra: str) -> list[str]:
    """Distributions of an extra that are not installed."""
    return [name for name in packages_of(extra) if not is_installed(name)]


def packages_of(extra: str) -> list[str]:
    """Distributions of an extra, from the installed metadata."""
    from importlib import metadata

    try:
        requirements = metadata.requires("stepwell") or []
    except metadata.PackageNotFoundError:
        return []
    extras = "serve|server" if extra == "server" else extra
    lines = [line for line in requirements if re.search(rf"extra\s*==\s*['\"](?:{extras})['\"]", line)]
    names = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in lines]
    return [name for name in dict.fromkeys(names) if name != "stepwell"]  # which names its own extras


def is_installed(name: str) -> bool:
    """Whether a distribution is installed."""
    from importlib import metadata

    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
