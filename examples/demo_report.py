"""What the demo writes down, and how it shows it: a table, a plot and a few sentences."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table
from weather import AIRPORTS, Floats, time_of

mpl.use("Agg")
import matplotlib.dates as mdates
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DAY = 24
HISTORY = 7 * DAY  # hours that a session sees before its forecasts count
LIVE = 14 * DAY  # hours whose forecasts are judged
HOURS = HISTORY + LIVE
COMING = 2 * DAY  # hours after that, for the experiment with the state
SHOWN = 5 * DAY  # hours of each user in the plot

INK, GREY = "#22262b", "#9aa1a9"
COLOURS = ("#0b7a75", "#c1440e", "#4b55a5")


@dataclass(frozen=True)
class User:
    """Someone with a session."""

    name: str
    airport: str
    first_hour: int


@dataclass
class Log:
    """What came at a user's airport, and what the user's session said."""

    user: User
    series: Floats
    next_hour: list[float] = field(default_factory=list)
    """Forecast made at each hour for the hour after it."""
    next_day: dict[int, list[float]] = field(default_factory=dict)
    """Hour -> forecast made there for the next 24 hours."""
    half_way: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when half of the hours have been fed to the session."""

    @property
    def title(self) -> str:
        """Who it is, and where."""
        return f"{self.user.name} at {AIRPORTS[self.user.airport]}"

    @property
    def observed(self) -> Floats:
        """The hours fed to the session."""
        return self.series[self.user.first_hour : self.user.first_hour + HOURS]

    @property
    def coming(self) -> Floats:
        """The two days after them."""
        return self.series[self.user.first_hour + HOURS : self.user.first_hour + HOURS + COMING]

    def truth(self, hour: int, hours: int) -> Floats:
        """What came in the ``hours`` after ``hour``; negative: what came up to it."""
        now = self.user.first_hour + hour + 1
        return self.series[now : now + hours] if hours > 0 else self.series[now + hours : now]


@dataclass
class Experiment:
    """One user's next 48 hours, forecast hour by hour from several states."""

    untouched: Floats
    others: Floats
    zeros: Floats
    restored: Floats
    alone: list[float] = field(default_factory=list)
    """All of that user's hours again, while nobody else steps."""

    def undisturbed(self, log: Log) -> bool:
        """Say whether neither company nor the experiment itself changed a bit of what the user was told."""
        return self.alone == log.next_hour and np.array_equal(self.restored, self.untouched)


Forecast = Callable[[Log, int], "Floats | list[float]"]

DAY_AHEAD: dict[str, Forecast] = {
    "LSTM": lambda log, hour: log.next_day[hour],
    "as now": lambda log, hour: log.truth(hour, -1).repeat(DAY),
    "as yesterday": lambda log, hour: log.truth(hour, -DAY),
}


def day_ahead_errors(log: Log, method: str) -> Floats:
    """Mean absolute error of a method by hours ahead ``(24,)``, over all forecasts of a user."""
    forecast = DAY_AHEAD[method]
    errors = [np.abs(forecast(log, hour) - log.truth(hour, DAY)) for hour in log.next_day]
    return np.asarray(np.mean(errors, axis=0))


def next_hour_errors(log: Log) -> tuple[float, float]:
    """Mean absolute error for the next hour: the LSTM's, and that of saying it stays as it is."""
    came = log.truth(HISTORY, LIVE - 1)
    lstm = np.abs(np.array(log.next_hour[HISTORY:-1]) - came).mean()
    return float(lstm), float(np.abs(log.truth(HISTORY - 1, LIVE - 1) - came).mean())


def print_errors(console: Console, logs: list[Log]) -> None:
    """Print the table of errors."""
    table = Table(title="Mean absolute error in °C over 14 days", title_justify="left")
    for column in ("user", "airport", "days"):
        table.add_column(column)
    for column in ("1 h:\nLSTM", "1 h:\nas now", "24 h:\nLSTM", "24 h:\nas now", "24 h: as\nyesterday"):
        table.add_column(column, justify="right")
    for log in logs:
        first = time_of(log.user.first_hour + HISTORY)
        last = time_of(log.user.first_hour + HOURS - 1)
        errors = [*next_hour_errors(log), *(day_ahead_errors(log, method).mean() for method in DAY_AHEAD)]
        days = f"{first.day}-{last.day} {last:%b}"
        table.add_row(log.user.name, AIRPORTS[log.user.airport], days, *(f"{error:.2f}" for error in errors))
    console.print(table)


