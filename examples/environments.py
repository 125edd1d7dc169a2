"""Reinforcement learning: one session of batch size N is a vectorised simulator with a memory for each row.

Sixteen houses stand in weather that the served model dreams: it is fed its own forecasts, with some noise. An
agent heats them. When an episode ends, that row alone gets a new past: the state after three days of real
weather. The other rows dream on.

The server: `make demo` trains the model, `stepwell serve temperature=out/temperature.keras` serves it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from weather import features, hour_of, load_temperatures

import stepwell

HOUSES = 16
STEPS = 400
PAST = 72  # hours of real weather before an episode
FROST_C, COMFORT_C = 12.0, 20.0
HEATER_C, LEAK, NOISE_C = 1.5, 0.05, 0.7  # °C an hour at full power; share of the difference lost; per hour

Values = npt.NDArray[np.floating]
Rows = npt.NDArray[np.intp]
Policy = Callable[[Values], Values]


@dataclass
class Pasts:
    """Real weather to begin an episode with: the temperature now, and the model's state after it."""

    celsius: Values
    state: stepwell.State

    @classmethod
    def remembered(cls, client: stepwell.Client, days: int = 60) -> Pasts:
        """Let the model see each past once, without a session: all of them are one batch of Predict."""
        series = load_temperatures()["laguardia"]
        starts = [hour_of(2013, 10, 1) + 24 * day for day in range(days)]
        past = np.stack([features(series[start : start + PAST], start) for start in starts])
        forecast, state = client.predict(
            "temperature", past
        )  # each starts at midnight, and so ends at midnight
        return cls(np.asarray(forecast)[:, -1, 0], state)


class Houses:
    """The environment: `reset` and `step` as in other vectorised environments."""

    def __init__(self, session: stepwell.Session, pasts: Pasts, seed: int = 0) -> None:
        self._session, self._pasts = session, pasts
        self._random = np.random.default_rng(seed)
        self._outside, self._inside = np.zeros(HOUSES), np.zeros(HOUSES)
        self._hour, self._last = np.zeros(HOUSES, int), np.zeros(HOUSES, int)
        self.reset(np.arange(HOUSES))

    def reset(self, rows: Rows) -> None:
        """Begin new episodes in these rows: each with another past, and 24 to 72 hours long."""
        chosen = self._random.integers(len(self._pasts.celsius), size=len(rows))
        states = {name: tensor[chosen] for name, tensor in self._pasts.state.items()}
        self._session.reset_states(states, rows=rows.tolist())
        self._outside[rows], self._inside[rows] = self._pasts.celsius[chosen], COMFORT_C
        self._hour[rows], self._last[rows] = 0, self._random.integers(24, 73, size=len(rows))

    def step(self, heating: Values) -> tuple[Values, Values, Rows]:
        """Heat for an hour with powers from 0 to 1; returns temperatures, rewards and the rows that ended."""
        angle = 2 * np.pi * self._hour / 24
        dreamt = self._session.step(np.stack([self._outside, np.sin(angle), np.cos(angle)], axis=-1))
        self._outside = np.asarray(dreamt)[:, 0] + self._random.normal(0, NOISE_C, HOUSES)
        self._inside += LEAK * (self._outside - self._inside) + HEATER_C * heating
        self._hour += 1
        reward = -heating - 0.2 * np.abs(self._inside - COMFORT_C)
        ended = np.flatnonzero((self._inside < FROST_C) | (self._hour >= self._last))
        return self._inside.copy(), reward, ended


def thermostat(celsius: float) -> Policy:
    """Heat in proportion to what is missing."""
    return lambda inside: np.clip(celsius - inside, 0.0, 1.0)


def run(houses: Houses, policy: Policy) -> tuple[float, int]:
    """Run a policy; returns its mean reward an hour and the number of episodes that ended."""
    inside, rewards, episodes = np.full(HOUSES, COMFORT_C), [], 0
    for _ in range(STEPS):
        inside, reward, ended = houses.step(policy(inside))
        rewards.append(reward.mean())
        episodes += len(ended)
        houses.reset(ended)
        inside[ended] = COMFORT_C
    return float(np.mean(rewards)), episodes


def main() -> None:
    """Compare three thermostats in the same dreams."""
    with stepwell.connect() as client:
        pasts = Pasts.remembered(client)
        for celsius in (10.0, 17.0, 20.0):
            with client.open_session("temperature", batch_size=HOUSES) as session:
                reward, episodes = run(Houses(session, pasts), thermostat(celsius))
            print(f"thermostat at {celsius:.0f} °C: reward {reward:6.3f} an hour, {episodes} episodes")


if __name__ == "__main__":
    main()
