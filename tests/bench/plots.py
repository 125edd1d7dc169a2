"""Draw docs/performance/*.png and fill in the tables of docs/performance.md, from what was last measured.

Reads out/bench/compare.json and out/bench/sweep.json, which compare.py and sweep.py have written, and
out/bench/million.json of million.py where it is there. The tables go
between the page's `<!-- measured: NAME -->` and `<!-- end -->`; the rest of the page is left as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench.harness import OUT, ROOT

PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"

INK, FAINT = "#2b2b33", "#d9d9e0"
COLOURS = ("#0072b2", "#d55e00", "#009e73")
"""Told apart by people who see colours differently, too."""
MARKS = ("o", "s", "D")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
    "savefig.facecolor": "white",
}

Points = Sequence[Mapping[str, float]]
Curves = Mapping[str, Points]


# --- plots ---


def short(value: float, _position: object = None) -> str:
    """A number as axes have it: 0.5, 20, 3k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def draw(axes: Axes, curves: Curves, key: str, labels: Mapping[str, str]) -> None:
    """Lines over a logarithmic x, each with its name."""
    for i, (name, label) in enumerate(labels.items()):
        points = [(point["x"], point[key]) for point in curves[name] if key in point]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                color=COLOURS[i],
                marker=MARKS[i],
                clip_on=False,
                zorder=3,
            )


def dress(axes: Axes, title: str, xlabel: str, xs: Sequence[float]) -> None:
    """Logarithmic axes with ticks where something was measured."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, pad=10)
    axes.set_xlabel(xlabel)
    axes.set_xticks(xs, [f"{x:,.0f}" for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0)
    axes.tick_params(axis="y", which="minor", length=0)
    values = [float(y) for line in axes.lines for y in np.asarray(line.get_ydata())]
    axes.set_ylim(min(values) / 1.8, max(values) * 1.8)


def two_panels(curves: Curves, labels: Mapping[str, str], xlabel: str, note: str) -> Figure:
    """steps/s beside the p99 latency."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.1))
    xs = [point["x"] for point in next(iter(curves.values()))]
    draw(left, curves, "steps_per_s", labels)
    dress(left, "steps/s", xlabel, xs)
    draw(right, curves, "p99_ms", labels)
    dress(right, "p99 of a call, ms", xlabel, xs)
    finish(figure, left, note)
    return figure


def finish(figure: Figure, first: Axes, note: str) -> None:
    """One legend on top, and one line of how it was measured below."""
    handles, names = first.get_legend_handles_labels()
    figure.legend(
        handles, names, loc="upper left", ncols=len(names), frameon=False, bbox_to_anchor=(0.03, 1.0)
    )
    figure.text(0.04, 0.015, note, fontsize=8.5, color="#6a6a75")
    figure.tight_layout(rect=(0.02, 0.04, 0.99, 0.92), w_pad=3)


def sessions_plot(sweep: Mapping[str, Any], note: str) -> Figure:
    """Against live sessions."""
    labels = {
        "stream": "one step a message, 256 at once",
        "frames": "async SDK, 1,024 at once",
        "group": "groups of 1,024",
    }
    return two_panels(sweep["sessions"], labels, "live sessions", f"LSTM(64) + Dense(16), 8 features; {note}")


def rows_plot(sweep: Mapping[str, Any], note: str) -> Figure:
    """Against rows per frame."""
    labels = {"1 in flight": "one frame in flight", "2 in flight": "two frames in flight"}
    return two_panels(sweep["rows"], labels, "rows per frame", f"LSTM(64) + Dense(16), 8 features; {note}")


def width_plot(sweep: Mapping[str, Any], note: str) -> Figure:
    """Against the width of the LSTM."""
    labels = {
        "in process": "in process, two threads",
        "group": "two groups of 128",
        "stream": "one step a message",
    }
    figure, axes = plt.subplots(figsize=(7, 4.3))
    curves = sweep["width"]
    draw(axes, curves, "steps_per_s", labels)
    dress(axes, "steps/s", "units of the LSTM", [point["x"] for point in curves["group"]])
    finish(figure, axes, f"LSTM + Dense(16), 8 features, 256 sessions; {note}")
    return figure


# --- tables ---


