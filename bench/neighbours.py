"""What a flood of one model costs another: frames of a model beside each flood of a wider one, and alone.

    .venv/bin/python -m bench.neighbours [TURNS]        (with tests on the path: PYTHONPATH=tests)

Passes of both run on the compute threads. Watched frames and flood are processes of their own, over connections of
their own. Prints medians over the turns.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np

import stepwell
from bench import harness, loads
from bench.harness import MODELS, OUT
from bench.loads import Times
from stepwell.testing import LocalServer
from stepwell.v1 import sessions_pb2, tensors_pb2

WATCHED, FLOODED = "medium", "large"
ROWS, FRAMES, FRAME, LONG, LONG_STEPS, STREAMS = 256, 4, 1024, 8, 300, 64
_TIMES = Times(1.5)
_STEPS = "/stepwell.v1.SessionService/"
Flood = tuple[str, str, Sequence[bytes]]
"""The method, as calls or on streams, and the requests."""


def _frame(ids: Sequence[str], model: str) -> bytes:
    tensor = loads.tensor(len(ids), MODELS[model][1])
    step = sessions_pb2.StepFrame(session_ids=ids, inputs=[tensor], batch_sizes=[1] * len(ids))
    return sessions_pb2.StepStreamRequest(frame_id=1, step=step).SerializeToString()


def _long(session_id: str) -> bytes:
    values = np.random.default_rng(1).standard_normal((1, LONG_STEPS, MODELS[FLOODED][1]), np.float32)
    tensor = tensors_pb2.Tensor(
        dtype=tensors_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes()
    )
    return sessions_pb2.StepRequest(
        session_id=session_id, inputs=[tensor], outputs=sessions_pb2.OUTPUT_SELECTION_LAST
    ).SerializeToString()


def _floods(ids: Sequence[str]) -> Mapping[str, Flood | None]:
    frames = [_frame(ids[at : at + FRAME], FLOODED) for at in range(0, FRAMES * FRAME, FRAME)]
    return {
        "alone": None,
        f"{FRAMES} frames of {FRAME} sessions": ("StepStream", "stream", frames),
        f"{LONG} requests of {LONG_STEPS} steps": ("Step", "unary", [_long(one) for one in ids[:LONG]]),
        f"{STREAMS} streams": ("StepStream", "stream", [_frame([one], FLOODED) for one in ids[:STREAMS]]),
    }


def _begun(server: LocalServer, flood: Flood) -> subprocess.Popen[bytes]:
    method, kind, requests = flood
    path = OUT / "flood.bin"
    path.write_bytes(b"".join(struct.pack("<I", len(one)) + one for one in requests))
    times = ("0.1", str(_TIMES.warm_up_s + _TIMES.run_s + 0.5))
    command = [str(loads.generator()), server.address, _STEPS + method, kind, str(path), *times]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def main(turns: int) -> None:
    harness.save_models()
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(turns):
        with harness.serve(WATCHED, FLOODED) as server, stepwell.connect(server.address) as client:
            watched = [_frame(client.open_sessions(WATCHED, ROWS).ids, WATCHED)]
            ids = client.open_sessions(FLOODED, FRAMES * FRAME).ids
            for name, flood in _floods(ids).items():
                process = None if flood is None else _begun(server, flood)
                try:
                    one = loads.generate(server.address, f"{_STEPS}StepStream", "stream", watched, _TIMES)
                finally:
                    if process is not None:
                        process.wait()
                found.setdefault(name, []).append((one["rate"], one["p50_ms"], one["p99_ms"]))
    for name, results in found.items():
        rate, p50_ms, p99_ms = (statistics.median(column) for column in zip(*results, strict=True))
        sys.stdout.write(f"{name:28} {rate:6.0f} frames/s, p50 {p50_ms:7.2f} ms, p99 {p99_ms:7.2f} ms\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
