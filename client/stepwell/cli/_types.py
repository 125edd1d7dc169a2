"""Types of values on the command line, in variables and in the config file: times and sizes."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:  # generic since click 8.4
    ParamType = click.ParamType

_NUMBER = r"(\d+(?:\.\d+)?)"
_TIME = re.compile("".join(f"(?:{_NUMBER}{unit})?" for unit in ("d", "h", "m", "s", "ms")))
_SECONDS = (86_400.0, 3_600.0, 60.0, 1.0, 0.001)
_SIZE = re.compile(rf"{_NUMBER} ?([kKMGT]i?)?B?")
_FACTORS = {"": 1} | {
    letter + mark: base**power
    for mark, base in (("", 1000), ("i", 1024))
    for letter, power in (("k", 1), ("K", 1), ("M", 2), ("G", 3), ("T", 4))
}


class Duration(ParamType):
    """A time: a number of seconds, or numbers with units, as in 500ms, 90s, 1h30m. Becomes seconds, a float.

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
        seconds = parse_seconds(str(value))
        if seconds is None:
            rule = "a number of seconds, or a time such as 500ms, 90s or 1h30m"
            self.fail(f"must be {rule}; got {value!r}", param, ctx)
        if not self.smallest <= seconds <= self.largest:
            most = "or more" if self.largest == math.inf else f"to {self.largest:.12g}"
            self.fail(f"must be a number of seconds, {self.smallest:.12g} {most}; got {value!r}", param, ctx)
        return seconds


def parse_seconds(text: str) -> float | None:
    """Seconds, if the text is a time; there is no endless one."""
    try:
        seconds = float(text)
    except ValueError:
        found = _TIME.fullmatch(text)
        if not text or found is None:
            return None
        seconds = sum(float(part) * unit for part, unit in zip(found.groups("0"), _SECONDS, strict=True))
    return seconds if math.isfinite(seconds) else None


class Size(ParamType):
    """A number of bytes, or one with a unit: 512MiB is 512 * 1024 ** 2, 2GB is 2 * 1000 ** 3. Becomes an int.

    Args:
        smallest: In bytes.
        largest: In bytes.
    """

    name = "size"

    def __init__(self, smallest: int = 0, largest: int = 2**63 - 1) -> None:
        self.smallest = smallest
        self.largest = largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read and check it."""
        found = _SIZE.fullmatch(str(value))
        if found is None:
            self.fail(
                f"must be a number of bytes, or a size such as 512MiB or 2GB; got {value!r}", param, ctx
            )
        size = Decimal(found[1]) * _FACTORS[found[2] or ""]
        if not self.smallest <= size <= self.largest or size != int(size):
            most = "or more" if self.largest == 2**63 - 1 else f"to {self.largest}"
            self.fail(f"must be a whole number of bytes, {self.smallest} {most}; got {value!r}", param, ctx)
        return int(size)


def size_text(size: int) -> str:
    """A size as one would write it: in the largest unit of which it is a whole number, if that is a short one."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        count, rest = divmod(size, _FACTORS[unit])
        if not rest and 0 < count < 10_000:
            return f"{count}{unit}B"
    return str(size)
