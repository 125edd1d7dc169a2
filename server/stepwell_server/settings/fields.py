"""A setting is one field of a class, with its format, default and help. All its names derive from the field's name."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from stepwell_server.errors import StartError
from stepwell_server.settings.formats import FLAG, Format, Several, choice

PREFIX = "STEPWELL_"


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """Names of a setting that do not derive from the name of its field."""

    name: str = ""
    """Name to use instead of the field's."""
    alias: str = ""
    """Second name of the option."""
    is_argument: bool = False
    """On the command line it is an argument, not an option."""


@dataclasses.dataclass(frozen=True, slots=True)
class Needs:
    """A setting that another setting requires."""

    field: str
    """Field of the required setting."""
    why: str = ""
    """Explanation that follows its option in a message."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One setting: its names, format, default and meaning."""

    field: str
    """Name of the class's field."""
    name: str
    """Name in the config file."""
    format: Format | Several
    default: object
    """None: not set, or dependent on the machine, as the help explains."""
    help: str
    names: Names
    needs: tuple[Needs, ...]

    @property
    def option(self) -> str:
        """The option of the command line."""
        return f"--{self.name}"

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.name.replace("-", "_").upper()

    @property
    def hint(self) -> str:
        """Its name in messages about the command line."""
        return f"{self.format.form}..." if self.names.is_argument else f"'{self.option}'"

    @property
    def default_text(self) -> str:
        """The default as a user would write it. Empty for no default and for flags."""
        if self.default in (None, ()) or self.format is FLAG:
            return ""
        return self.format.toml(self.default).strip('"')

    @property
    def full_help(self) -> str:
        """The help, with the required settings, the default and the environment variable."""
        needs = "".join(f" Needs {_option(each.field)}." for each in self.needs)
        again = " May be given again." if self.format.repeats else ""
        default = f" Default: {self.default_text}." if self.default_text else ""
        return f"{self.help}{needs}{again}{default}  [env var: {self.variable}]"

    def check_needs(self, settings: object) -> None:
        """Check that the required settings are given too.

        Raises:
            StartError: one is missing.
        """
        value = getattr(settings, self.field)
        for each in self.needs:
            if value not in (self.default, {}) and not getattr(settings, each.field):
                raise StartError(f"{self.option}: must be given with {_option(each.field)}{each.why}")


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def settings_of(cls: type) -> tuple[Setting, ...]:
    """Return the settings of a dataclass, in its order.

    The annotation of a field has the type, the format, the help and perhaps `Names` and `Needs`: `Annotated[int, COUNT, "Threads."]`.
    A bool and a Literal need no format.
    """
    return tuple(map(_setting_of, dataclasses.fields(cls)))


def _setting_of(field: dataclasses.Field[Any]) -> Setting:
    annotation, *about = typing.get_args(field.type)
    names = next((item for item in about if isinstance(item, Names)), Names())
    default = None if field.default is dataclasses.MISSING else field.default
    return Setting(
        field.name,
        names.name or _option(field.name).removeprefix("--"),
        next((item for item in about if isinstance(item, Format | Several)), None) or _format_of(annotation),
        default,
        next(item for item in about if isinstance(item, str)),
        names,
        tuple(item for item in about if isinstance(item, Needs)),
    )


def _format_of(annotation: Any) -> Format:
    if annotation is bool:
        return FLAG
    assert typing.get_origin(annotation) is Literal
    return choice(*typing.get_args(annotation))
