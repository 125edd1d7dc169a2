"""A temporal convolutional network that forecasts the temperature, with a session for each airport.

`python examples/tcn_forecaster.py` trains the network on ten months of hourly temperatures, in about 20 seconds. Then it
serves the network as Keras saved it, and steps three sessions hour by hour through the next two months. After each hour
a session forecasts the temperature in 1, 6 and 24 hours. The network looks back over 127 hours, and no session sends an
hour twice: the server keeps what each convolution needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from quiet import keras
from rich.console import Console
from rich.table import Table
from weather import AIRPORTS, Floats, features, hour_of, load_temperatures

import stepwell
from stepwell.testing import LocalServer

AHEAD = (1, 6, 24)  # hours
DILATIONS = (1, 2, 4, 8, 16, 32)
FILTERS, KERNEL = 24, 3
REACH = 1 + (KERNEL - 1) * sum(DILATIONS)  # hours that a forecast depends on
WINDOW, BATCH_SIZE = 360, 16  # hours of a training sequence; sequences of a batch
NOVEMBER = hour_of(2013, 11, 1)


def build_model() -> keras.Model:
    """Build an ordinary Keras model of causal convolutions: any batch size, any number of hours."""
    inputs = keras.Input((None, 3), name="weather")  # °C, sine and cosine of the time of day
    x = keras.layers.Rescaling([0.1, 1.0, 1.0], offset=[-1.2, 0.0, 0.0])(inputs)
    x = keras.layers.Dense(FILTERS, name="mix")(x)
    for dilation in DILATIONS:
        y = keras.layers.Conv1D(
            FILTERS,
            KERNEL,
            padding="causal",
            dilation_rate=dilation,
            activation="relu",
            name=f"back_{dilation}",
        )(x)
        x = keras.layers.Add()([x, keras.layers.Dense(FILTERS)(y)])
    change = keras.layers.Dense(len(AHEAD), name="change")(keras.layers.LayerNormalization()(x))
    return keras.Model(inputs, keras.layers.Add(name="forecast")([inputs[..., :1], change]))  # °C


def train(series: Mapping[str, Floats], epochs: int) -> keras.Model:
    """Fit the model on the hours before November. A forecast whose network saw fewer than 127 hours does not count."""
    keras.utils.set_random_seed(33)
    inputs, targets = [], []
    for celsius in series.values():
        for first in range(0, NOVEMBER - WINDOW - max(AHEAD), 48):
            inputs.append(features(celsius[first : first + WINDOW], first))
            targets.append(shifted(celsius, first, first + WINDOW))
    counts = np.zeros((len(inputs), WINDOW), np.float32)
    counts[:, REACH:] = 1
    model = build_model()
    steps = epochs * -(-len(inputs) // BATCH_SIZE)
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.004, steps)), loss="mae")
    model.fit(
        np.stack(inputs),
        np.stack(targets),
        sample_weight=counts,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        verbose=0,
    )
    return model


def shifted(celsius: Floats, first: int, end: int) -> Floats:
    """Return the temperatures that forecasts made in these hours are about: (hours, forecasts)."""
    return np.stack([celsius[first + ahead : end + ahead] for ahead in AHEAD], axis=-1)


def forecasts(client: stepwell.Client, series: Mapping[str, Floats], first: int, end: int) -> Floats:
    """Step a session for each airport hour by hour; return (airports, hours, forecasts)."""
    with client.open_sessions("tcn", len(series)) as sessions:
        inputs = np.stack([features(celsius[first:end], first) for celsius in series.values()])
        return np.stack([sessions.step(inputs[:, hour]) for hour in range(end - first)], axis=1)


def errors(found: Floats, series: Mapping[str, Floats], first: int, end: int) -> dict[str, list[float]]:
    """Return the mean error of each forecast in °C: of the network, and of two forecasts that need none."""
    celsius = np.stack(list(series.values()))
    actual = np.stack([shifted(each, first, end) for each in celsius])
    now = celsius[:, first:end, None]
    yesterday = np.stack([celsius[:, first + ahead - 24 : end + ahead - 24] for ahead in AHEAD], axis=-1)
    all_of_them = {"TCN": found, "as now": now, "as a day before": yesterday}
    return {name: np.abs(each - actual).mean((0, 1)).tolist() for name, each in all_of_them.items()}


def main() -> None:
    """Train, serve, step, compare."""
    parser = argparse.ArgumentParser(description="Forecast temperatures by a TCN with a session per airport.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--model", type=Path, default=Path("out/tcn.keras"))
    options = parser.parse_args()
    console, series = Console(), load_temperatures()
    console.print(f"Training a TCN on {NOVEMBER:,} hours of {', '.join(AIRPORTS.values())}")
    model = train(series, options.epochs)
    options.model.parent.mkdir(parents=True, exist_ok=True)
    model.save(options.model)
    first, end = NOVEMBER - REACH, min(map(len, series.values())) - max(AHEAD)
    with (
        LocalServer({"tcn": options.model}, start_timeout_s=100) as server,
        stepwell.connect(server.address) as client,
    ):
        info = client.model("tcn")
        found = forecasts(client, series, first, end)
    console.print(
        f"A session keeps {info.state_row_bytes:,} bytes, of which an hour replaces {info.changed_state_row_bytes:,}"
    )
    whole = model.predict(
        np.stack([features(celsius[first:end], first) for celsius in series.values()]), verbose=0
    )
    difference = float(np.abs(found - whole).max())
    assert difference < 1e-3, f"one call of Keras over all hours differs by {difference} °C"
    console.print(f"One call of Keras over all {end - first:,} hours differs by at most {difference:.1g} °C")
    table = Table("mean error from November on, °C", *(f"in {ahead} h" for ahead in AHEAD))
    means = errors(found[:, REACH:], series, NOVEMBER, end)
    for name, row in means.items():
        table.add_row(name, *(f"{value:.2f}" for value in row))
    console.print(table)
    naive = np.minimum(means["as now"], means["as a day before"])
    assert np.all(means["TCN"] < naive), "the network must beat forecasts that need no network"
    less = ", ".join(f"{1 - tcn / other:.0%}" for tcn, other in zip(means["TCN"], naive, strict=True))
    console.print(f"The TCN's errors are {less} smaller than those of the better of the two others")


if __name__ == "__main__":
    main()
