"""A parameter of a command whose value is that of the command line, else of a variable, else of the config file.

A value that cannot be read stops the command with a message that names where it stands, also where another wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from stepwell.cli._types import Size, size_text
from stepwell_server.cli.values import Collected
from stepwell_server.settings import Settings

Function = TypeVar("Function", bound=Callable[..., Any])

PREFIX = "STEPWELL_"
FILE_KEY = "stepwell_server.config_file"
"""In `Context.meta`: the path of the config file."""
_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(Settings) if field.init
}


class Sourced(click.Parameter):
    """A parameter that says where its value stands if it cannot be read."""

    def handle_parse_result(self, ctx: click.Context, opts: Any, args: list[str]) -> tuple[Any, list[str]]:
        """Read what others say who do not win as well."""
        if not ctx.resilient_parsing:
            for source, value in (
                (ParameterSource.DEFAULT_MAP, ctx.lookup_default(str(self.name))),
                (ParameterSource.ENVIRONMENT, self.value_from_envvar(ctx)),
            ):
                if value is not None:
                    ctx.set_parameter_source(str(self.name), source)
                    self.type_cast_value(ctx, value)
        return super().handle_parse_result(ctx, opts, args)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Make a dict of what has names."""
        found = super().type_cast_value(ctx, value)
        return self.type.collected(found, self, ctx) if isinstance(self.type, Collected) else found

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Where the value stands."""
        return origin(ctx, self) if ctx is not None else super().get_error_hint(ctx)

    @property
    def key(self) -> str:
        """Its name in the config file."""
        return self.opts[0].removeprefix("--")


class Setting(Sourced, click.Option):
    """An option with its variable. Where `Settings` has a default, the help tells it."""

    def __init__(self, declarations: Sequence[str], **attributes: Any) -> None:
        first, _, _ = declarations[0].partition("/")  # --this/--no-this
        variable = PREFIX + first.removeprefix("--").replace("-", "_").upper()
        super().__init__(declarations, envvar=variable, show_envvar=True, **attributes)
        default = _DEFAULTS[str(self.name)]
        if not isinstance(default, bool) and default not in (None, dataclasses.MISSING, ()):
            text = size_text(default) if isinstance(self.type, Size) else default
            self.help = (
                f"{self.help} Default: {text:g}."
                if isinstance(text, float)
                else f"{self.help} Default: {text}."
            )


class ModelsArgument(Sourced, click.Argument):
    """The models to serve."""


def setting(*declarations: str, **attributes: Any) -> Callable[[Function], Function]:
    """`click.option` for a `Setting`."""
    return click.option(*declarations, cls=Setting, **attributes)


def origin(ctx: click.Context, parameter: click.Parameter) -> str:
    """Where the value of a parameter stands, for people."""
    source = ctx.get_parameter_source(str(parameter.name))
    if source is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    if source is ParameterSource.DEFAULT_MAP and isinstance(parameter, Sourced):
        return f"'{parameter.key}' in {ctx.meta[FILE_KEY]}"
    return f"'{parameter.opts[0]}'" if isinstance(parameter, click.Option) else str(parameter.metavar)


def given(ctx: click.Context) -> dict[str, Any]:
    """The values of settings that stand somewhere."""
    names = (str(parameter.name) for parameter in ctx.command.params if isinstance(parameter, Sourced))
    return {
        name: ctx.params[name]
        for name in names
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
