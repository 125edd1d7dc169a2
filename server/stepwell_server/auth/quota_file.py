"""The file of quotas, which is read at the start and again after each change."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from stepwell_server.core.callers import is_name, is_subject
from stepwell_server.core.quotas import Limits, QuotaTable
from stepwell_server.errors import StartError
from stepwell_server.files.watched import WatchedFile
from stepwell_server.logs import Log

_log = Log("quotas")
#: Interval between two looks at the file, in seconds. Two looks must have seen a change.
LOOK_S = 0.25
#: Upper bound of any quota. More is a typing error, and does not fit counters.
_MAX_QUOTA = 10**15
_MAX_SHOWN = 40
_OF_TENANTS = tuple(field.name for field in dataclasses.fields(Limits))
_OF_CALLERS = ("sessions", "rows", "bytes", "steps_per_second", "burst", "bytes_in_flight")
#: Quotas that a shared store counts, over all servers and by tenant.
COUNTED_BY_TENANT = ("sessions", "rows", "bytes")
_TABLES = ("default", "tenants", "callers")


def parse(text: str, *, only_tenants: Collection[str] = ()) -> QuotaTable:
    """Return the quotas in a file. Quotas in `only_tenants` are refused for callers.

    Raises:
        ValueError: the file is not TOML, or breaks a rule. The message names the place and the rule.
    """
    try:
        found = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also of a number with thousands of digits
        raise ValueError(f"must be TOML: {error}") from None
    for name in found:
        if name not in _TABLES:
            raise ValueError(f"must have tables {', '.join(_TABLES)} only; got {name!r}")
    tables = {name: _table(f"[{name}]", found.get(name, {})) for name in _TABLES}
    for tenant in tables["tenants"]:
        if not is_name(tenant):
            raise ValueError(f"[tenants] must be named by names of tenants; got {tenant!r}")
    for caller in tables["callers"]:
        tenant, slash, name = caller.partition("/")
        if not is_name(tenant) or (slash and not is_subject(name)):
            raise ValueError(
                f'[callers] must be named "TENANT/NAME", or "NAME" for a caller without a tenant; got {caller!r}'
            )
        for quota in only_tenants if isinstance(tables["callers"][caller], dict) else ():
            if quota in tables["callers"][caller]:
                raise ValueError(
                    f'[callers."{caller}"] {quota} must be left out if servers share a store, which counts by tenant: limit'
                    " the tenant, or give the caller its own tenant"
                )
    return QuotaTable(
        _limits("[default]", tables["default"], _OF_TENANTS),
        {name: _limits(f"[tenants.{name}]", each, _OF_TENANTS) for name, each in tables["tenants"].items()},
        {name: _limits(f'[callers."{name}"]', each, _OF_CALLERS) for name, each in tables["callers"].items()},
    )


def _table(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a table; got {value!r}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _limits(where: str, value: object, allowed: tuple[str, ...]) -> Limits:
    given = _table(where, value)
    for name, number in given.items():
        if name not in allowed:
            raise ValueError(f"{where} must have {', '.join(allowed)} only; got {name!r}")
        kinds, lowest = (int,), 0
        if name == "steps_per_second":
            kinds, lowest = (int, float), 1  # type: ignore[assignment]
        elif name in {"burst", "bytes_in_flight"}:
            lowest = 1
        if not isinstance(number, kinds) or isinstance(number, bool) or not lowest <= number <= _MAX_QUOTA:
            kind = "number" if name == "steps_per_second" else "whole number"
            raise ValueError(
                f"{where} {name} must be a {kind} from {lowest} to {_MAX_QUOTA}; got {_shown(number)}"
            )
    if "burst" in given and "steps_per_second" not in given:
        raise ValueError(f"{where} burst must be given with steps_per_second")
    return Limits(**given)


class QuotaFile:
    """A file of quotas. Lives on the event loop."""

    def __init__(self, path: Path, *, only_tenants: Collection[str] = ()) -> None:
        """Read the file; see `parse`.

        Raises:
            StartError: the file cannot be read, or breaks a rule.
        """
        self._path = path
        self._file = WatchedFile("--quotas", path, functools.partial(parse, only_tenants=only_tenants))

    @property
    def table(self) -> QuotaTable:
        """The quotas of the file's latest valid version."""
        return self._file.value

    def look(self) -> bool:
        """Reload the file if it has changed, and return whether the quotas are new. An invalid file changes nothing."""
        try:
            if not self._file.changed():
                return False
        except StartError as error:
            _log.error("the changed quotas cannot be used, the old ones stay valid", reason=str(error))
            return False
        _log.info("reloaded the quotas", file=str(self._path))
        return True

    def watch(self, changed: Callable[[QuotaTable], None]) -> None:
        """Call `changed` with the new quotas whenever the file has changed, while the event loop runs."""

        def look() -> None:
            loop.call_later(LOOK_S, look)
            if self.look():
                changed(self.table)

        loop = asyncio.get_running_loop()
        loop.call_later(LOOK_S, look)
