"""Maps client certificates to callers, from a TOML file.

The file has tables `[[caller]]`: `san` is a name that the certificate must have, exactly or with `*` for the first label of
a DNS name; `name`, `tenant` (optional) and `role` describe the caller.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence

from stepwell_server.auth.tokens import caller_of
from stepwell_server.core.callers import Caller

_KEYS = {"san", "name", "tenant", "role"}
#: The part before the first dot must be one label, so that no email and no URI is taken for a DNS name.
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?")
_DOMAIN = re.compile(r"(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?){2,}")


class CertificateMap:
    """Callers by the names of their certificates."""

    def __init__(self, exact: dict[str, Caller], domains: dict[str, Caller]) -> None:
        self._exact = exact
        self._domains = domains
        """By the part after the `*`, in lower case."""

    def callers_of(self, names: Sequence[str]) -> set[Caller]:
        """Return the callers of a certificate. There are several if its names belong to several callers."""
        return {caller for name in names if (caller := self._caller_of(name)) is not None}

    def _caller_of(self, name: str) -> Caller | None:
        if (found := self._exact.get(name)) is not None or not self._domains:
            return found
        label, dot, domain = name.partition(".")
        return self._domains.get(dot + domain.lower()) if _LABEL.fullmatch(label) else None


def parse(text: str) -> CertificateMap:
    """Return the certificate map in a file.

    Raises:
        ValueError: the file is invalid. The message names the entry and the rule.
    """
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"must be TOML: {error}") from None
    entries = document.pop("caller", [])
    if document or not isinstance(entries, list):
        raise ValueError(f"must be tables [[caller]] and nothing else; got {', '.join(document) or 'caller'}")
    exact: dict[str, Caller] = {}
    domains: dict[str, Caller] = {}
    for number, entry in enumerate(entries, 1):
        try:
            san, caller = _entry(entry)
            of, key = (domains, san[1:].lower()) if san.startswith("*") else (exact, san)
            if key in of:
                raise ValueError(f"san must belong to one caller; an earlier entry has {san!r}")
        except ValueError as error:
            raise ValueError(f"[[caller]] {number}: {error}") from None
        of[key] = caller
    return CertificateMap(exact, domains)


def _entry(entry: object) -> tuple[str, Caller]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise ValueError("must be a table of strings")
    if not _KEYS - {"tenant"} <= entry.keys() <= _KEYS:
        raise ValueError(
            f"must have san, name, role and optionally tenant; got {', '.join(entry) or 'nothing'}"
        )
    san = entry["san"]
    if not san or ("*" in san and not (san[0] == "*" and _DOMAIN.fullmatch(san[1:]))):
        raise ValueError(
            f"san must be a name in the certificate, or * and a domain, such as *.workers.example; got {san!r}"
        )
    return san, caller_of(entry["name"], entry.get("tenant", ""), entry["role"])
