"""Commands whose code is read when one is called, not before: a list of commands, and each command, starts the sooner."""

from __future__ import annotations

import importlib
from typing import Any

import click


class Lazy(click.Command):
    """Stands for a command in lists of commands, and becomes it when it is called.

    Args:
        name: The command; the module has it under this name, with `_` for `-`.
        short_help: What lists of commands say, as the command itself does.
        module: The module that has it.
    """

    def __init__(self, name: str, short_help: str, module: str) -> None:
        super().__init__(name, short_help=short_help)
        self.module = module

    def load(self) -> click.Command:
        """The command itself."""
        name = str(self.name).replace("-", "_")
        command: click.Command = getattr(importlib.import_module(self.module), name)
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse its arguments: the context is that of the command itself, which is what runs."""
        return self.load().make_context(info_name, args, parent, **extra)
