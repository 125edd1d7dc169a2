"""The commands of `stepwell` for sphinx-click, which takes help texts for reStructuredText.

`root` is the command line with all its modules loaded, its texts escaped, and what follows the options in a help
text, such as examples and exit codes, as an epilog.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
from command_facts import commands

from stepwell.cli import main

MARKUP = re.compile(r"([\\`*_|<>])")
#: What becomes code: options, 'commands', variables, addresses.
CODE = re.compile(r"(?<![\w-])(--?[a-z][\w-]*)|(?<!\w)'([^' ][^']*)'(?!\w)|\b(STEPWELL_\w+)")
#: What may not follow code: an escaped space, which is not shown, stands between them.
AFTER = re.compile(r"[^\s.,:;)\]/?!]")
IN_HELP = re.compile(r"\s*\[env var: (\w+)\]")


def rest(text: str) -> str:
    """A text of the command line as reStructuredText."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts.append(MARKUP.sub(r"\\\1", text[end : found.start()]))
        code = " ".join((found[1] or found[2] or found[3]).split())
        end = found.end()
        parts.append(f"``{code}``" + "\\ " * bool(AFTER.match(text, end)))
    return "".join([*parts, MARKUP.sub(r"\\\1", text[end:])])


def epilog(command: click.Command) -> Iterator[str]:
    """Examples, values, JSON keys and exit codes."""
    if examples := getattr(command, "examples", ()):
        yield from (".. rubric:: Examples", "", ".. code-block:: sh", "")
        yield from (f"   {line}" for line in examples)
        yield ""
    for heading, name in (("Values", "values"), ("JSON", "json_keys"), ("Exit codes", "exit_codes")):
        if pairs := getattr(command, name, ()):
            yield from (f".. rubric:: {heading}", "")
            yield from (f"``{key}``\n   {rest(text)}\n" for key, text in pairs)


def loaded() -> click.Group:
    """The command line, ready for sphinx-click."""
    for context in list(commands()):
        command = context.command
        if context.parent is not None and isinstance(context.parent.command, click.Group):
            context.parent.command.commands[str(context.info_name)] = command
        command.help = rest(command.help or "")
        command.epilog = "\n".join(epilog(command))
        for option in command.params:
            if isinstance(option, click.Option):
                simplify(option)
    return main


def simplify(option: click.Option) -> None:
    """Put default, variable and choices of an option into sentences: sphinx-click would give each a list."""
    text = rest(IN_HELP.sub(r" Variable: \1.", option.help or ""))
    if option.show_default and option.default is not None:
        text += f" Default: ``{option.default}``."
    if option.envvar is not None:
        text += f" Variable: ``{option.envvar}``."
    if isinstance(option.type, click.Choice) and not option.metavar:
        option.metavar, option.type = "|".join(map(str, option.type.choices)), click.STRING
    option.help, option.show_default, option.envvar = text, False, None


root = loaded()
