"""A model that is served no longer gives its memory back: executors, lanes, rows and its program."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import platform
import weakref

import numpy as np
import pytest

from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.base import Executor
from stepwell_server.program import Program
from support.engine.fake_executor import WAIT_S
from support.engine.harness import Harness, running
from support.models.compiled import zoo_model

HALF, KEPT = 100, 10
MADE: list[weakref.ref[Executor]] = []


def load(program: Program) -> Executor:
    executor = load_executor(program)
    MADE.append(weakref.ref(executor))
    return executor


async def serve_and_use(at: Harness, name: str) -> None:
    """Serve a model of bytes of its own, and run it on the event loop and on threads."""
    first = at.internals.model("first").program
    files = {path: bytes(bytearray(content)) for path, content in first.files.items()}
    await at.engine.load_version(name, 1, dataclasses.replace(first, files=files))
    model = at.internals.model(name)
    for steps in (1, 200):
        inputs = {
            spec.name: np.zeros((64, steps, *spec.shape) if spec.temporal else (64, *spec.shape), spec.dtype)
            for spec in model.program.inputs
        }
        await at.engine.predict(name, inputs)


async def come_and_go(at: Harness, count: int) -> None:
    for _ in range(count):
        await serve_and_use(at, "other")
        await at.engine.unload_version("other", 1)


@pytest.mark.usefixtures("without_collector")
async def test_nothing_of_a_model_that_has_gone_waits_for_the_garbage_collector() -> None:
    async with running({"first": zoo_model("lstm_dense").program}, executor=load) as at:
        await serve_and_use(at, "other")
        model = at.internals.model("other")
        parts: list[object] = [model.arena, model.program, *[one() for one in MADE[-2:]]]
        alive, gone, loop = len(parts), asyncio.Event(), asyncio.get_running_loop()

        def went() -> None:
            nonlocal alive
            alive -= 1
            if not alive:
                gone.set()

        watched = [weakref.ref(part, lambda _: loop.call_soon_threadsafe(went)) for part in parts]
        assert all(part() is not None for part in watched)
        del model, parts
        await at.engine.unload_version("other", 1)
        # a thread may still be on its way out of the last pass
        await asyncio.wait_for(gone.wait(), WAIT_S)


class MallInfo2(ctypes.Structure):
    """What glibc's allocator has handed out; mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def allocated_bytes() -> int:
    """Return the bytes in use, unlike the resident ones, which include what the tests before this one freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallinfo2")
async def test_loading_and_unloading_models_leaks_no_memory() -> None:
    async with running({"first": zoo_model("lstm_dense").program}, executor=load_executor) as at:
        before = allocated_bytes()
        for number in range(KEPT):
            await serve_and_use(at, f"kept{number}")
        one = (allocated_bytes() - before) / KEPT
        for number in range(KEPT):
            await at.engine.unload_version(f"kept{number}", 1)
        await come_and_go(at, HALF)
        first = allocated_bytes()
        await come_and_go(at, HALF)
        assert allocated_bytes() - first < HALF * one / 4, f"each takes {one:.0f} bytes"
