"""The demo's data: a year of hourly temperatures at New York's three airports (see data/README.md)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

START = datetime(2013, 1, 1, 6, tzinfo=UTC)
AIRPORTS = {"newark": "Newark", "kennedy": "Kennedy", "laguardia": "LaGuardia"}


def load_temperatures() -> dict[str, Floats]:
    """Read airport -> temperature in °C, one value an hour from START on."""
    path = Path(__file__).parent / "data" / "temperature.csv"
    table = np.loadtxt(path, np.float32, delimiter=",", skiprows=1)
    return {airport: table[:, 1 + column] for column, airport in enumerate(AIRPORTS)}


def hour_of(year: int, month: int, day: int, hour: int = 0) -> int:
    """Count the hours from START to a time in UTC."""
    return int((datetime(year, month, day, hour, tzinfo=UTC) - START).total_seconds()) // 3600


def time_of(hour: int) -> datetime:
    """Turn an hour since START back into a time."""
    return START + timedelta(hours=hour)


def features(celsius: Floats, first_hour: int) -> Floats:
    """Make the model's inputs ``(hours, 3)``: temperature in °C, and the time of day as sine and cosine."""
    hours = START.hour + first_hour + np.arange(len(celsius))
    angle = 2 * np.pi * hours / 24
    return np.stack([celsius, np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)
