"""Draw docs/explanation/performance/*.png and fill in the tables of docs/explanation/performance.md, from what was last measured.

Reads out/bench/results.json of measure.py, and where they are there out/bench/million.json of million.py and
gate-bare.json of gate.py. The tables go between the page's `<!-- measured: NAME -->` and `<!-- end -->`; the rest of the page is left as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[1] / name) for name in (".", "tests"))

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from bench import tables
from bench.harness import MODELS, OUT, ROOT

PAGE = ROOT / "docs" / "explanation" / "performance.md"
PLOTS = ROOT / "docs" / "explanation" / "performance"

INK, FAINT = "#2b2b33", "#d9d9e0"
LOOKS = {
    "group": ("#009e73", "D"),
    "stream": ("#0072b2", "o"),
    "unary": ("#d55e00", "s"),
    "in process": (INK, "^"),
}
"""Colour and mark by kind, told apart by people who see colours differently, too."""
WORDS = {"unary": "calls", "stream": "streams", "group": "groups", "in process": "program in process"}
FRONTS = {"native": "-", "python": "--"}
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

Points = Sequence[Mapping[str, Any]]


def short(value: float, _position: object = None) -> str:
    """A number as axes have it: 0.5, 20, 3k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def draw(axes: Axes, points: Points, x: str, y: str, kind: str, **look: Any) -> None:
    """A line over what was measured."""
    found = [(point[x], point[y]) for point in points if y in point]
    if found:
        colour, mark = LOOKS[kind]
        axes.plot(*zip(*found, strict=True), color=colour, marker=mark, clip_on=False, zorder=3, **look)


def dress(axes: Axes, title: str, xlabel: str) -> None:
    """Logarithmic axes with ticks where something was measured."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, pad=10)
    axes.set_xlabel(xlabel)
    xs = sorted({float(x) for line in axes.lines for x in np.asarray(line.get_xdata())})
    axes.set_xticks(xs, [f"{x:,.0f}" for x in xs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(length=0)
    axes.tick_params(axis="y", which="minor", length=0)


def finish(figure: Figure, axes: Axes, note: str, columns: int) -> None:
    """One legend on top, and one line of how it was measured below."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="upper left",
        ncols=columns,
        frameon=False,
        bbox_to_anchor=(0.03, 1.0),
        handlelength=3.6,
    )
    figure.text(0.04, 0.015, note, fontsize=8.5, color="#6a6a75")
    figure.tight_layout(rect=(0.02, 0.04, 0.99, 0.84), w_pad=3)


def by_front(points: Points, kind: str) -> dict[str, list[Mapping[str, Any]]]:
    return {
        front: [point for point in points if (point["front"], point["kind"]) == (front, kind)]
        for front in FRONTS
    }


def rate_plot(points: Points, note: str) -> Figure:
    """Rates by sessions, for each way to send steps, on both fronts."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    for front, dashes in FRONTS.items():
        for kind in ("group", "stream", "unary"):
            label = f"{WORDS[kind]}, {tables.FRONTS[front]} front"
            draw(axes, by_front(points, kind)[front], "sessions", "rate", kind, linestyle=dashes, label=label)
    dress(axes, "steps/s", "sessions")
    finish(figure, axes, note, 2)
    return figure


def latency_plot(points: Points, note: str) -> Figure:
    """Latencies of single steps by sessions, one panel for each front."""
    figure, panels = plt.subplots(1, len(FRONTS), figsize=(10, 4.1), sharey=True)
    for front, axes in zip(FRONTS, panels, strict=True):
        for kind in ("stream", "unary"):
            for key, dashes in (("p50_ms", "-"), ("p99_ms", "--")):
                label = f"{WORDS[kind]}, {key[:3]}"
                draw(
                    axes, by_front(points, kind)[front], "sessions", key, kind, linestyle=dashes, label=label
                )
        dress(axes, f"latency of a step, ms: {tables.FRONTS[front]} front", "sessions")
    finish(figure, panels[0], note, 4)
    return figure


def width_plot(points: Points, note: str) -> Figure:
    """Rates by width, with 256 sessions."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    for kind in ("in process", "group", "stream", "unary"):
        some = [
            {**point, "units": MODELS[point["model"]][0]}
            for point in points
            if point["kind"] == kind and point["sessions"] == 256
        ]
        draw(axes, some, "units", "rate", kind, label=WORDS[kind])
    dress(axes, "steps/s, 256 sessions", "units of the LSTM")
    finish(figure, axes, note, 2)
    return figure


def save(name: str, figure: Figure) -> None:
    # Without the version of matplotlib, so that only other numbers make another file.
    figure.savefig(PLOTS / f"{name}.png", dpi=90, metadata={"Software": None})
    plt.close(figure)


def main() -> int:
    """Draw and write."""
    results = OUT / "results.json"
    if not results.exists():
        print(f"{results} is not there: run `make bench` first", file=sys.stderr)
        return 1
    cases = json.loads(results.read_text())["cases"]
    PLOTS.mkdir(parents=True, exist_ok=True)

    def points(*names: str) -> Points:
        return [point for name in names for point in cases.get(name, {}).get("points", [])]

    machine = next(iter(cases.values()))["machine"]
    note = f"{machine['cores']} cores shared with the client, sessions in memory, {machine['date']}"
    small = f"LSTM(64) + Dense(16), 8 features; {note}"
    with mpl.rc_context(STYLE):
        if points("sessions"):
            save("rate", rate_plot(points("sessions", "groups"), small))
            save("latency", latency_plot(points("sessions"), small))
        if points("width"):
            save("width", width_plot(points("width"), note))
    blocks = tables.blocks(cases)
    million = OUT / "million.json"
    if million.exists():
        blocks |= tables.million_blocks(json.loads(million.read_text()))
    bare = OUT / "gate-bare.json"
    if bare.exists():
        blocks |= tables.bare_blocks(json.loads(bare.read_text()))
    PAGE.write_text(tables.fill_in(PAGE.read_text(encoding="utf-8"), blocks), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
