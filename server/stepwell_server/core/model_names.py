"""Names, versions and labels of models, and the rules for them."""

from __future__ import annotations

import dataclasses
import re

NAME_RULE = "a name of 1 to 128 letters, digits, _, - or ."
MAX_VERSION = 2**63 - 1
VERSION_RULE = f"a whole number from 1 to {MAX_VERSION} without leading zeros"
LABEL_RULE = "1 to 64 letters, digits, _, - or ., not digits alone"
REFERENCE_RULE = "NAME, NAME@VERSION or NAME:LABEL"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_VERSION = re.compile(r"[1-9][0-9]{0,18}")
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAX_SHOWN = 160
"""A message shows at most this many characters of an invalid value."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelRef:
    """A reference to a model: a version, a label, or neither, which means the default version."""

    name: str
    version: int | None = None
    label: str | None = None

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}@{self.version}"
        return self.name if self.label is None else f"{self.name}:{self.label}"


def parse_reference(text: str) -> ModelRef:
    """Read `NAME`, `NAME@VERSION` or `NAME:LABEL`.

    Raises:
        ValueError: it is not a reference. The message continues the name of an argument: "must be ...; got ...".
    """
    name, mark, rest = _split(text)
    if not is_name(name):
        raise ValueError(f"must be {REFERENCE_RULE}, with {NAME_RULE}; got {_shown(text)}")
    if not mark:
        return ModelRef(name)
    if mark == "@":
        version = version_of(rest)
        if version is None:
            raise ValueError(f"must be {REFERENCE_RULE}, with VERSION {VERSION_RULE}; got {_shown(text)}")
        return ModelRef(name, version=version)
    if not is_label(rest):
        raise ValueError(f"must be {REFERENCE_RULE}, with LABEL {LABEL_RULE}; got {_shown(text)}")
    return ModelRef(name, label=rest)


def is_name(text: str) -> bool:
    """Whether a model can have this name."""
    return _NAME.fullmatch(text) is not None


def is_label(text: str) -> bool:
    """Whether a version can have this label. Digits alone cannot be one, so that no label looks like a version."""
    return _LABEL.fullmatch(text) is not None and not text.isdecimal()


def is_version(number: int) -> bool:
    """Whether a version can have this number."""
    return 1 <= number <= MAX_VERSION


def version_of(text: str) -> int | None:
    """Parse a version number; None if the text is not one."""
    if not _VERSION.fullmatch(text):
        return None
    number = int(text)
    return number if is_version(number) else None


def _split(text: str) -> tuple[str, str, str]:
    at = next((place for place, character in enumerate(text) if character in "@:"), len(text))
    return text[:at], text[at : at + 1], text[at + 1 :]


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
