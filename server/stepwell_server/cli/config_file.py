"""The config file: TOML whose keys are the names of the options, without the dashes before them, and `models`.

A path in it is relative to the file's folder. What has several values is a list, what has names is a table.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from stepwell.cli._types import Duration, Size, size_text
from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.cli.setting import FILE_KEY, Sourced
from stepwell_server.cli.values import AnyAddress, Named, PathOf, PerModel, Share, WholeNumber
from stepwell_server.settings import Settings

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def load(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Read the file that --config names: what is in it holds where neither command line nor a variable says otherwise."""
    if path is None or ctx.resilient_parsing:
        return
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise click.BadParameter(f"cannot read {path}: {error.strerror}", ctx, param) from None
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}", ctx, param) from None
    known = {parameter.key: parameter for parameter in ctx.command.params if isinstance(parameter, Sourced)}
    ctx.meta[FILE_KEY] = path
    ctx.default_map = {}
    for key, value in document.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
            raise click.UsageError(f"{path}: there is no setting {key!r}{hint}", ctx)
        try:
            ctx.default_map[str(known[key].name)] = _written(known[key], value, path.parent)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param_hint=f"'{key}' in {path}") from None


def _written(parameter: Sourced, value: object, folder: Path) -> str | list[str]:
    """A value of the file as the command line would have it.

    Raises:
        ValueError: it is of another kind.
    """
    of = parameter.type
    if isinstance(of, Named):
        if not isinstance(value, dict):
            raise ValueError(f"must be a table of names and values; got {value!r}")
        return [f"{name}={_text(of.of, item, folder)}" for name, item in value.items()]
    if isinstance(of, PerModel):
        if isinstance(value, dict):
            return [f"{name}={_text(of.of, item, folder)}" for name, item in value.items()]
        if not isinstance(value, list):
            return [_text(of.of, value, folder)]
    if parameter.multiple:
        if not isinstance(value, list):
            raise ValueError(f"must be a list; got {value!r}")
        return [_text(of, item, folder) for item in value]
    return _text(of, value, folder)


def _text(of: Any, value: object, folder: Path) -> str:
    if isinstance(of, click.types.BoolParamType):
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false; got {value!r}")
        return str(value)
    is_number = isinstance(of, click.IntRange | Duration | Share | Size | WholeNumber)
    if is_number and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"must be a {'number or ' if is_number else ''}string that is not empty; got {value!r}"
        )
    kind, _, path = value.partition(":")
    if isinstance(of, AnyAddress) and kind == "unix" and path and not path.startswith("/"):
        return f"unix:{folder.absolute() / path}"
    return str(folder.absolute() / value) if isinstance(of, PathOf) and not value.startswith("~") else value


def show(ctx: click.Context, settings: Settings) -> str:
    """The settings of a command as such a file, with comments that say where each value came from."""
    lines, tables = [], []
    for parameter in ctx.command.params:
        if not isinstance(parameter, Sourced):
            continue
        value = getattr(settings, str(parameter.name))
        comment = f"  # {_source(ctx, parameter)}"
        if isinstance(parameter.type, PerModel) and value.keys() == {""} and isinstance(value[""], int):
            lines.append(f"{parameter.key} = {value['']}{comment}")
        elif isinstance(parameter.type, PerModel) and value:
            texts = [f"{name}={item}" if name else str(item) for name, item in value.items()]
            lines.append(f"{parameter.key} = {_toml(parameter.type, texts)}{comment}")
        elif isinstance(value, Mapping) and (value or not isinstance(parameter, click.Option)):
            tables += ["", f"[{parameter.key}]{comment}"]
            tables += [f"{_key(name)} = {_toml(parameter.type, item)}" for name, item in value.items()]
        elif value is None or value == {}:
            lines.append(f"# {parameter.key} is not set")
        else:
            lines.append(f"{parameter.key} = {_toml(parameter.type, value)}{comment}")
    return "\n".join([*lines, *tables])


def _source(ctx: click.Context, parameter: Sourced) -> str:
    source = ctx.get_parameter_source(str(parameter.name))
    if source is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    if source is ParameterSource.DEFAULT_MAP:
        return str(ctx.meta[FILE_KEY])
    return "command line" if source is ParameterSource.COMMANDLINE else "default"


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _quoted(name)


def _toml(of: Any, value: object) -> str:
    if isinstance(of, Size) and isinstance(value, int):
        size = size_text(value)
        return size if size.isdecimal() else _quoted(size)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.15g}" if isinstance(value, float) else str(value)
    if isinstance(value, Path):
        return _quoted(str(value.absolute()))
    if isinstance(value, Sequence) and not isinstance(value, str | Address | UnixAddress):
        return f"[{', '.join(_quoted(str(item)) for item in value)}]"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """A basic string of TOML: what JSON escapes, and DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
