"""Times and sizes as people write them: 90s, 1h30m, 512MiB."""

from __future__ import annotations

import math
import re
from decimal import Decimal

MAX_BYTES = 2**63 - 1
_NUMBER = r"(\d+(?:\.\d+)?)"
_TIME = re.compile("".join(f"(?:{_NUMBER}{unit})?" for unit in ("d", "h", "m", "s", "ms")))
_SECONDS = (86_400.0, 3_600.0, 60.0, 1.0, 0.001)
_SIZE = re.compile(rf"{_NUMBER} ?([kKMGT]i?)?B?")
_FACTORS = {"": 1} | {
    letter + mark: base**power
    for mark, base in (("", 1000), ("i", 1024))
    for letter, power in (("k", 1), ("K", 1), ("M", 2), ("G", 3), ("T", 4))
}


def parse_seconds(text: str, smallest: float = 0.0, largest: float = math.inf) -> float:
    """Reads a time: a number of seconds, or numbers with units, such as 500ms, 90s or 1h30m.

    Args:
        text: The time.
        smallest: In seconds.
        largest: In seconds.

    Raises:
        ValueError: The text is not a time, or the time is out of range. The message is the rule, without "must be".
    """
    try:
        seconds = float(text)
    except ValueError:
        found = _TIME.fullmatch(text) if text else None
        parts = found.groups("0") if found else ("nan",) * len(_SECONDS)
        seconds = sum(float(part) * unit for part, unit in zip(parts, _SECONDS, strict=True))
    if not math.isfinite(seconds):
        raise ValueError("a number of seconds, or a time such as 500ms, 90s or 1h30m")
    if not smallest <= seconds <= largest:
        most = "or more" if largest == math.inf else f"to {largest:.12g}"
        raise ValueError(f"a number of seconds, {smallest:.12g} {most}")
    return seconds


def parse_bytes(text: str, smallest: int = 0, largest: int = MAX_BYTES) -> int:
    """Reads a size: a number of bytes, or one with a unit. 512MiB is 512 * 1024 ** 2, 2GB is 2 * 1000 ** 3.

    Args:
        text: The size.
        smallest: In bytes.
        largest: In bytes.

    Raises:
        ValueError: The text is not a size, or the size is out of range. The message is the rule, without "must be".
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError("a number of bytes, or a size such as 512MiB or 2GB")
    size = Decimal(found[1]) * _FACTORS[found[2] or ""]
    if not smallest <= size <= largest or size != int(size):
        most = "or more" if largest == MAX_BYTES else f"to {largest}"
        raise ValueError(f"a whole number of bytes, {smallest} {most}")
    return int(size)


def size_text(size: int) -> str:
    """Writes a size in the largest unit that gives a short whole number."""
    for unit in ("Ti", "Gi", "Mi", "Ki"):
        count, rest = divmod(size, _FACTORS[unit])
        if not rest and 0 < count < 10_000:
            return f"{count}{unit}B"
    return str(size)
