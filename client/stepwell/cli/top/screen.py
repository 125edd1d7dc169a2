"""The picture of `stepwell top` for people: tables that fit into 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

_DAY_S, _HOUR_S = 86_400, 3_600
_MEBIBYTE = 1 << 20


def screen(picture: dict[str, Any], rows: int) -> RenderableType:
    """All of it; at most so many rows of each table."""
    parts: list[RenderableType] = [_server(picture["server"], len(picture["servers"]))]
    if len(picture["servers"]) > 1:
        parts.append(_servers(picture["servers"]))
    parts.append(
        _table(
            ("MODEL", "STEPS/S", "P50", "P99", "PASSES/S", "ROWS", "BUSY", "SESSIONS", "RESIDENT", "QUEUED"),
            [
                (
                    one["model"],
                    _number(one["row_steps_per_s"]),
                    _time(one["p50_s"]),
                    _time(one["p99_s"]),
                    _number(one["passes_per_s"]),
                    _number(one["rows_per_pass"]),
                    f"{one['busy']:.0%}",
                    _number(one["sessions"]),
                    _number(one["resident_rows"]),
                    _number(one["queued_rows"]),
                )
                for one in picture["models"][:rows]
            ],
        )
    )
    parts += _more(picture, rows)
    return Group(parts[0], *(each for part in parts[1:] for each in ("", part)))


def _more(picture: dict[str, Any], rows: int) -> list[RenderableType]:
    """The tables that have something to show."""
    tables: list[tuple[tuple[str, ...], list[tuple[str, ...]]]] = [
        (
            ("METHOD", "PER S", "P50", "P99"),
            [
                (one["method"], _number(one["messages_per_s"]), _time(one["p50_s"]), _time(one["p99_s"]))
                for one in picture["methods"]
            ],
        ),
        (
            ("TENANT", "STEPS/S", "SESSIONS"),
            [
                (one["tenant"] or "(none)", _number(one["row_steps_per_s"]), _number(one["sessions"]))
                for one in picture["tenants"]
            ],
        ),
        (
            ("SLOW SESSION", "MODEL", "TOOK", "AGO"),
            [
                (one["session_id"], one["model"], _time(one["seconds"]), f"{one['age_s']:.0f} s")
                for one in picture["slow_sessions"]
            ],
        ),
        (
            ("ERROR", "MODEL", "PER S"),
            [(one["reason"], one["model"] or "(none)", _number(one["per_s"])) for one in picture["errors"]],
        ),
    ]
    return [_table(headings, cells[:rows]) for headings, cells in tables if cells]


def _servers(servers: list[dict[str, Any]]) -> Table:
    """A row for each, however many there are."""
    rows: list[tuple[str, ...]] = []
    for one in servers:
        if one["error"]:
            rows.append((one["metrics"], "NO ANSWER", *("-",) * 7))
            continue
        rows.append(
            (
                one["metrics"],
                "yes" if one["ready"] else "NO",
                _long(one["uptime_s"]),
                f"{one['cores']:.1f}",
                _number(one["memory_bytes"] / _MEBIBYTE),
                _number(one["row_steps_per_s"]),
                _time(one["p99_s"]),
                _number(one["resident_rows"]),
                _number(one["errors_per_s"]),
            )
        )
    return _table(("SERVER", "READY", "UP", "CORES", "MIB", "STEPS/S", "P99", "RESIDENT", "ERRORS/S"), rows)


def _server(server: dict[str, Any], count: int) -> Text:
    of = f"{count} servers, " if count > 1 else ""
    text = (
        f"{of}stepwell {server['version']} ({server['front']}), up {_long(server['uptime_s'])}, "
        f"{server['cores']:.1f} cores, {server['memory_bytes'] / _MEBIBYTE:.0f} MiB, "
        f"{server['connections']:.0f} connections, {server['streams']:.0f} streams"
    )
    found = Text(text)
    if not server["store_ready"]:
        found.append("\nTHE STORE CANNOT BE USED", style="bold red")
    return found


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for place, heading in enumerate(headings):
        text = heading in {"MODEL", "METHOD", "TENANT", "SLOW SESSION", "ERROR", "SERVER"}
        table.add_column(
            heading,
            justify="left" if text else "right",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if place == 0 else None,
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= factor:
            return f"{value / (factor if unit != 'k' else 1e3):.1f}{unit}"
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _long(seconds: float) -> str:
    if seconds >= _DAY_S:
        return f"{seconds / _DAY_S:.1f} d"
    return f"{seconds / _HOUR_S:.1f} h" if seconds >= _HOUR_S else f"{seconds:.0f} s"
