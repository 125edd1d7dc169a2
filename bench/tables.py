"""The tables of docs/explanation/performance.md, from the results of `measure` and `million`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Point = Mapping[str, Any]
Result = Mapping[str, Any]
"""What measure.py keeps of a case."""

MODELS = {
    "small": "LSTM(64), 8 features",
    "medium": "LSTM(256), 32 features",
    "large": "LSTM(1024), 128 features",
}
FRONTS = {"native": "native", "python": "Python"}
_STORES = {
    "memory": "in memory",
    "async": "disk, async",
    "sync": "disk, sync",
    "sync, 0 ms": "disk, sync, flushes of 0 ms",
    "sync, 0.3 ms": "disk, sync, flushes of 0.3 ms",
}


def number(value: float | None) -> str:
    """Three digits that say something."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pick(points: Sequence[Point], **labels: Any) -> Point:
    """The point with these labels; an empty one if there is none."""
    return next((one for one in points if all(one.get(k) == v for k, v in labels.items())), {})


def cell(point: Point, *names: str, of: str = "") -> str:
    """Some of a point's numbers; `of` names a mapping in it."""
    if "error" in point:
        return "failed"
    found = point.get(of, {}) if of else point
    refused = (
        f" ({point['refused']:.1%} refused)" if names == ("rate",) and not of and point.get("refused") else ""
    )
    return " / ".join(number(found.get(name)) for name in names) + refused if found else ""


def values(point: Point) -> list[str]:
    """Rate and latencies, as the tables' cells."""
    return [cell(point, "rate"), cell(point, "p50_ms", "p99_ms")]


MIN_SHOWN_US = 0.1
RATE_AND_LATENCY = ("steps/s", "p50 / p99, ms")
PER_STEP = "client / server, µs a step"


def sessions_table(points: Sequence[Point]) -> str:
    columns = [(front, kind) for front in FRONTS for kind in ("unary", "stream")]
    rows = []
    for count in dict.fromkeys(point["sessions"] for point in points):
        found = [pick(points, front=front, kind=kind, sessions=count) for front, kind in columns]
        rows.append([number(count), "steps/s", *(cell(one, "rate") for one in found)])
        rows.append(["", "p50 / p99, ms", *(cell(one, "p50_ms", "p99_ms") for one in found)])
    heads = [f"{FRONTS[front]}, {'call' if kind == 'unary' else kind}" for front, kind in columns]
    return table(["sessions", "", *heads], rows)


def threads_table(points: Sequence[Point]) -> str:
    names = {"bare": "bare wire", "memory": "in memory", "sync": "disk, sync"}
    rows = [
        [
            f"{number(point['sessions'])}, {'call' if point['kind'] == 'unary' else 'stream'}",
            names[point["server"]],
            cell(point, "rows"),
            *(threads_cell(point, role) for role in ("wire", "loop", "compute", "store")),
            cell(point, "server_us"),
            cell(point, "rate"),
            cell(point, "rate", of="ratios"),
        ]
        for point in points
    ]
    heads = ["wire", "event loop", "compute", "store", "all"]
    return table(["sessions", "server", "rows a pass", *heads, "steps/s", "rate against bare"], rows)


def threads_cell(point: Point, role: str) -> str:
    """The time of threads that had work to do."""
    return cell(point, f"{role}_us") if "error" in point or point.get(f"{role}_us", 0) >= MIN_SHOWN_US else ""


def groups_table(points: Sequence[Point]) -> str:
    rows = [
        [
            number(point["sessions"]),
            FRONTS[point["front"]],
            *values(point),
            cell(point, "client_us", "server_us"),
        ]
        for point in points
    ]
    return table(["sessions of the group", "front", *RATE_AND_LATENCY, PER_STEP], rows)


