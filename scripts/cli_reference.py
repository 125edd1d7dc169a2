"""Write docs/reference/cli.md from what `--help` says, or check with `--check` that it is up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from stepwell.cli import main as root
from stepwell.cli.toolkit.lazy import Lazy

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "cli.md"
WIDTH = 100

INTRODUCTION = """\
# The command line

<!-- Made by scripts/cli_reference.py from --help; do not edit. -->

`stepwell` serves models and talks to a server. `python -m stepwell` is the same. This page is what
`--help` says.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if the page is out of date"
    )
    options = parser.parse_args(arguments)
    if not options.check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"docs/{PAGE.name} is out of date: run python scripts/cli_reference.py", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page."""
    context = click.Context(root, info_name="stepwell", **{**root.context_settings, "terminal_width": WIDTH})
    parts = [INTRODUCTION]
    for path, text in walk(root, context):
        heading = "#" * min(path.count(" ") + 2, 3)
        parts.append(f"{heading} {path}\n\n```text\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def walk(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Every command with its help, depth first."""
    yield context.command_path, command.get_help(context)
    if not isinstance(command, click.Group):
        return
    for name in command.list_commands(context):
        child = command.commands[name]
        if isinstance(child, Lazy):
            child = child.load()
        yield from walk(child, click.Context(child, info_name=name, parent=context, terminal_width=WIDTH))


if __name__ == "__main__":
    sys.exit(main())
