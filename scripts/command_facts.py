"""The commands of `stepwell` as lines of text, one fact a line, for `scripts/surface.py`. Help texts are left out.

stepwell serve: command
stepwell serve argument NAME=PATH...: required
stepwell serve --listen ADDRESS: default 127.0.0.1:50051, variable STEPWELL_LISTEN
stepwell serve: exit code 1
stepwell models: JSON key name
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from stepwell.cli import main
from stepwell.cli.toolkit.lazy import Lazy

DEFAULT = re.compile(r"\bDefault: (.+?)\.(?:\s|$)")
VARIABLE = re.compile(r"\[env var: (\w+)\]")


def lines() -> list[str]:
    """All lines, sorted."""
    return sorted(line for context in commands() for line in lines_of(context))


def commands() -> Iterator[click.Context]:
    """A context of each command, with the modules of all of them loaded."""
    contexts = [click.Context(main, info_name="stepwell", **main.context_settings)]
    while contexts:
        context = contexts.pop()
        yield context
        if isinstance(context.command, click.Group):
            for name, child in context.command.commands.items():
                command = child.load() if isinstance(child, Lazy) else child
                contexts.append(click.Context(command, info_name=name, parent=context))


def lines_of(context: click.Context) -> Iterator[str]:
    """The facts of a command."""
    command = context.command
    path = " ".join(each.info_name or "" for each in parents(context))
    yield f"{path}: {'group' if isinstance(command, click.Group) else 'command'}"
    for parameter in command.get_params(context):
        facts = ", ".join(facts_of(parameter)) or "no default"
        value = parameter.make_metavar(context)
        if isinstance(parameter, click.Option):
            names = ", ".join([*parameter.opts, *parameter.secondary_opts])
            yield f"{path} {names}{'' if is_flag(parameter) else f' {value}'}: {facts}"
        else:
            yield f"{path} argument {value}: {facts}"
    for code, _ in getattr(command, "exit_codes", ()):
        yield f"{path}: exit code {code}"
    for key, _ in getattr(command, "json_keys", ()):
        yield f"{path}: JSON key {key}"


def parents(context: click.Context | None) -> list[click.Context]:
    """The contexts of the commands that a command line names, up to this one."""
    return [] if context is None else [*parents(context.parent), context]


def is_flag(option: click.Option) -> bool:
    """Whether an option takes no value."""
    return option.is_flag or option.count


def facts_of(parameter: click.Parameter) -> Iterator[str]:
    """What else callers rely on."""
    text = getattr(parameter, "help", None) or ""
    if isinstance(parameter, click.Option) and is_flag(parameter):
        yield "flag"
    if parameter.required:
        yield "required"
    if parameter.multiple:
        yield "may be repeated"
    if default := DEFAULT.search(text):
        yield f"default {default[1]}"
    elif getattr(parameter, "show_default", None) and parameter.default is not None:
        yield f"default {parameter.default}"
    if variable := parameter.envvar or next(iter(VARIABLE.findall(text)), None):
        yield f"variable {variable}"
