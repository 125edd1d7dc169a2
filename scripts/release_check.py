"""Step a session with what is installed, and hold it against Keras. Runs in the bare environment of scripts/release.py."""

from __future__ import annotations

import sys
import tempfile
from importlib import metadata
from pathlib import Path

import keras
import numpy as np
import stepwell_front

import stepwell
import stepwell_server
from stepwell.testing import LocalServer


def main(version: str) -> None:
    """Serve a model through the native front: its outputs and its versions must be right."""
    folder = Path(sys.prefix)
    modules = [Path(str(module.__file__)) for module in (stepwell, stepwell_front, stepwell_server)]
    if not all(module.is_relative_to(folder) for module in modules):
        raise SystemExit(f"every module must come from {folder}; got {modules}")
    layers = [keras.Input((None, 3)), keras.layers.LSTM(8, return_sequences=True), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    inputs = np.random.default_rng(7).random((1, 5, 3), np.float32)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "forecast.keras")
        model.save(path)
        options = ["--front", "native"]
        with (
            LocalServer(models={"forecast": path}, start_timeout_s=1000, extra_args=options) as server,
            stepwell.connect(server.address) as client,
            client.open_session("forecast") as session,
        ):
            outputs = np.stack([session.step(inputs[:, time]) for time in range(5)], axis=1)
            front = client.server_info().front
    found = (front, metadata.version("stepwell"), stepwell_front.__version__)
    if found != ("native", version, version):
        raise SystemExit(f"must be the native front and twice {version}; got {found}")
    np.testing.assert_allclose(outputs, model(inputs), atol=1e-6)
    print(f"stepwell {version}: five steps through the native front equal Keras")


if __name__ == "__main__":
    main(sys.argv[1])
