"""How many replicas and Valkey nodes so many sessions need: a model, fitted to what bench/capacity.py measured.

    python scripts/scaling.py                                       fill in the tables of docs/operate/scale-out.md
    python scripts/scaling.py --check                               fail if they are not as this makes them
    python scripts/scaling.py --sessions 2e6 --steps-per-s 50000 --units 256 --frame 64 --active 0.2

The measurements are docs/operate/scaling/measured.json: processor time, bytes of memory and of network for steps and sessions
of three widths, on one machine. Every cost is a straight line in the bytes of a session's record, fitted by least
squares, and, for the part that a frame or a commit has once, divided by the sessions in it. What is bought is that cost
over the share of a machine that is meant to be used.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.tables import number, table  # noqa: E402

PAGE = ROOT / "docs" / "operate" / "scale-out.md"
MEASURED = ROOT / "docs" / "operate" / "scaling" / "measured.json"
GIB = 2**30
SIZES = (1e4, 1e5, 1e6, 1e7, 1e8)
"""Sessions in the tables."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A cost by the bytes of a record: `base + slope * bytes`."""

    base: float
    slope: float

    def at(self, record_bytes: float) -> float:
        """The cost for a record."""
        return self.base + self.slope * record_bytes


def fitted(points: Sequence[tuple[float, float]]) -> Line:
    """The line through points `(bytes, cost)` with the least squares of relative errors; it never falls.

    Relative, as the costs of the widest model would decide alone otherwise.
    """
    sizes, costs = np.array(points, np.float64).T
    weights = 1 / costs
    design = np.stack([np.ones_like(sizes), sizes], axis=1)
    (base, slope), *_ = np.linalg.lstsq(design * weights[:, None], costs * weights)
    if slope < 0 or base < 0:
        # noise is larger than the effect: one number is all that can be said
        mean = float(np.average(costs, weights=weights))
        return Line(mean, 0.0) if slope < 0 else Line(0.0, float(np.average(costs / sizes)))
    return Line(float(base), float(slope))


@dataclasses.dataclass(frozen=True)
class Costs:
    """What sessions and steps cost, by the bytes of a record. Times in seconds of one core."""

    record: Line
    """Bytes of a record by the units of the LSTM; the other lines are by these bytes."""
    frame: int
    """Sessions of the frames that were measured."""
    replica_single: Line
    replica_framed: Line
    store_single: Line
    store_framed: Line
    store_load: Line
    """Of a record that a replica reads, in frames of so many."""
    replica_load: Line
    store_memory: Line
    """Bytes of memory of a session in Valkey."""
    replica_row: Line
    """Bytes of memory of a session that is resident in a replica."""
    wire_single: Line
    """Bytes between replica and Valkey, both ways, of a step."""
    wire_framed: Line
    log: Line
    """Bytes that a step appends to Valkey's log (AOF)."""
    replica_base: float
    """Bytes of a replica without sessions."""

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> Costs:
        """Fit them."""
        points = measured["models"]
        by = {name: [(each["record_bytes"], each[name]) for each in points] for name in points[0]}
        return cls(
            record=fitted([(each["units"], each["record_bytes"]) for each in points]),
            frame=int(measured["frame"]),
            replica_base=float(measured["replica_base_bytes"]),
            **{
                field.name: fitted(by[field.name])
                for field in dataclasses.fields(cls)
                if field.name not in {"record", "frame", "replica_base"}
            },
        )


@dataclasses.dataclass(frozen=True)
class Need:
    """What is to be served, and on what."""

    sessions: float
    steps_per_s: float
    units: int = 64
    """Of the LSTM."""
    frame: int = 1
    """Sessions in a message, on average; 1: single steps."""
    active: float = 0.1
    """Share of the sessions that are stepped now and then, and should be resident."""
    loads: float = 0.01
    """Share of the steps whose session is not resident on the replica that gets it."""
    cores: int = 4
    """Of a replica's machine."""
    replica_gib: float = 16.0
    node_gib: float = 32.0
    """Memory of a Valkey node."""
    copies: int = 1
    """Replicas of each Valkey primary."""
    busy: float = 0.5
    """Share of the processors that is planned to be used; the rest is for peaks, restarts and a replica that died."""
    full: float = 0.6
    """Share of a node's memory for data: a rewrite of the log and a copy need the rest."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What it takes."""

    replicas: int
    replicas_bound_by: str
    replica_cores: float
    primaries: int
    primaries_bound_by: str
    store_cores: float
    store_gib: float
    wire_mb_s: float
    log_mb_s: float


