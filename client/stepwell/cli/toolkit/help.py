"""Commands whose help teaches: after the options come examples, JSON keys and exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

EXIT_CODES = (
    ("0", "done"),
    ("1", "the server rejected the call, could not be reached, or did not answer in time"),
    ("2", "the command line, or a file that it names, is invalid"),
    ("130", "interrupted by Ctrl-C"),
)
"""Exit codes that every command shares."""


class Command(click.Command):
    """A command whose help has examples, the keys of its JSON document and its exit codes.

    Args:
        examples: Command lines, shown unchanged.
        values: Pairs of a form of a value and its meaning.
        json_keys: Pairs of a key that `--json` prints and its meaning.
        exit_codes: Pairs of a code and its meaning.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str] = (),
        values: Sequence[tuple[str, str]] = (),
        json_keys: Sequence[tuple[str, str]] = (),
        exit_codes: Sequence[tuple[str, str]] = EXIT_CODES,
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)
        self.values = tuple(values)
        self.json_keys = tuple(json_keys)
        self.exit_codes = tuple(exit_codes)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples, values, JSON keys and exit codes after the options."""
        super().format_epilog(ctx, formatter)
        write_examples(formatter, self.examples)
        sections = (("Values", self.values), ("JSON", self.json_keys), ("Exit codes", self.exit_codes))
        for heading, pairs in sections:
            if pairs:
                with formatter.section(heading):
                    formatter.write_dl(pairs)


class Listing(Command, click.Group):
    """A command with subcommands, which also does something without one."""

    command_class = Command

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, invoke_without_command=True, **attributes)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names of the commands, in the order in which they were added."""
        return list(self.commands)

    def require_no_options(self, ctx: click.Context) -> None:
        """Refuse options before the name of a subcommand, where they would have no effect.

        Raises:
            click.UsageError: There are some.
        """
        for parameter in self.params:
            if ctx.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{parameter.opts[0]} must follow '{ctx.invoked_subcommand}'", ctx)


class Group(click.Group):
    """A group of such commands, listed in the order in which they were added.

    Args:
        examples: Command lines, shown unchanged.
    """

    command_class = Command

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names of the commands, in the order in which they were added."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples after the commands."""
        super().format_epilog(ctx, formatter)
        write_examples(formatter, self.examples)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write a section of command lines without wrapping them."""
    if not examples:
        return
    with formatter.section("Examples"):
        for line in examples:
            formatter.write(f"{' ' * formatter.current_indent}{line}\n")
