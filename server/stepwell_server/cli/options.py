"""Turns settings into options of a command, and formats of values into click's types."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from stepwell.cli.toolkit.types import ParamType
from stepwell_server.errors import StartError
from stepwell_server.settings import sources
from stepwell_server.settings.fields import Setting
from stepwell_server.settings.formats import FILE, FLAG, Format, Several, Table
from stepwell_server.settings.sources import Given

Function = TypeVar("Function", bound=Callable[..., Any])


class Written(ParamType):
    """A value in a format, for options that are not settings."""

    def __init__(self, form: Format) -> None:
        self.name = form.form
        self.form = form

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of a text. Other values are returned unchanged."""
        try:
            return self.form.read(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the completions of the format."""
        return _completed(self.form, ctx, param, incomplete)


def _completed(
    form: Format | Several, _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Leave paths to the shell, except after NAME=, where the shell may see NAME= as part of the path."""
    completes = form.of.completes if isinstance(form, Several) else form.completes
    if not isinstance(completes, str):
        return [CompletionItem(word) for word in completes if word.startswith(incomplete)]
    name, equals, begun = incomplete.partition("=")
    if not (isinstance(form, Table) and equals):
        return [CompletionItem(incomplete, type=completes)]
    found = sorted(glob.glob(f"{glob.escape(begun)}*"))
    return [CompletionItem(f"{name}={path}{'/' if os.path.isdir(path) else ''}") for path in found]


config_option = click.option(
    "--config",
    metavar="FILE",
    type=Written(FILE),
    envvar="STEPWELL_CONFIG",
    show_envvar=True,
    help="TOML file with settings: names of options without the leading dashes, and a table models.",
)


def setting_options(settings: Sequence[Setting], *, hidden: bool = False) -> Callable[[Function], Function]:
    """Add settings to a command as its options. One of them may be its argument.

    Args:
        settings: The settings.
        hidden: Whether to leave them out of the command's help.
    """

    def add(function: Function) -> Function:
        for setting in reversed(settings):
            function = _parameter(setting, hidden)(function)
        return function

    return add


def _parameter(setting: Setting, hidden: bool) -> Callable[[Function], Function]:
    form = setting.format
    complete = functools.partial(_completed, form)
    if setting.names.is_argument:
        return click.argument(setting.field, nargs=-1, metavar=setting.hint, shell_complete=complete)
    names = [setting.option, *filter(None, [setting.names.alias]), setting.field]
    kind: dict[str, Any] = {"metavar": form.form, "multiple": form.repeats, "shell_complete": complete}
    if form is FLAG:
        kind = {"is_flag": True}
        names[0] += f"/--no-{setting.name}" if setting.default else ""
    # `given` reads the variable, not click, because it checks overridden values too.
    return click.option(*names, default=None, hidden=hidden, help=setting.full_help, **kind)


def given(ctx: click.Context, settings: Sequence[Setting]) -> dict[str, Given]:
    """Return the settings from the command line, from variables, and from the config file of `config_option`.

    Raises:
        click.UsageError: a value cannot be read, a setting is unknown, or two settings exclude each other.
    """
    command_line = {each.field: texts for each in settings if (texts := _texts(ctx.params[each.field]))}
    try:
        return sources.read(settings, command_line, os.environ, ctx.params.get("config"))
    except StartError as error:
        raise click.UsageError(str(error), ctx) from None


def _texts(value: bool | str | tuple[str, ...] | None) -> list[str]:
    if value is None:
        return []
    return list(value) if isinstance(value, tuple) else [str(value)]