def number(value: float | None) -> str:
    """Three digits that say something."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def targets_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The cases with a target."""
    rows = [
        "| case | Stepwell | compared with | ratio | to reach | reached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        if line["target"] is None:
            continue
        ours = f"{number(line['ours'])} {line['unit']}"
        theirs = f"{line['baseline']}: {number(line['theirs'])}" if line["baseline"] else ""
        how, much = line["target"]
        reached = "yes" if line["reached"] else "**no**"
        rows.append(
            f"| {line['case']} | {ours} | {theirs} | {number(line['ratio'])} | {how} {much:g} | {reached} |"
        )
    return "\n".join(rows)


def others_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The cases that are shown for comparison only."""
    rows = ["| case | Stepwell | compared with | ratio |", "| --- | --- | --- | --- |"]
    for line in lines:
        if line["target"] is None and not is_model(line):
            ours = f"{number(line['ours'])} {line['unit']}"
            theirs = f"{line['baseline']}: {number(line['theirs'])}" if line["baseline"] else ""
            rows.append(f"| {line['case']} | {ours} | {theirs} | {number(line['ratio'])} |")
    return "\n".join(rows)


def section(lines: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    """The lines of one table or, without a name, of the first ones."""
    return [line for line in lines if line.get("section", "") == name]


def whole_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """All lines, with their targets where they have one."""
    rows = [
        "| case | Stepwell | compared with | ratio | to reach | reached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        ours = f"{number(line['ours'])} {line['unit']}"
        theirs = f"{line['baseline']}: {number(line['theirs'])}" if line["baseline"] else ""
        limit = "" if line["target"] is None else f"{line['target'][0]} {line['target'][1]:g}"
        reached = {True: "yes", False: "**no**", None: ""}[line["reached"]]
        rows.append(f"| {line['case']} | {ours} | {theirs} | {number(line['ratio'])} | {limit} | {reached} |")
    return "\n".join(rows)


def million_blocks(document: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the run with very many sessions, and what it ran on."""
    plan, machine = document["plan"], document["machine"]
    return {
        "million-run": (
            f"Measured on {machine['date']} at commit `{machine['commit']}`, with"
            f" {plan['resident_rows']:,} resident rows and durability {plan['durability']}."
        ),
        "million": whole_table(document["lines"]),
    }


def is_model(line: Mapping[str, Any]) -> bool:
    """Whether a line is one of those that show each model by itself."""
    return str(line["case"]).startswith(("small,", "medium,", "large,"))


def models_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Steps/s by model and number of sessions."""
    found: dict[str, list[str]] = {}
    for line in filter(is_model, lines):
        found.setdefault(line["case"].partition(",")[0], []).append(number(line["ours"]))
    rows = ["| model | 1 session | 32 | 256 |", "| --- | --- | --- | --- |"]
    sizes = {"small": "LSTM(64), 8 features", "medium": "LSTM(256), 32", "large": "LSTM(1024), 128"}
    return "\n".join(rows + [f"| {sizes[name]} | {' | '.join(cells)} |" for name, cells in found.items()])


def machine_text(machine: Mapping[str, str]) -> str:
    """What it was measured on."""
    return (
        f"Measured on {machine['date']} at commit `{machine['commit']}`: {machine['cores']} cores "
        f"({machine['processor']}), {machine['system']}, {machine['packages']}. "
        f"Single steps by the load generator in {machine['generator']}."
    )


def fill_in(page: str, blocks: Mapping[str, str]) -> str:
    """The page with the blocks replaced."""
    for name, text in blocks.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"docs/performance.md has no place for {name}")
        page = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)  # type: ignore[misc]
    return page


def main() -> int:
    """Draw and write."""
    try:
        compare, sweep = (json.loads((OUT / f"{name}.json").read_text()) for name in ("compare", "sweep"))
    except FileNotFoundError as error:
        print(f"{error.filename} is not there: run `make bench` first", file=sys.stderr)
        return 1
    PLOTS.mkdir(parents=True, exist_ok=True)
    note = f"{sweep['machine']['cores']} cores shared with the client, store in memory, {sweep['machine']['date']}"
    with mpl.rc_context(STYLE):
        for name, plot in (("sessions", sessions_plot), ("rows", rows_plot), ("width", width_plot)):
            figure = plot(sweep, note)
            # Without the version of matplotlib, so that only other numbers make another file.
            figure.savefig(PLOTS / f"{name}.png", dpi=130, metadata={"Software": None})
            plt.close(figure)
    first = section(compare["lines"], "")
    blocks = {
        "machine": machine_text(compare["machine"]),
        "targets": targets_table(first),
        "others": others_table(first),
        "models": models_table(first),
    }
    kept = section(compare["lines"], "stores")
    if kept:
        blocks["stores"] = whole_table(kept)
    million = OUT / "million.json"
    if million.exists():
        blocks |= million_blocks(json.loads(million.read_text()))
    PAGE.write_text(fill_in(PAGE.read_text(encoding="utf-8"), blocks), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
