"""Types of values on the command line: times and sizes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from stepwell._base.units import MAX_BYTES, parse_bytes, parse_seconds

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:  # generic since click 8.4
    ParamType = click.ParamType


class Duration(ParamType):
    """A time, as `parse_seconds` reads it. Becomes seconds, a float.

    Args:
        smallest: In seconds.
        largest: In seconds.
    """

    name = "time"

    def __init__(self, smallest: float = 0.0, largest: float = math.inf) -> None:
        self.smallest = smallest
        self.largest = largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read and check it."""
        try:
            return parse_seconds(str(value), self.smallest, self.largest)
        except ValueError as error:
            self.fail(f"must be {error}; got {value!r}", param, ctx)


class Size(ParamType):
    """A number of bytes, as `parse_bytes` reads it. Becomes an int.

    Args:
        smallest: In bytes.
        largest: In bytes.
    """

    name = "size"

    def __init__(self, smallest: int = 0, largest: int = MAX_BYTES) -> None:
        self.smallest = smallest
        self.largest = largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read and check it."""
        try:
            return parse_bytes(str(value), self.smallest, self.largest)
        except ValueError as error:
            self.fail(f"must be {error}; got {value!r}", param, ctx)