def plan(costs: Costs, need: Need) -> Plan:
    """The smallest set-up of the kind that holds. One replica or primary may die: there is one more than the work needs."""
    size = costs.record.at(need.units)
    share = 1 / max(1, need.frame)

    def per_step(single: Line, framed: Line) -> float:
        # between one and the measured frame what a message has once is shared by its sessions
        many = framed.at(size)
        once = max(0.0, single.at(size) - many)
        return many + once * max(0.0, share - 1 / costs.frame) / (1 - 1 / costs.frame)

    step_s = per_step(costs.replica_single, costs.replica_framed) + need.loads * costs.replica_load.at(size)
    store_s = per_step(costs.store_single, costs.store_framed) + need.loads * costs.store_load.at(size)
    replica_cores, store_cores = need.steps_per_s * step_s, need.steps_per_s * store_s
    by_work = replica_cores / (need.cores * need.busy)
    rows = need.sessions * need.active * costs.replica_row.at(size)
    by_memory = rows / max(1.0, need.replica_gib * GIB * need.full - costs.replica_base)
    replicas = max(1, math.ceil(max(by_work, by_memory))) + 1
    store_bytes = need.sessions * costs.store_memory.at(size)
    store_by_memory = store_bytes / (need.node_gib * GIB * need.full)
    # commands of a Valkey node run on one core, whatever it has
    store_by_work = store_cores / need.busy
    primaries = max(1, math.ceil(max(store_by_memory, store_by_work)))
    wire = need.steps_per_s * per_step(costs.wire_single, costs.wire_framed)
    return Plan(
        replicas,
        "processors" if by_work >= by_memory else "memory",
        replica_cores,
        primaries,
        "memory" if store_by_memory >= store_by_work else "its one core",
        store_cores,
        store_bytes / GIB,
        wire / 1e6,
        need.steps_per_s * costs.log.at(size) / 1e6,
    )


# --- the page ---


def costs_table(measured: Mapping[str, Any], costs: Costs) -> str:
    """What was measured, and what the lines say of it."""
    names = {
        "replica_single": "replica, a step by itself, us of a core",
        "replica_framed": f"replica, a step in frames of {costs.frame}, us",
        "replica_load": "replica, a step that reads its session first, more by us",
        "store_single": "Valkey, a step by itself, us",
        "store_framed": f"Valkey, a step in frames of {costs.frame}, us",
        "store_load": "Valkey, a session that is read, us",
        "store_memory": "Valkey, memory of a session, bytes",
        "replica_row": "replica, memory of a resident session, bytes",
        "wire_single": "replica to Valkey and back, a step by itself, bytes",
        "wire_framed": "the same in frames, bytes",
        "log": "Valkey's log (AOF), a step, bytes",
    }
    models = measured["models"]
    heads = ["", *(f"LSTM({each['units']})" for each in models), "fit: base + bytes times"]
    rows = [["record, bytes", *(number(each["record_bytes"]) for each in models), ""]]
    for name, words in names.items():
        scale = 1.0 if words.endswith("bytes") else 1e6
        line: Line = getattr(costs, name)
        fit = f"{number(line.base * scale)} + {line.slope * scale:.3g}"
        rows.append([words, *(number(each[name] * scale) for each in models), fit])
    return table(heads, rows)


def plans_table(costs: Costs, units: int, frame: int) -> str:
    """From ten thousand to a hundred million sessions, each of which is stepped once in a minute or so."""
    rows = []
    for sessions in SIZES:
        need = Need(sessions, sessions / 60, units=units, frame=frame)
        found = plan(costs, need)
        rows.append(
            [
                number(sessions),
                number(need.steps_per_s),
                f"{found.replicas} ({found.replicas_bound_by})",
                f"{found.primaries} ({found.primaries_bound_by})",
                number(found.store_gib),
                number(found.wire_mb_s),
                number(found.log_mb_s),
            ]
        )
    heads = ["sessions", "steps/s", "replicas", "Valkey primaries", "data, GiB", "network, MB/s", "log, MB/s"]
    return table(heads, rows)


def page(text: str, measured: Mapping[str, Any]) -> str:
    """The page with its tables as they should be."""
    costs = Costs.of(measured)
    machine = measured["machine"]
    parts = {
        "machine": f"Measured on {machine['date']}: {machine['cores']} cores ({machine['cpu']}),"
        f" Valkey {machine['valkey']}, Python {machine['python']}.",
        "costs": costs_table(measured, costs),
        "single": plans_table(costs, 64, 1),
        "frames": plans_table(costs, 64, costs.frame),
        "wide": plans_table(costs, 1024, costs.frame),
    }
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        found = pattern.findall(text)
        if len(found) != 1:
            raise SystemExit(f"{PAGE.name} must have one place for {name!r}; it has {len(found)}")
        text = pattern.sub("".join([found[0][0], content.replace("\\", r"\\"), "\n", found[0][1]]), text)
    return text


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is not as it should be")
    for field in dataclasses.fields(Need):
        kind: Any = (
            float if isinstance(field.default, float) or field.name in {"sessions", "steps_per_s"} else int
        )
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind)
    options = vars(parser.parse_args(arguments))
    is_check = options.pop("check")
    said = {name: value for name, value in options.items() if value is not None}
    measured = json.loads(MEASURED.read_text())
    if said:
        if not {"sessions", "steps_per_s"} <= said.keys():
            parser.error("--sessions and --steps-per-s must both be given for a plan")
        if min(said.values()) < 0 or said.get("busy", 1) > 1 or said.get("full", 1) > 1:
            parser.error("numbers must not be negative, and shares at most 1")
        for name, value in dataclasses.asdict(plan(Costs.of(measured), Need(**said))).items():
            print(f"{name:>20}  {value if isinstance(value, str) else number(value)}")
        return 0
    before = PAGE.read_text()
    after = page(before, measured)
    if is_check:
        if after != before:
            print(
                "docs/operate/scale-out.md is not as docs/operate/scaling/measured.json says; run scripts/scaling.py"
            )
        return int(after != before)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
