"""What a flood of one model costs another: frames of a model beside each flood of a wider one, and alone.

    PYTHONPATH=tests .venv/bin/python -m bench.neighbours [TURNS]

Passes of both run on the compute threads. Watched frames and flood are processes of their own, over connections of
their own. Prints medians over the turns.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Mapping

import stepwell
from bench import harness, loads
from bench.floods import Flood, flooding, frame, long_request
from bench.loads import Times

WATCHED, FLOODED = "medium", "large"
ROWS, FRAMES, FRAME, LONG, LONG_STEPS, STREAMS = 256, 4, 1024, 8, 300, 64
_TIMES = Times(1.5)
_FLOOD_S = _TIMES.warm_up_s + _TIMES.run_s + 0.5
FLOODS: Mapping[str, Flood | None] = {
    "alone": None,
    f"{FRAMES} frames of {FRAME} sessions": Flood(
        "StepStream",
        "stream",
        FRAMES * FRAME,
        lambda ids: [frame(ids[at : at + FRAME], FLOODED) for at in range(0, FRAMES * FRAME, FRAME)],
        FLOODED,
    ),
    f"{LONG} requests of {LONG_STEPS} steps": Flood(
        "Step",
        "unary",
        LONG,
        lambda ids: [long_request(one, FLOODED, LONG_STEPS) for one in ids],
        FLOODED,
    ),
    f"{STREAMS} streams": Flood(
        "StepStream", "stream", STREAMS, lambda ids: [frame([one], FLOODED) for one in ids], FLOODED
    ),
}


def main(turns: int) -> None:
    harness.save_models()
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(turns):
        with harness.serve(WATCHED, FLOODED) as server, stepwell.connect(server.address) as client:
            watched = [frame(client.open_sessions(WATCHED, ROWS).ids, WATCHED)]
            for name, flood in FLOODS.items():
                beside = flooding(server, flood, None, _FLOOD_S) if flood else contextlib.nullcontext()
                with beside:
                    one = loads.generate(
                        server.address, "/stepwell.v1.SessionService/StepStream", "stream", watched, _TIMES
                    )
                found.setdefault(name, []).append((one["rate"], one["p50_ms"], one["p99_ms"]))
    for name, results in found.items():
        rate, p50_ms, p99_ms = (statistics.median(column) for column in zip(*results, strict=True))
        sys.stdout.write(f"{name:28} {rate:6.0f} frames/s, p50 {p50_ms:7.2f} ms, p99 {p99_ms:7.2f} ms\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
