"""What a flood of one client costs another: p99 of eight streams beside each flood, as a ratio to alone.

    .venv/bin/python -m bench.floods [TURNS]        (with tests on the path: PYTHONPATH=tests)

Watched streams and flood are processes of their own, over connections of their own. Prints medians over the turns.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import stepwell
from bench import harness, loads
from bench.harness import MODELS, OUT
from bench.loads import Times
from stepwell.testing import LocalServer
from stepwell.v1 import sessions_pb2, tensors_pb2

WATCHED, FRAMES, FRAME, LONG, LONG_STEPS, OPENING = 8, 8, 1024, 8, 10_000, 64
_TIMES = Times(1.5)
_FEATURES = MODELS["small"][1]
_STEPS = "/stepwell.v1.SessionService/"


def _frame(ids: Sequence[str]) -> bytes:
    step = sessions_pb2.StepFrame(
        session_ids=ids, inputs=[loads.tensor(len(ids), _FEATURES)], batch_sizes=[1] * len(ids)
    )
    return sessions_pb2.StepStreamRequest(frame_id=1, step=step).SerializeToString()


def _long(session_id: str) -> bytes:
    values = np.random.default_rng(1).standard_normal((1, LONG_STEPS, _FEATURES), np.float32)
    tensor = tensors_pb2.Tensor(
        dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes()
    )
    return sessions_pb2.StepRequest(
        session_id=session_id, inputs=[tensor], outputs=sessions_pb2.OUTPUT_SELECTION_LAST
    ).SerializeToString()


def _floods(ids: Sequence[str]) -> Mapping[str, tuple[str, str, Sequence[bytes]]]:
    """The method, as calls or on streams, and the requests of each flood."""
    frames = [_frame(ids[start : start + FRAME]) for start in range(0, FRAMES * FRAME, FRAME)]
    opening = sessions_pb2.OpenSessionRequest(model="small").SerializeToString()
    return {
        "frames of 1,024 sessions": ("StepStream", "stream", frames),
        "requests of 10,000 steps": ("Step", "unary", [_long(one) for one in ids[:LONG]]),
        "new sessions": ("OpenSession", "unary", [opening] * OPENING),
    }


def _beside(
    server: LocalServer, method: str, kind: str, requests: Sequence[bytes]
) -> subprocess.Popen[bytes]:
    path = Path(OUT / "flood.bin")
    path.write_bytes(b"".join(struct.pack("<I", len(one)) + one for one in requests))
    times = ("0.1", str(_TIMES.warm_up_s + _TIMES.run_s + 0.5))
    command = [str(loads.generator()), server.address, _STEPS + method, kind, str(path), *times]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def main(turns: int) -> None:
    harness.save_models()
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(turns):
        with harness.serve("small") as server, stepwell.connect(server.address) as client:
            watched = client.open_sessions("small", WATCHED).ids
            ids = client.open_sessions("small", FRAMES * FRAME).ids
            requests = [_frame([one]) for one in watched]
            alone = loads.generate(server.address, f"{_STEPS}StepStream", "stream", requests, _TIMES)
            for name, flood in _floods(ids).items():
                process = _beside(server, *flood)
                try:
                    beside = loads.generate(server.address, f"{_STEPS}StepStream", "stream", requests, _TIMES)
                finally:
                    process.wait()
                ratio = beside["p99_ms"] / alone["p99_ms"]
                found.setdefault(name, []).append((alone["p99_ms"], beside["p99_ms"], ratio))
    for name, results in found.items():
        alone_ms, beside_ms, ratio = (statistics.median(column) for column in zip(*results, strict=True))
        sys.stdout.write(f"{name:26} p99 alone {alone_ms:6.3f} ms, beside {beside_ms:6.3f} ms: {ratio:.2f}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
