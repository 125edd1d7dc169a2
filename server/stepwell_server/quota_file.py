"""The file of quotas: read at the start, and again when it changes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepwell_server.core.callers import is_name
from stepwell_server.core.quotas import Limits, QuotaTable
from stepwell_server.logs import Log

_log = Log("quotas")
#: So often the file is looked at, in seconds.
LOOK_S = 1.0
_OF_TENANTS = tuple(field.name for field in dataclasses.fields(Limits))
#: Who made a session is not kept, only whose it is.
_OF_CALLERS = ("steps_per_second", "burst", "bytes_in_flight")
_TABLES = ("default", "tenants", "callers")


class QuotaFileError(Exception):
    """The file cannot be read, or breaks a rule. The message is one line for people."""


def parse(text: str) -> QuotaTable:
    """What a file says.

    Raises:
        QuotaFileError: it is no TOML, or breaks a rule.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QuotaFileError(f"must be TOML: {error}") from error
    for name in found:
        if name not in _TABLES:
            raise QuotaFileError(f"must have tables {', '.join(_TABLES)} only; got {name!r}")
    tables = {name: _table(f"[{name}]", found.get(name, {})) for name in _TABLES}
    for tenant in tables["tenants"]:
        if not is_name(tenant):
            raise QuotaFileError(f"[tenants] must be named by names of tenants; got {tenant!r}")
    for caller in tables["callers"]:
        if not all(map(is_name, caller.split("/"))) or caller.count("/") > 1:
            raise QuotaFileError(
                f'[callers] must be named as "TENANT/NAME", or "NAME" where it has no tenant; got {caller!r}'
            )
    return QuotaTable(
        _limits("[default]", tables["default"], _OF_TENANTS),
        {name: _limits(f"[tenants.{name}]", each, _OF_TENANTS) for name, each in tables["tenants"].items()},
        {name: _limits(f'[callers."{name}"]', each, _OF_CALLERS) for name, each in tables["callers"].items()},
    )


def _table(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise QuotaFileError(f"{where} must be a table; got {value!r}")
    return value


def _limits(where: str, value: object, allowed: tuple[str, ...]) -> Limits:
    given = _table(where, value)
    for name, number in given.items():
        if name not in allowed:
            raise QuotaFileError(f"{where} must have {', '.join(allowed)} only; got {name!r}")
        kinds, lowest = (int,), 0
        if name == "steps_per_second":
            kinds, lowest = (int, float), 1  # type: ignore[assignment]
        elif name in {"burst", "bytes_in_flight"}:
            lowest = 1
        if not isinstance(number, kinds) or isinstance(number, bool) or not lowest <= number < float("inf"):
            what = "number" if name == "steps_per_second" else "whole number"
            raise QuotaFileError(f"{where} {name} must be a {what} of at least {lowest}; got {number!r}")
    if "burst" in given and "steps_per_second" not in given:
        raise QuotaFileError(f"{where} burst must be given with steps_per_second")
    return Limits(**given)


class QuotaFile:
    """A file of quotas."""

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            QuotaFileError: it cannot be, or breaks a rule.
        """
        self._path = path
        self._seen: tuple[int, ...] = ()
        self.table = self._read()

    def _read(self) -> QuotaTable:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                self._seen = (status.st_mtime_ns, status.st_size, status.st_ino)
                text = file.read().decode()
        except OSError as error:
            raise QuotaFileError(f"{self._path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise QuotaFileError(f"{self._path} must be UTF-8: {error}") from error
        try:
            return parse(text)
        except QuotaFileError as error:
            raise QuotaFileError(f"{self._path} {error}") from error

    def look(self) -> bool:
        """Read it again if it has changed; whether there are other quotas. A broken one leaves those that are."""
        try:
            status = self._path.stat()
            if self._seen == (status.st_mtime_ns, status.st_size, status.st_ino):
                return False
            self.table = self._read()
        except OSError as error:
            if self._seen:
                _log.error("the quotas stay as they are: the file is gone", reason=error.strerror)
            self._seen = ()
            return False
        except QuotaFileError as error:
            _log.error("the quotas stay as they are: the file is broken", reason=str(error))
            return False
        _log.info("quotas read", file=str(self._path))
        return True

    def watch(self, changed: Callable[[QuotaTable], None]) -> None:
        """Tell of other quotas when the file has changed, as long as the event loop runs."""

        def look() -> None:
            if self.look():
                changed(self.table)
            loop.call_later(LOOK_S, look)

        loop = asyncio.get_running_loop()
        loop.call_later(LOOK_S, look)
