"""Commands whose code is imported when they are called, so that each command and their list start faster."""

from __future__ import annotations

import importlib
from typing import Any

import click


class Lazy(click.Command):
    """Stands for a command in lists of commands, and becomes that command when it is called.

    Args:
        name: Name of the command, and of its object in the module, with `_` for `-`.
        short_help: Its line in lists of commands, the same as the command's own.
        module: The module that has it.
    """

    def __init__(self, name: str, short_help: str, module: str) -> None:
        super().__init__(name, short_help=short_help)
        self.module = module

    def load(self) -> click.Command:
        """Returns the command itself."""
        name = str(self.name).replace("-", "_")
        command: click.Command = getattr(importlib.import_module(self.module), name)
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parses its arguments. The context is that of the command itself, which then runs."""
        return self.load().make_context(info_name, args, parent, **extra)
