"""Many users at once with asyncio. Steps awaited at the same time leave together, as one message.

The server: `make demo` trains the model, `stepwell serve temperature=out/temperature.keras` serves it.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np
from weather import AIRPORTS, Floats, features, hour_of, load_temperatures

import stepwell
from stepwell.aio import AsyncClient

USERS = 200
HOURS = 48


async def main() -> None:
    """Let all users live two days at the same time, and the first of them once more, alone."""
    async with stepwell.aio.connect() as client:
        started = time.monotonic()
        said = await asyncio.gather(*(live(client, user) for user in range(USERS)))
        seconds = time.monotonic() - started
        alone = await live(client, 0)
    print(
        f"{USERS} users came, made {HOURS} steps each and went: {USERS * HOURS / seconds:,.0f} steps a second"
    )
    assert np.array_equal(said[0], alone), "a user must be told the same whoever else is there"
    print("the first user was told the same, bit for bit, as when nobody else was there")


async def live(client: AsyncClient, user: int) -> Floats:
    """Open a session, feed it a user's hours one after the other, and return what it said of the next ones."""
    weather = weather_of(user)
    async with client.open_session("temperature") as session:
        return np.concatenate([np.asarray(await session.step(hour[None])) for hour in weather])


def weather_of(user: int) -> Floats:
    """Choose an airport and a day of the last quarter of the year; (HOURS, 3)."""
    series = SERIES[list(AIRPORTS)[user % len(AIRPORTS)]]
    first = hour_of(2013, 10, 1) + 7 * user
    return features(series[first : first + HOURS], first)


SERIES = load_temperatures()

if __name__ == "__main__":
    asyncio.run(main())