def sdk_table(points: Sequence[Point]) -> str:
    ways = {
        "stub": "bare stub of grpcio",
        "sync": "`session.step` in a loop",
        "aio_stub": "bare stub of grpc.aio, awaited",
        "async": "`await session.step` in a loop",
        "gather": "1,000 sessions in `asyncio.gather`",
    }
    rows = [
        [
            ways[point["how"]],
            FRONTS[point["front"]],
            *values(point),
            cell(point, "p50_ms", of="ratios"),
            cell(point, "client_us", "server_us"),
        ]
        for point in points
        if point["how"] in ways
    ]
    return table(["SDK", "front", *RATE_AND_LATENCY, "p50 of the stub's", PER_STEP], rows)


def profile_table(points: Sequence[Point]) -> str:
    shares = pick(points, how="profile").get("shares", {})
    return table(["where", "share"], [[f"`{name}`", f"{share:.0%}"] for name, share in shares.items()])


def width_table(points: Sequence[Point]) -> str:
    columns = [(kind, count) for kind in ("unary", "stream") for count in (1, 32, 256)]
    columns += [("group", 256), ("in process", 256)]
    rows = []
    for model, name in MODELS.items():
        found = [pick(points, model=model, kind=kind, sessions=count) for kind, count in columns]
        rows.append([name, "steps/s", *(cell(one, "rate") for one in found)])
        rows.append(["", "p50, ms", *(cell(one, "p50_ms") for one in found)])
    heads = [f"{'call' if kind == 'unary' else kind}, {count}" for kind, count in columns]
    return table(["model", "", *heads], rows)


def durability_table(points: Sequence[Point]) -> str:
    rows = []
    for point in points:
        if point["store"] not in _STORES:
            continue
        load = {"unary": "call", "stream": "stream", "group": "one group"}[point["kind"]]
        ratios = cell(point, "rate", "p50_ms", of="ratios")
        rows.append([f"{point['sessions']}, {load}", _STORES[point["store"]], *values(point), ratios])
    flushed = pick(points, store="disk")
    if flushed:
        rows.append(
            [f"the disk itself ({flushed['kind']}): fdatasync of 4 KiB", "", "", cell(flushed, "p50_ms"), ""]
        )
    return table(["sessions", "store", *RATE_AND_LATENCY, "rate / p50 against memory"], rows)


def valkey_table(points: Sequence[Point]) -> str:
    """What is over the disk's p50 is counted in what stands beside: round trips, commits."""
    names = {
        "disk": "on disk, async",
        "valkey": "on Valkey, async",
        "commit": "its commit alone",
        "round trip": "a round trip, one after the other",
        "paced round trip": "a round trip, one every 0.2 ms",
    }
    loads = {"unary": "call", "group": "one group"}
    rows = []
    for point in points:
        if "over" in point:
            continue
        load = loads.get(point["kind"])
        kinds = ["round trips", "paced round trips"] if point["sessions"] == 1 else ["commits of 256"]
        overs = [pick(points, over=kind) for kind in kinds] if point["store"] == "valkey" else []
        rows.append(
            [
                f"{point['sessions']}, {load}" if load else str(point["sessions"] or ""),
                names[point["store"]],
                cell(point, "p50_ms"),
                cell(point, "p50_ms", of="ratios"),
                ", ".join(f"{cell(over, 'count')} {over['over']}" for over in overs if over),
            ]
        )
    return table(["sessions", "", "p50, ms", "against the disk", "over the disk's"], rows)


def ratios_table(*labels: str, heads: Sequence[str], key: str = "rate") -> Callable[[Sequence[Point]], str]:
    """A table with a row for each point, whose last column is a ratio."""

    def made(points: Sequence[Point]) -> str:
        rows = [
            [
                *(_words(point[label]) for label in labels),
                *values(point),
                cell(point, "server_us"),
                cell(point, key, of="ratios"),
            ]
            for point in points
        ]
        return table([*heads[:-1], *RATE_AND_LATENCY, "server, µs a step", heads[-1]], rows)

    return made


