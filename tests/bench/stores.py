"""What it costs to keep sessions on the disk: the same load on servers with each of the stores, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from bench import disk, harness
from bench.harness import Line, Result, compared, interleave, run_client

SECTION = "stores"
SESSIONS = 256
GROUPS = 4
MEMORY = "in memory"
DURABLE = {"async": ("--durability", "async"), "sync": ("--durability", "sync")}
"""Options of the servers that keep sessions on the disk, by the name of their durability."""

_AT_MOST, _AT_LEAST = "at most", "at least"
_RATE_TARGETS = {"async": (_AT_LEAST, 0.85), "sync": (_AT_LEAST, 0.6)}
_LATENCY_TARGETS = {"async": (_AT_MOST, 1.15)}

Targets = Mapping[str, tuple[str, float]]
_Load = Callable[[str], Result]
"""Load for the server at an address."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A load, and what of its result is compared."""

    case: str
    key: str
    unit: str
    targets: Targets
    run: _Load


def loads(generator: harness.Generator, times: Mapping[str, float]) -> list[Measured]:
    """What is run on each server."""

    def sdk(case: str, **arguments: Any) -> _Load:
        return lambda address: run_client(case, address=address, model="small", **arguments, **times)

    def singly(kind: str) -> _Load:
        return lambda address: harness.step_singly(generator, address, "small", kind, 1, **times)

    frames = ("rate", "steps/s", _RATE_TARGETS)
    one = ("p50_ms", "ms", _LATENCY_TARGETS)
    return [
        Measured(f"{SESSIONS} sessions, one group", *frames, sdk("group", sessions=SESSIONS, groups=1)),
        Measured(
            f"{SESSIONS} sessions, {GROUPS} groups of {SESSIONS // GROUPS} in flight",
            *frames,
            sdk("group", sessions=SESSIONS, groups=GROUPS),
        ),
        Measured(
            f"{SESSIONS} sessions, async SDK in gather",
            *frames,
            sdk("gather", sessions=SESSIONS, coalesce=True),
        ),
        Measured("1 session, unary: p50", *one, singly("unary")),
        Measured("1 session, stream: p50", *one, singly("stream")),
        Measured("1 session, async SDK: p50", *one, sdk("gather", sessions=1, coalesce=True)),
    ]


def measure(generator: harness.Generator, repeats: int, times: Mapping[str, float]) -> list[Line]:
    """The lines of all loads on all stores; the disk by itself is measured before, between and after."""
    lines: list[Line] = []
    with contextlib.ExitStack() as stack:
        addresses = {MEMORY: stack.enter_context(harness.serve("small")).address}
        for name, options in DURABLE.items():
            folder = stack.enter_context(disk.data_folder())
            server = harness.serve("small", extra_args=options, data_dir=folder)
            addresses[name] = stack.enter_context(server).address
        probe = stack.enter_context(disk.data_folder())
        flushes = [disk.flush_ms(probe)]
        for load in loads(generator, times):
            contenders = {
                name: lambda address=address, load=load: load.run(address)
                for name, address in addresses.items()
            }
            results = interleave(contenders, repeats)
            for name in DURABLE:
                targets = {MEMORY: load.targets.get(name)}
                lines += compared(f"{load.case}, {name}", load.unit, results, load.key, targets, name)
            flushes.append(disk.flush_ms(probe))
    lines.append(disk.flush_line(flushes))
    return [dataclasses.replace(line, section=SECTION) for line in lines]
