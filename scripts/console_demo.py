"""Train and compile the model of `stepwell console --demo`, into server/stepwell_server/console/demo.stepwell.

Run it after a change of the format of `.stepwell` or of the readings; it takes a minute.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from stepwell.cli.console_demo import Floats, model_file, readings

UNITS = 32
WINDOW = 120
SEQUENCES = 768
EPOCHS = 14


def series(random: np.random.Generator) -> Floats:
    """Return the readings of a user that is not in the demo."""
    period = float(random.uniform(18, 72))
    values = readings(period, int(random.integers(1 << 30)), bursts=bool(random.random() < 0.4))
    return np.array(list(itertools.islice(values, WINDOW + 1)), np.float32)


def main() -> None:
    """Train, compile, write."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    keras.utils.set_random_seed(32)
    random = np.random.default_rng(32)
    known = np.stack([series(random) for _ in range(SEQUENCES)])[..., None]
    inputs = keras.Input((None, 1), name="reading")
    hidden = keras.layers.LSTM(UNITS, return_sequences=True, name="memory")(inputs)
    outputs = keras.layers.Dense(1, name="next_reading")(hidden)
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.004), loss="mse")
    model.fit(known[:, :-1], known[:, 1:], batch_size=32, epochs=EPOCHS, verbose=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "readings.keras"
        model.save(path)
        command = [sys.executable, "-m", "stepwell", "compile", str(path), "--output", str(model_file())]
        subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "0"})


if __name__ == "__main__":
    main()
