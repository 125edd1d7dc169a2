"""Look into the hidden states of two users while they are served: what each forecast remembers, hour by hour.

Run it after `make demo`, which trains the model: `python examples/hidden_state.py [MODEL [PICTURE]]`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import numpy as np
from weather import AIRPORTS, Floats, features, hour_of, load_temperatures, time_of

import stepwell
from stepwell.testing import LocalServer

mpl.use("Agg")
import matplotlib.pyplot as plt

DAY, DAYS = 24, 6
WARM_UP = 7 * DAY
USERS = {"Ana": ("newark", hour_of(2013, 10, 22)), "Ben": ("kennedy", hour_of(2013, 12, 19))}


def main() -> None:
    """Serve two users day by day, kill the server half way, and draw what their sessions said and held."""
    model, picture = (*sys.argv[1:], *("out/temperature.keras", "out/hidden-state.png")[len(sys.argv) - 1 :])
    series = load_temperatures()
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalServer(models={"temperature": model}, data_dir=folder) as server,
        stepwell.connect(server.address) as client,
    ):
        days: dict[str, list[stepwell.Trace]] = {name: [] for name in USERS}
        sessions = {name: client.open_session("temperature", session_id=name) for name in USERS}
        for name, (airport, first) in USERS.items():
            weather = features(series[airport][first - WARM_UP : first], first - WARM_UP)
            sessions[name].step(weather[None], time="last")
        for day in range(DAYS):
            if day == DAYS // 2:
                server.kill()  # kill -9; the sessions are on disk, and nobody below notices
                server.restart()
            for name, (airport, first) in USERS.items():
                hour = first + day * DAY
                weather = features(series[airport][hour : hour + DAY], hour)
                days[name].append(sessions[name].trace(weather[None]))
    draw(Path(picture), series, days)
    print(f"The picture is in {picture}")


def draw(path: Path, series: dict[str, Floats], days: dict[str, list[stepwell.Trace]]) -> None:
    """Above, the temperature and its one-hour-ahead forecast; below, the LSTM's hidden state."""
    hours = np.arange(DAYS * DAY)
    figure, axes = plt.subplots(
        2, len(days), figsize=(12, 4.6), sharex="col", height_ratios=(1, 1.15), layout="constrained"
    )
    for column, (name, traces) in enumerate(days.items()):
        (above, below), (airport, first) = axes[:, column], USERS[name]
        came = series[airport][first + 1 : first + 1 + len(hours)]
        forecast = np.concatenate([np.asarray(trace.outputs)[0, :, 0] for trace in traces])
        hidden = np.concatenate([trace.states["lstm/h"][0] for trace in traces])
        above.plot(hours, came, color="#22262b", linewidth=1.3, label="temperature, °C")
        above.plot(hours, forecast, ".", color="#c1440e", markersize=3.5, label="one-hour-ahead forecast")
        above.set_title(f"{name} at {AIRPORTS[airport]}", loc="left", fontweight="bold")
        order = np.argsort(hidden[:DAY].argmax(axis=0))  # units by when they peak in a day
        below.imshow(hidden.T[order], aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        below.set_ylabel("units of lstm/h")
        below.set_yticks([])
        ticks = hours[::DAY]
        below.set_xticks(ticks, [f"{time_of(first + int(hour)):%d %b}" for hour in ticks])
        for axis in (above, below):
            axis.axvline(DAYS // 2 * DAY, color="#22262b", linewidth=1, linestyle=(0, (4, 3)))
        above.spines[["top", "right"]].set_visible(False)
        above.set_title("server killed and restarted", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
