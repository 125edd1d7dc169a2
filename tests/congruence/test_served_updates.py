"""New weights under load: no step fails, and from the change on outputs are Keras's with them and the carried states."""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import pytest

import stepwell
from support.models import programs
from support.servers.both_fronts import needs_native
from support.servers.fork_server import ForkedServer

pytestmark = pytest.mark.plain("it loads models, for which a secured server wants an admin")
SESSIONS, FEATURES, UNITS = 1000, 8, 64
LIMIT_S = 200.0
TOLERANCE = 1e-5


def build(seed: int) -> Any:
    """LSTM(64) with a dense layer."""
    import keras

    keras.utils.set_random_seed(seed)
    x = keras.Input((None, FEATURES), name="x")
    y = keras.layers.LSTM(UNITS, return_sequences=True, name="lstm")(x)
    return keras.Model(x, keras.layers.Dense(4, name="y")(y))


class Frames:
    """A thread that steps sessions in frames, and keeps what was sent and answered."""

    def __init__(self, group: stepwell.SessionGroup) -> None:
        self._group, self._numbers = group, np.random.default_rng(5)
        self.told: list[tuple[Any, Any, int]] = []
        """Inputs, outputs and the version that answered."""
        self.more = threading.Condition()
        self._stop, self._error = False, ""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def wait(self, frames: int) -> None:
        """Return when this many more are answered."""
        with self.more:
            wanted = len(self.told) + frames
            assert self.more.wait_for(lambda: len(self.told) >= wanted or self._error, LIMIT_S)
        assert not self._error, self._error

    def stop(self) -> None:
        self._stop = True
        self._thread.join()
        assert not self._error, self._error

    def _run(self) -> None:
        while not self._stop:
            x = self._numbers.standard_normal((SESSIONS, FEATURES)).astype(np.float32)
            told = []
            try:
                y = np.asarray(self._group.step(x)).copy()
                (version,) = set(self._group.model_versions.tolist())
                told = [(x, y, version)]
            except (stepwell.StepwellError, ValueError) as error:
                self._error, self._stop = f"{type(error).__name__}: {error}", True
            with self.more:
                self.told += told
                self.more.notify_all()


@pytest.mark.parametrize("front", [pytest.param("native", marks=needs_native), "python"])
def test_no_step_fails_and_all_are_those_of_keras(front: str) -> None:
    kept = programs.kept_with(__file__)
    saved = [programs.saved(f"update-{seed}", functools.partial(build, seed), kept=kept) for seed in (1, 2)]
    options = ["--front", front]
    with (
        ForkedServer({"m": saved[0].path}, extra_args=options, cache_dir=programs.cache_dir()) as server,
        stepwell.connect(server.address, timeout_s=LIMIT_S) as client,
    ):
        frames = Frames(client.open_sessions("m", SESSIONS))
        frames.wait(5)
        updated = client.update_model("m", saved[1].path, timeout_s=LIMIT_S)
        frames.wait(5)
        frames.stop()
    versions = [version for _, _, version in frames.told]
    assert versions == sorted(versions)
    assert set(versions) == {1, updated.version}
    assert updated.moved_sessions == SESSIONS
    layers = [_layers(each.path) for each in saved]
    states = [np.zeros((SESSIONS, UNITS), np.float32)] * 2
    for x, y, version in frames.told:
        cell, dense = layers[version - 1]
        out, states = cell(x, states)
        np.testing.assert_allclose(y, np.asarray(dense(out)), atol=TOLERANCE)


def _layers(path: Any) -> tuple[Any, Any]:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    model = keras.models.load_model(path)
    return model.get_layer("lstm").cell, model.get_layer("y")
