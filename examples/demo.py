"""The demo: train an LSTM in batches, serve it, and let three users live with it, one hour at a time.

Ana, Ben and Chloe each watch the temperature at an airport of New York. Each has a session, and the server
keeps what the model remembers of each one's weather. Run it with `make demo`; it takes about a minute.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import demo_report
import forecaster
import numpy as np
from demo_report import DAY, HISTORY, HOURS, Experiment, Log, User
from quiet import keras
from rich.console import Console
from rich.progress import Progress
from weather import Floats, features, hour_of, load_temperatures

from stepwell.aio import AsyncClient, connect
from stepwell.aio_session import AsyncSession
from stepwell.testing import LocalServer

OUT = Path("out")
MODEL = OUT / "temperature.keras"
PLOT = OUT / "demo.png"
TRAINED_UNTIL = hour_of(2013, 10, 1)  # nothing after this hour is shown to the model before it is served
USERS = (
    User("Ana", "newark", hour_of(2013, 10, 8)),
    User("Ben", "kennedy", hour_of(2013, 11, 8)),
    User("Chloe", "laguardia", hour_of(2013, 12, 8)),
)
LOOK_AHEAD_EVERY = 6  # hours


def main() -> None:
    """Run the demo."""
    console, started = Console(highlight=False), time.monotonic()
    series = load_temperatures()
    console.rule("Train in batches: three airports, January to September 2013")
    model = forecaster.train(series, TRAINED_UNTIL, console)
    forecaster.save(model, MODEL)
    console.rule("Serve it: three users at once, one hour at a time")
    console.print(f"starting a server process, which compiles {MODEL}")
    with (
        tempfile.TemporaryDirectory() as sessions,
        LocalServer(models={"temperature": MODEL}, data_dir=sessions) as server,
    ):
        console.print(f"served at {server.address}; half way through it is killed and started again")
        logs, experiment = asyncio.run(serve_users(server, series, console))
    console.rule("What was seen")
    demo_report.print_errors(console, logs)
    demo_report.plot(PLOT, logs, experiment)
    from_keras = difference_from_keras(model, logs)
    demo_report.print_findings(console, logs, experiment, from_keras)
    console.print(f"\nThe plot is in {PLOT}. All of this took {time.monotonic() - started:.0f} s.")
    if from_keras > 1e-4 or not experiment.undisturbed(logs[0]):
        sys.exit("A session was disturbed: see above.")


async def serve_users(
    server: LocalServer, series: dict[str, Floats], console: Console
) -> tuple[list[Log], Experiment]:
    """Let the users live at the same time, then set one's state by hand."""
    async with connect(server.address) as client:
        sessions = [await client.open_session("temperature", session_id=user.name) for user in USERS]
        logs = [Log(user, series[user.airport]) for user in USERS]
        with Progress(*forecaster.progress_columns(), console=console) as progress:
            lives = [live(session, log, progress) for session, log in zip(sessions, logs, strict=True)]
            await asyncio.gather(crash(server, logs[0], console), *lives)
        experiment = await set_state_by_hand(sessions[0], sessions[2], logs[0])
        experiment.alone = await live_alone(client, logs[0])
    return logs, experiment


async def live(session: AsyncSession, log: Log, progress: Progress) -> None:
    """Feed a user's session hour by hour and write down what it says of the next hour, and of the next day."""
    weather = features(log.observed, log.user.first_hour)
    for hour in progress.track(range(HOURS), description=log.title):
        forecast = await next_hour(session, weather[hour : hour + 1])
        log.next_hour.append(float(forecast[0, 0]))
        if hour == HOURS // 2:
            log.half_way.set()
        if hour >= HISTORY and hour % LOOK_AHEAD_EVERY == 0:
            log.next_day[hour] = await look_ahead(session, forecast, log.user.first_hour + hour)


async def crash(server: LocalServer, log: Log, console: Console) -> None:
    """Kill the server (`kill -9`) while a user is half way, and start it again; nobody's session notices."""
    await log.half_way.wait()
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.restart)
    console.print(f"killed at hour {len(log.next_hour)} of {log.user.name}, and started again")


async def next_hour(session: AsyncSession, weather: Floats) -> Floats:
    """Feed an hour (1, 3), or several (1, hours, 3); returns the forecasts for the hour after each."""
    return np.asarray(await session.step(weather), np.float32)


async def look_ahead(session: AsyncSession, forecast: Floats, hour: int) -> list[float]:
    """Forecast a day by feeding the model its own forecasts, in a fork: the session itself is not touched."""
    path = [float(forecast[0, 0])]
    async with session.fork() as twin:
        for ahead in range(1, DAY):
            forecast = await next_hour(twin, features(forecast[:, 0], hour + ahead))
            path.append(float(forecast[0, 0]))
    return path


async def set_state_by_hand(session: AsyncSession, other: AsyncSession, log: Log) -> Experiment:
    """Show a user's next two days to her own state, to another user's, to zeros, and to her own again."""
    weather = features(log.coming, log.user.first_hour + HOURS)[None]  # (1, 48, 3): 48 hours in one step
    own, others = await session.get_state(), await other.get_state()
    async with session.fork() as twin:
        untouched = await next_hour(twin, weather)
    await session.reset_states(others)
    with_others = await next_hour(session, weather)
    await session.reset_states()
    with_zeros = await next_hour(session, weather)
    await session.reset_states(own)
    restored = await next_hour(session, weather)
    runs = np.concatenate([untouched, with_others, with_zeros, restored])
    return Experiment(*runs[..., 0])


async def live_alone(client: AsyncClient, log: Log) -> list[float]:
    """Feed the same hours to a new session while nobody else steps."""
    weather = features(log.observed, log.user.first_hour)
    async with client.open_session("temperature") as session:
        return [float((await next_hour(session, row[None]))[0, 0]) for row in weather]


def difference_from_keras(model: keras.Model, logs: list[Log]) -> float:
    """Compare what the sessions said, step by step, with one call of the Keras model for each user's whole series."""
    weather = np.stack([features(log.observed, log.user.first_hour) for log in logs])
    said = np.array([log.next_hour for log in logs])
    return float(np.abs(model.predict(weather, verbose=0)[..., 0] - said).max())


if __name__ == "__main__":
    main()
