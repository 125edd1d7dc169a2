"""What a served step function costs beyond ONNX Runtime: Silero VAD, batched, with and without the server.

Bare ONNX Runtime runs here with its defaults: one session, a thread for each core. It keeps state and context of all
microphones in arrays, and what waits is one batch. Silero's file comes from its package, as in examples/vad.py.
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

import stepwell
from bench import harness, loads
from bench.harness import OUT, ROOT, Key, Measure, Point, Result
from bench.loads import Plan, Times
from stepwell.testing import LocalServer

Floats = npt.NDArray[np.float32]

MODEL = "vad"
SESSIONS = 256
FRAMES_PER_S, FRAME_S = 31.25, 0.032
"""Of a microphone; a frame must be answered before the next one comes."""
_ON_TIME, _KEPT_RATE = 0.99, 0.99
"""Shares of the frames that must be answered within a frame, and made at all."""
_STEP, MAX_PACED = 16, 2032
"""How exactly the number of microphones is found, and where the search begins: at the half."""
_FRAME, _CONTEXT, _RATE, _STATE = 512, 64, 16_000, 128
"""Samples of a frame and of its context, samples per second, and half of the width of the state."""


def save_model() -> Path:
    """Silero's file, with its declaration beside it; installs the package if it is not there.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    sys.path.append(str(ROOT / "examples"))
    import vad  # needs matplotlib, as few cases do

    path = harness.model_path(MODEL).with_suffix(".onnx")
    shutil.copy(vad.silero(OUT / "silero"), path)
    path.with_suffix(".toml").write_text(vad.DECLARED)
    return path


class Bare:
    """ONNX Runtime with the states of some microphones. A step of any of them is one run."""

    def __init__(self, path: Path, sessions: int) -> None:
        import onnxruntime  # an extra, which other cases do not need

        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._states = np.zeros((2, sessions, _STATE), np.float32)
        self._contexts = np.zeros((sessions, _CONTEXT), np.float32)
        self._rate = np.array(_RATE)

    def step(self, rows: slice, frames: Floats) -> None:
        """Compute a frame for each of some microphones."""
        x = np.concatenate((self._contexts[rows], frames), 1)
        given = {"input": x, "state": self._states[:, rows], "sr": self._rate}
        _, self._states[:, rows] = self._session.run(None, given)
        self._contexts[rows] = x[:, -_CONTEXT:]


def _frames(count: int) -> Floats:
    return np.random.default_rng(count).standard_normal((count, _FRAME), np.float32)


def _result(rate: float, took_s: Sequence[float]) -> Result:
    p50, p99 = (np.quantile(took_s, (0.5, _ON_TIME)) * 1e3).tolist()
    return {"rate": rate, "step_us": 1e6 / rate, "p50_ms": p50, "p99_ms": p99}


def bare_batches(path: Path, times: Times) -> Result:
    """All sessions in one batch, again and again."""
    bare, frames, took = Bare(path, SESSIONS), _frames(SESSIONS), list[float]()
    for seconds in (times.warm_up_s, times.run_s):
        took.clear()
        while sum(took) < seconds:
            before = time.perf_counter()
            bare.step(slice(0, SESSIONS), frames)
            took.append(time.perf_counter() - before)
    return _result(SESSIONS * len(took) / sum(took), took)


def bare_paced(path: Path, times: Times, sessions: int) -> Result:
    """Microphones whose frames come evenly, one after the other. Those that have come are the next batch."""
    bare, frames, took = Bare(path, sessions), _frames(sessions), list[float]()
    rate, answered, done = sessions * FRAMES_PER_S, 0, 0.0
    began = time.perf_counter()
    while done < times.warm_up_s + times.run_s:
        now = time.perf_counter() - began
        first = answered % sessions
        come = min(int(now * rate) + 1 - answered, sessions - first)
        if come < 1:
            time.sleep(answered / rate - now)
            continue
        rows = slice(first, first + come)
        bare.step(rows, frames[rows])
        done = time.perf_counter() - began
        if now >= times.warm_up_s:
            took += (done - np.arange(answered, answered + come) / rate).tolist()
        answered += come
    return _result(answered / done, took)


def served(server: LocalServer, times: Times, sessions: int, rate: float = 0.0) -> Result:
    """Sessions on streams of their own: each as fast as it can, or all with a rate together."""
    with (
        harness.alive(server),
        stepwell.connect(server.address) as client,
        client.open_sessions(MODEL, sessions) as group,
    ):
        method, requests = loads.step_requests("stream", group.ids, _FRAME)
        found = loads.generate(server.address, method, "stream", requests, times, rate=rate)
    return {name: found[name] for name in ("rate", "p50_ms", "p99_ms")} | {"step_us": 1e6 / found["rate"]}


def served_as_group(server: LocalServer, times: Times) -> Result:
    """Sessions of a group of the SDK."""
    found = loads.sdk(server, "group", times, model=MODEL, sessions=SESSIONS)
    return {**found, "step_us": 1e6 / found["rate"]}


def most(run: Callable[[int], Result], at_most: int) -> Result:
    """The largest number of microphones of which 99 % of the frames are answered in time, by bisection."""
    low, high = 0, at_most // _STEP + 1
    best = dict.fromkeys(("rate", "step_us", "p50_ms", "p99_ms"), 0.0)
    while high - low > 1:
        middle = (low + high) // 2
        sessions = middle * _STEP
        found = run(sessions)
        is_kept = found["rate"] >= _KEPT_RATE * sessions * FRAMES_PER_S
        if is_kept and found["p99_ms"] <= FRAME_S * 1e3:
            low, best = middle, dict(found)
        else:
            high = middle
    return {**best, "carried": low * _STEP}


def speech(plan: Plan) -> list[Point]:
    """Silero VAD: as fast as it can and at the pace of microphones; ratios are to bare ONNX Runtime."""
    path, times = save_model(), plan.times
    with harness.serve(models={MODEL: path}) as server:
        measures: dict[Key, Measure] = {
            ("bare", "unpaced"): functools.partial(bare_batches, path, times),
            ("stream", "unpaced"): functools.partial(served, server, times, SESSIONS),
            ("group", "unpaced"): functools.partial(served_as_group, server, times),
            ("bare", "paced"): lambda: most(functools.partial(bare_paced, path, times), MAX_PACED),
            ("stream", "paced"): lambda: most(
                lambda count: served(server, times, count, count * FRAMES_PER_S), MAX_PACED
            ),
        }
        return harness.measured(("server", "pace"), measures, plan.repeats, lambda key: ("bare", key[1]))