def _words(label: Any) -> str:
    words = {"unary": "call", "alone": "alone", "beside": "during requests of 10,000 steps"}
    return number(label) if isinstance(label, int) else words.get(label, label)


def floods_table(points: Sequence[Point], by: str = "callers") -> str:
    rows = [
        [
            point["flood"],
            point[by],
            cell(point, "alone_p50_ms", "alone_p99_ms"),
            cell(point, "beside_p50_ms", "beside_p99_ms"),
            cell(point, "p99_ratio"),
            cell(point, "flood_rate"),
        ]
        for point in points
    ]
    heads = ["8 streams during", by, "p50 / p99 alone, ms", "p50 / p99 during, ms"]
    return table([*heads, "p99 against alone", "the flood's calls or frames/s"], rows)


def memory_table(points: Sequence[Point]) -> str:
    rows = [[FRONTS[one["front"]], cell(one, "resident_mib"), cell(one, "session_bytes")] for one in points]
    return table(["front", "resident memory, MiB", "a session beyond its state, bytes"], rows)


def models_table(points: Sequence[Point]) -> str:
    rows = []
    for one in points:
        if one["kind"] != "unary":
            continue
        stream = pick(points, models=one["models"], kind="stream")
        ratios = [cell(each, "rate", of="ratios") for each in (one, stream)]
        facts = [cell(one, name) for name in ("resident_mib", "pss_mib", "threads", "files", "ready_s")]
        rows.append([str(one["models"]), *facts, *ratios])
    heads = ["models", "resident, MiB", "PSS, MiB", "threads", "files", "exec to ready, s"]
    return table([*heads, "calls against one model's", "stream steps against one model's"], rows)


def start_table(points: Sequence[Point]) -> str:
    return table(
        ["front", "exec to ready, s"], [[FRONTS[one["front"]], cell(one, "ready_s")] for one in points]
    )


def reload_table(points: Sequence[Point]) -> str:
    return table(
        ["the model", "compiled, s", "against the first one"],
        [[one["what"], cell(one, "compiled_s"), cell(one, "compiled_s", of="ratios")] for one in points],
    )


def speech_table(points: Sequence[Point]) -> str:
    names = {
        "bare": "ONNX Runtime alone, in batches",
        "stream": "Stepwell, a stream for each session",
        "group": "Stepwell, one group",
    }
    rows = []
    for one in points:
        is_paced = one["pace"] == "paced"
        sessions = cell(one, "carried") if is_paced else "256"
        against = cell(one, "carried" if is_paced else "step_us", of="ratios")
        numbers = [cell(one, "step_us"), cell(one, "p50_ms", "p99_ms"), against]
        rows.append(
            ["31.25 frames/s each" if is_paced else "no pause", names[one["server"]], sessions, *numbers]
        )
    heads = ["", "", "sessions", "µs a step", "p50 / p99, ms", "against ONNX Runtime alone"]
    return table(heads, rows)


TABLES: Mapping[str, tuple[str, Callable[[Sequence[Point]], str]]] = {
    "sessions": ("sessions", sessions_table),
    "threads": ("threads", threads_table),
    "groups": ("groups", groups_table),
    "sdk": ("sdk", sdk_table),
    "profile": ("sdk", profile_table),
    "width": ("width", width_table),
    "durability": ("durability", durability_table),
    "valkey": ("valkey", valkey_table),
    "triton": (
        "triton",
        ratios_table("protocol", "kind", heads=("256 sessions", "", "rate against Stepwell's")),
    ),
    "models": ("models", models_table),
    "long": ("long", ratios_table("when", heads=("8 streams", "p99 against alone"), key="p99_ms")),
    "floods": ("floods", floods_table),
    "floods on disk": ("floods_on_disk", lambda points: floods_table(points, "durability")),
    "tls": (
        "tls",
        ratios_table("transport", "kind", "sessions", heads=("", "", "sessions", "rate against plain")),
    ),
    "memory": ("memory", memory_table),
    "start": ("start", start_table),
    "reload": ("reload", reload_table),
    "speech": ("speech", speech_table),
}
"""By the name of its block on the page: the case, and what makes its table."""


