"""The demo's model: a small LSTM that says what the temperature will be in an hour, trained in batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np
from quiet import keras
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from weather import Floats, features

UNITS = 32
WINDOW = 72  # hours of one training sequence
BATCH_SIZE = 32
EPOCHS = 12


def build_model() -> keras.Model:
    """Build an ordinary Keras model: any batch size, any number of hours, nothing about sessions in it."""
    inputs = keras.Input((None, 3), name="weather")  # °C, sine and cosine of the time of day
    scaled = keras.layers.Rescaling([0.1, 1.0, 1.0], offset=[-1.2, 0.0, 0.0])(inputs)
    hidden = keras.layers.LSTM(UNITS, return_sequences=True, name="lstm")(scaled)
    change = keras.layers.Dense(1, name="change")(hidden)
    outputs = keras.layers.Add(name="next_hour")([inputs[..., :1], change])  # °C
    return keras.Model(inputs, outputs)


def training_windows(series: Mapping[str, Floats], until: int) -> tuple[Floats, Floats]:
    """Cut the hours before ``until`` into sequences ``(windows, WINDOW, 3)`` and the temperature an hour later."""
    inputs, targets = [], []
    for celsius in series.values():
        for first in range(0, until - WINDOW, 12):
            inputs.append(features(celsius[first : first + WINDOW], first))
            targets.append(celsius[first + 1 : first + WINDOW + 1, None])
    return np.stack(inputs), np.stack(targets)


def train(series: Mapping[str, Floats], until: int, console: Console, epochs: int = EPOCHS) -> keras.Model:
    """Fit the model on every airport's hours before ``until``."""
    keras.utils.set_random_seed(2013)
    inputs, targets = training_windows(series, until)
    model = build_model()
    steps = epochs * -(-len(inputs) // BATCH_SIZE)
    model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.005, steps)), loss="mse")
    with FitProgress(console, epochs) as progress:
        model.fit(inputs, targets, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=[progress])
    return model


def save(model: keras.Model, path: Path) -> None:
    """Save the model as the one file that the server takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)


def progress_columns() -> tuple[ProgressColumn, ...]:
    """Choose what a progress bar of the demo shows."""
    return TextColumn("{task.description:<24}"), BarColumn(), TimeElapsedColumn()


class FitProgress(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """A progress bar for ``fit``."""

    def __init__(self, console: Console, epochs: int) -> None:
        super().__init__()
        self.progress = Progress(*progress_columns(), console=console)
        self.task = self.progress.add_task("training", total=epochs)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        error = (logs or {})["loss"] ** 0.5
        self.progress.update(self.task, advance=1, description=f"epoch {epoch + 1}, error {error:.2f} °C")
