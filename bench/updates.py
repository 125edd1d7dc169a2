"""New weights for a model that serves: what its callers notice, and how soon they meet them."""

from __future__ import annotations

import io
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Self

import h5py
import numpy as np

import stepwell
from bench import harness
from bench.harness import Key, Measure, Point, Result, measured
from bench.loads import Plan

SESSIONS = 1000
_FEATURES = harness.MODELS["small"][1]
_LIMIT_S = 120.0
_AROUND_S = 0.5
"""On both sides of the answer that the default has moved."""


class Weights:
    """Files of one model, each with other weights."""

    def __init__(self, source: Path, folder: Path) -> None:
        self._source, self._folder, self._count = source, folder, 0

    def next(self) -> Path:
        """One more."""
        self._count += 1
        path = self._folder / f"{self._count}.keras"
        with zipfile.ZipFile(self._source) as before, zipfile.ZipFile(path, "w") as after:
            for name in before.namelist():
                content = before.read(name)
                after.writestr(name, self._changed(content) if name.endswith(".h5") else content)
        return path

    def _changed(self, content: bytes) -> bytes:
        numbers, buffer = np.random.default_rng(), io.BytesIO(content)
        with h5py.File(buffer, "r+") as file:

            def change(_name: str, found: object) -> None:
                if isinstance(found, h5py.Dataset) and found.ndim:
                    found[...] = found[...] * numbers.uniform(0.9, 1.1, found.shape)

            file.visititems(change)
        return buffer.getvalue()


class Stepping:
    """A thread that steps a group in frames, one after the other."""

    def __init__(self, client: stepwell.Client) -> None:
        self._group = client.open_sessions("small", SESSIONS)
        self._x = np.zeros((SESSIONS, _FEATURES), np.float32)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.calls: list[tuple[float, float]] = []
        """When each began and ended."""
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                began = time.perf_counter()
                self._group.step(self._x)
                self.calls.append((began, time.perf_counter()))
        except stepwell.StepwellError as error:
            self.error = error

    def p99_ms(self, low: float, high: float) -> float:
        """Of the calls that were under way between two times."""
        taken = [end - begin for begin, end in list(self.calls) if end > low and begin < high]
        return float(np.quantile(taken, 0.99)) * 1e3


def updates(plan: Plan) -> list[Point]:
    """New weights of LSTM(64): beside 1,000 sessions that are carried, and on an idle server up to the first step with them."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name, harness.serve("small") as server:
        weights = Weights(harness.model_path("small"), Path(name))
        with stepwell.connect(server.address, timeout_s=_LIMIT_S) as client:
            client.update_model(
                "small", weights.next(), timeout_s=_LIMIT_S
            )  # the compiler is warm from here on

            def loaded() -> Result:
                with Stepping(client) as stepping:
                    time.sleep(plan.times.warm_up_s)
                    begun = time.perf_counter()
                    time.sleep(max(2.0, plan.times.run_s))
                    path = weights.next()
                    called = time.perf_counter()
                    before = stepping.p99_ms(begun, called)
                    client.update_model("small", path, timeout_s=_LIMIT_S)
                    answered = time.perf_counter()
                    time.sleep(_AROUND_S)
                    meanwhile = stepping.p99_ms(called, answered + _AROUND_S)
                    around = stepping.p99_ms(answered - _AROUND_S, answered + _AROUND_S)
                if stepping.error is not None:
                    raise stepping.error
                return {
                    "updated_s": answered - called,
                    "before_ms": before,
                    "meanwhile_ms": meanwhile,
                    "meanwhile_ratio": meanwhile / before,
                    "switch_ratio": around / before,
                }

            def idle() -> Result:
                path, x = weights.next(), np.zeros((1, _FEATURES), np.float32)
                with client.open_session("small") as session:
                    session.step(x)
                    called = time.perf_counter()
                    loaded = client.update_model("small", path, timeout_s=_LIMIT_S)
                    session.step(x)
                    taken = time.perf_counter() - called
                    if session.model_version != loaded.version:
                        raise RuntimeError(
                            f"the step ran on version {session.model_version}, not {loaded.version}"
                        )
                return {"updated_s": taken}

            measures: dict[Key, Measure] = {("idle",): idle, (f"{SESSIONS} sessions in frames",): loaded}
            return measured(("server",), measures, plan.repeats)