def machine_text(result: Result) -> str:
    """What it was measured on."""
    machine = result["machine"]
    trial = result["repeats"] < 3 or result["run_s"] < 1
    return ("**A short trial run, not a measurement: rely on no number.** " if trial else "") + (
        f"Measured on {machine['date']} at commit `{machine['commit']}`: {machine['cores']} cores"
        f" ({machine['processor']}), {machine['system']}, {machine['packages']}. Medians of {_turns(result)}."
    )


def _turns(result: Result) -> str:
    turns = "1 turn" if result["repeats"] == 1 else f"{result['repeats']} turns"
    return f"{turns} of {result['run_s']:g} s"


def blocks(cases: Mapping[str, Result]) -> dict[str, str]:
    """The blocks of the page: all of them, those that were not measured as well."""
    first = next(iter(cases.values()))
    made = {"machine": machine_text(first)}
    for name, (case, make) in TABLES.items():
        result = cases.get(case)
        if result is None or "error" in result:
            why = "" if result is None else f": {_line(result['error'])}"
            made[name] = f"Not measured in this run{why}"
            continue
        notes = [make(result["points"])]
        if _run(result) != _run(first):
            machine = result["machine"]
            notes.append(f"Of {machine['date']}, commit `{machine['commit']}`, medians of {_turns(result)}.")
        failed = [point for point in result["points"] if "error" in point]
        if failed:
            notes.append(f"Failed: {_line(failed[0]['error'])}")
        made[name] = "\n\n".join(notes)
    return made


def _line(text: str) -> str:
    return text.splitlines()[0]


def _run(result: Result) -> tuple[Any, ...]:
    return result["machine"], result["repeats"], result["run_s"]


def million_blocks(document: Result) -> dict[str, str]:
    """The table of the run with very many sessions, and what it ran on."""
    plan, machine = document["plan"], document["machine"]
    rows = []
    for line in document["lines"]:
        theirs = f"{line['baseline']}: {number(line['theirs'])}" if line["baseline"] else ""
        rows.append([line["case"], f"{number(line['value'])} {line['unit']}", theirs, number(line["ratio"])])
    return {
        "million-run": (
            f"Measured on {machine['date']} at commit `{machine['commit']}`, with"
            f" {plan['resident_rows']:,} resident rows and durability {plan['durability']}."
        ),
        "million": table(["case", "Stepwell", "compared with", "ratio"], rows),
    }


def bare_blocks(document: Result) -> dict[str, str]:
    """The table of the run against the bare wire, with its goals."""
    words = {"beyond": "missed", "within": "reached", "unclear": "unclear"}
    rows = []
    for one in document["rows"]:
        _, load, name = one["row"]
        found, limit = one["interval"], one["limit"]
        interval = f"{found['low']:.2f} to {found['high']:.2f}"
        goal = "" if limit is None else f"{limit:.2f}"
        numbers = [f"{found['median']:.2f}", interval, goal]
        rows.append([load, {"rate": "rate", "p50_ms": "p50"}[name], *numbers, words.get(one["verdict"], "")])
    machine = document["machine"]
    heads = ["load", "", "against the bare wire", "95 % interval", "goal", ""]
    return {
        "bare": f"{table(heads, rows)}\n\nOf {machine['date']}, commit `{machine['commit']}`, on {machine['cores']}"
        f" cores ({machine['processor']}), {document['pairs']} pairs of {document['run_s']:g} s."
    }


def fill_in(page: str, made: Mapping[str, str]) -> str:
    """The page with the blocks replaced.

    Raises:
        LookupError: The page has no place for one.
    """
    for name, text in made.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise LookupError(f"docs/explanation/performance.md has no place for {name}")
        page = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)  # type: ignore[misc]
    return page
