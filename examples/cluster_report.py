"""What the demo of a cluster writes down, and how it shows it: a table and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#0b7a75", "#c1440e", "#4b55a5")
WAYS = {"SDK": "by the SDK, to the replicas", "Envoy": "through Envoy"}


@dataclass(frozen=True)
class Event:
    """Something happened to a replica."""

    second: float
    replica: int
    what: str

    @property
    def is_end(self) -> bool:
        """It went away, and did not come back."""
        return "again" not in self.what


@dataclass(frozen=True)
class Wait:
    """A step, as a user saw it."""

    second: float
    """When it was asked for."""
    seconds: float
    """Until the answer."""
    by: str
    """Which way: one of WAYS."""
    error: str
    """Empty: it was answered."""


@dataclass(frozen=True)
class Load:
    """How many steps each replica has made since the last look."""

    second: float
    steps: tuple[float, ...]


def print_table(console: Console, waits: list[Wait], events: list[Event]) -> None:
    """What users saw, by the way they went."""
    table = Table(box=None, pad_edge=False)
    for title in (
        "",
        "steps",
        "errors",
        "median",
        "99 of 100",
        "longest",
        "longest while a replica was away",
    ):
        table.add_column(title, justify="left" if not title else "right")
    for by, what in WAYS.items():
        own = [wait for wait in waits if wait.by == by]
        if not own:
            continue
        seconds = [wait.seconds for wait in own]
        away = [wait.seconds for wait in own if is_away(wait, events)]
        median, most = np.quantile(seconds, [0.5, 0.99])
        times = [milliseconds(value) for value in (median, most, max(seconds), max(away, default=0.0))]
        table.add_row(what, f"{len(own)}", f"{sum(bool(wait.error) for wait in own)}", *times)
    console.print(table)
    for error in sorted({wait.error for wait in waits if wait.error})[:5]:
        console.print(error)


def milliseconds(seconds: float) -> str:
    """For people."""
    return f"{1000 * seconds:.0f} ms"


def is_away(wait: Wait, events: list[Event]) -> bool:
    """Some replica was not there in the second in which the step was asked for, or went away during it."""
    return any(event.is_end and -wait.seconds <= wait.second - event.second <= 1.0 for event in events)


def plot(path: Path, waits: list[Wait], loads: list[Load], events: list[Event], replicas: int) -> None:
    """Draw how long users waited, and who worked for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for (by, what), colour in zip(WAYS.items(), COLOURS, strict=False):
        own = [wait for wait in waits if wait.by == by]
        milli = [1000 * wait.seconds for wait in own]
        upper.plot([wait.second for wait in own], milli, ".", ms=2.5, alpha=0.5, color=colour, label=what)
    upper.set_yscale("log")
    upper.set_ylabel("how long a step took (ms)")
    failed = sum(bool(wait.error) for wait in waits)
    upper.set_title(f"What users saw: {len(waits)} steps, {failed} errors", fontweight="bold", loc="left")
    upper.legend(loc="upper right", markerscale=4, frameon=False)
    seconds = np.array([load.second for load in loads])
    lengths = np.diff(seconds, prepend=0.0)
    rates = [np.array([load.steps[i] for load in loads]) / lengths for i in range(replicas)]
    names = [f"replica {i + 1}" for i in range(replicas)]
    lower.stackplot(seconds, *rates, labels=names, colors=COLOURS[:replicas], alpha=0.8, step="pre")
    lower.set_ylabel("steps per second")
    lower.set_xlabel("seconds")
    lower.set_title("Who made them", fontweight="bold", loc="left")
    lower.legend(loc="upper right", frameon=False, ncols=replicas)
    for event in events:
        for axes in (upper, lower):
            axes.axvline(event.second, color=COLOURS[event.replica], lw=1, ls="--" if event.is_end else ":")
        upper.annotate(
            f"{event.replica + 1} {'ends' if event.is_end else 'is back'}",
            (event.second, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            ha="right",
            bbox={"color": "white", "alpha": 0.7, "pad": 1},
        )
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
