"""Reads settings. The command line overrides environment variables, which override the config file, then the defaults.

The config file is TOML. Its keys are the names of the options without the dashes, and `models`. A path in it is relative
to the file's folder. A setting with several values is a list, one with names is a table.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepwell_server.errors import StartError
from stepwell_server.settings.fields import Setting, settings_of
from stepwell_server.settings.formats import key


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """A value and where it was given."""

    value: Any
    origin: str
    """Place of the value, as messages name it."""
    source: str
    """Place of the value, as --show-config names it."""
    rank: int
    """The value with the higher rank wins."""


def read(
    settings: Sequence[Setting],
    command_line: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    file: Path | None = None,
) -> dict[str, Given]:
    """Return the given settings by the names of their fields. Overridden values are checked too.

    Args:
        settings: All settings.
        command_line: Texts of the given options, by the names of the fields.
        environment: The environment variables. An empty one counts as not given.
        file: The config file.

    Raises:
        StartError: the file or a value cannot be read, or the file has an unknown setting.
    """
    written = {} if file is None else _read_file(settings, file)
    found: dict[str, Given] = {}
    for each in settings:
        variable = environment.get(each.variable)
        sources = (
            (f"'{each.name}' in {file}", str(file), written.get(each.field)),
            (each.variable, each.variable, each.format.split(variable) if variable else None),
            (each.hint, "command line", command_line.get(each.field)),
        )
        for rank, (origin, source, texts) in enumerate(sources):
            if texts is not None:
                try:
                    found[each.field] = Given(each.format.read_all(texts), origin, source, rank)
                except ValueError as error:
                    raise StartError(f"Invalid value for {origin}: {error}") from None
    _leave_one_store(found)
    return found


def _read_file(settings: Sequence[Setting], file: Path) -> dict[str, list[str]]:
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise StartError(f"Invalid value for '--config': cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StartError(f"Invalid value for '--config': {file} is not TOML: {error}") from None
    known = {each.name: each for each in settings}
    texts = {}
    for name, value in document.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the settings are {', '.join(known)}"
            raise StartError(f"{file}: there is no setting {name!r}{hint}")
        try:
            texts[known[name].field] = known[name].format.texts(value, file.parent)
        except ValueError as error:
            raise StartError(f"Invalid value for '{name}' in {file}: {error}") from None
    return texts


def _leave_one_store(found: dict[str, Given]) -> None:
    """Drop the lower-ranked of --data-dir and a --store that is not on disk, which exclude each other."""
    store, data_dir = found.get("store"), found.get("data_dir")
    if store is None or data_dir is None or store.value == "disk":
        return
    if store.rank == data_dir.rank:
        raise StartError(
            f"{data_dir.origin}: cannot be used with {store.origin} {store.value}, which keeps nothing on disk; give only one"
            " of the two"
        )
    del found["data_dir" if store.rank > data_dir.rank else "store"]


def show(settings: object, found: Mapping[str, Given]) -> str:
    """Return settings as a config file, with the source of each value as a comment.

    Args:
        settings: The settings.
        found: The values that were given.
    """
    lines, tables = [], []
    for each in settings_of(type(settings)):
        value = getattr(settings, each.field)
        given = found.get(each.field)
        comment = f"  # {given.source if given else 'default'}"
        if value is None or value == {}:
            lines.append(f"# {each.name} is not set")
        elif isinstance(value, Mapping) and "" not in value:
            tables += ["", f"[{key(each.name)}]{comment}", each.format.toml(value)]
        else:
            lines.append(f"{each.name} = {each.format.toml(value)}{comment}")
    return "\n".join([*lines, *tables])