def print_findings(console: Console, logs: list[Log], experiment: Experiment, from_keras: float) -> None:
    """Say what was seen in a few sentences, each from its numbers."""
    name, other = logs[0].user.name, logs[-1].user.name
    gains = [1 - lstm / naive for lstm, naive in (next_hour_errors(log) for log in logs)]
    lstm, now, yesterday = (
        np.mean([day_ahead_errors(log, method) for log in logs], axis=0) for method in DAY_AHEAD
    )
    others, zeros = (np.abs(run - experiment.untouched) for run in (experiment.others, experiment.zeros))
    alone = "are bit for bit" if experiment.alone == logs[0].next_hour else "ARE NOT"
    restored = "are bit for bit" if np.array_equal(experiment.restored, experiment.untouched) else "ARE NOT"
    findings = f"""\
Next hour: the LSTM's error is lower than that of 'as now' by {min(gains):.0%} to {max(gains):.0%}.
Next 24 hours: {lstm.mean():.2f} °C against {now.mean():.2f} for 'as now' and {yesterday.mean():.2f} for 'as yesterday'; \
in the 24th hour {lstm[-1]:.2f} against {now[-1]:.2f} and {yesterday[-1]:.2f}.
Yours alone: the sessions' single steps differ from one Keras call over each user's whole series by at most \
{from_keras:.1e} °C. {name}'s forecasts beside the others {alone} those of {name} alone.
State by hand: {other}'s state moves {name}'s next-hour forecasts by up to {others.max():.2f} °C, zeros by up to \
{zeros.max():.2f} °C; on the second day by at most {others[DAY:].max():.2f} and {zeros[DAY:].max():.2f} °C.
With the saved state put back, {name}'s forecasts {restored} those of the fork that nobody touched."""
    bullets = Table.grid(padding=(0, 1))
    for finding in findings.splitlines():
        bullets.add_row("•", finding)
    console.print(bullets)


def plot(path: Path, logs: list[Log], experiment: Experiment) -> None:
    """Draw one panel for each user, the errors by hours ahead, and the experiment with the state."""
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}):
        figure = plt.figure(figsize=(12, 13), layout="constrained")
        figure.suptitle(
            "Three users, one LSTM, three sessions: the temperature at New York's airports", fontsize=15
        )
        grid = figure.add_gridspec(4, 2, height_ratios=(1, 1, 1, 1.1))
        for row, (log, colour) in enumerate(zip(logs, COLOURS, strict=True)):
            plot_user(figure.add_subplot(grid[row, :]), log, colour, legend=row == 0)
        plot_errors(figure.add_subplot(grid[3, 0]), logs)
        plot_experiment(figure.add_subplot(grid[3, 1]), experiment, logs)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def plot_user(axes: Axes, log: Log, colour: str, *, legend: bool) -> None:
    """Draw a user's last days: what came, the next-hour forecasts and one 24-hour forecast a day."""
    shown = range(HOURS - SHOWN, HOURS)
    times = dates(log, shown)
    axes.plot(times, log.observed[-SHOWN:], color=INK, lw=1.4, label="what came")
    axes.plot(times, log.next_hour[-SHOWN - 1 : -1], ".", ms=5, color=colour, label="forecast an hour before")
    for hour in shown[::DAY]:
        ahead = dates(log, range(hour + 1, hour + 1 + DAY))
        labels = ("24 hours ahead, from a fork", "as yesterday") if hour == shown[0] else (None, None)
        axes.plot(ahead, log.next_day[hour], color=colour, lw=2.2, alpha=0.65, label=labels[0])
        axes.plot(ahead, log.truth(hour, -DAY), ":", color=GREY, lw=1.6, label=labels[1])
        axes.axvline(ahead[0], color=GREY, lw=0.6, alpha=0.5)
    axes.set_title(log.title, color=colour, fontweight="bold")
    axes.set_ylabel("temperature (°C)")
    axes.xaxis.set_major_locator(mdates.DayLocator())
    axes.xaxis.set_major_formatter(mdates.DateFormatter("%d %b %Y\n%H:%M UTC", tz="UTC"))
    if legend:
        axes.legend(ncols=4, loc="lower right", frameon=False, bbox_to_anchor=(1, 0.98))


def dates(log: Log, hours: range) -> Floats:
    """Turn a log's hours into matplotlib's dates."""
    return np.asarray(mdates.date2num([time_of(log.user.first_hour + hour) for hour in hours]))


def plot_errors(axes: Axes, logs: list[Log]) -> None:
    """Draw the mean absolute error by hours ahead, over all users."""
    for method, line, colour in (("LSTM", "-", INK), ("as now", "--", GREY), ("as yesterday", ":", GREY)):
        errors = np.mean([day_ahead_errors(log, method) for log in logs], axis=0)
        axes.plot(range(1, DAY + 1), errors, line, color=colour, lw=2, label=method)
    axes.set_title("How far ahead it can see: all three users", fontweight="bold")
    axes.set_xlabel("hours ahead")
    axes.set_ylabel("mean absolute error (°C)")
    axes.set_xticks([1, 6, 12, 18, 24])
    axes.set_ylim(0)
    axes.legend(frameon=False, loc="lower right")


def plot_experiment(axes: Axes, experiment: Experiment, logs: list[Log]) -> None:
    """Draw how far a wrong state moves a user's forecasts, and for how long."""
    name, other = logs[0].user.name, logs[-1].user.name
    for run, colour, label in (
        (experiment.others, COLOURS[2], f"with {other}'s state"),
        (experiment.zeros, GREY, "with zeros"),
        (experiment.restored, COLOURS[0], f"with {name}'s own, put back"),
    ):
        axes.plot(range(1, COMING + 1), run - experiment.untouched, color=colour, lw=2, label=label)
    axes.set_title(f"{name}'s state, set by hand", fontweight="bold")
    axes.set_xlabel("hours of her own weather since")
    axes.set_ylabel("next-hour forecast moves by (°C)")
    axes.set_xticks(range(0, COMING + 1, 12))
    axes.legend(frameon=False, loc="lower right")
