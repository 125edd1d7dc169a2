"""Versions of the plain program: the same tensors and other weights, or other tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.engine.api import SessionPolicy
from stepwell_server.program import Program, StateSpec, TensorSpec
from support.engine.fake_executor import PLAIN, FakeExecutor, Hooks
from support.engine.harness import Harness, running

Array = npt.NDArray[Any]


def weights(version: int) -> Program:
    """The plain program with other weights: its inputs count `version` times. Version 1 is the plain one."""
    if version == 1:
        return PLAIN
    initial = (np.array([version, -version], np.float32),)
    return dataclasses.replace(PLAIN, fingerprint=f"f-plain-{version}", initial=initial)


#: A version with twice as wide a state, and another output.
WIDE = dataclasses.replace(
    PLAIN,
    fingerprint="f-wide",
    outputs=(TensorSpec("z", (4,), "float32", temporal=True),),
    state=(StateSpec("wide", (4,), "float32"),),
    initial=(np.array([1, 2, 3, 4], np.float32),),
)


def widen(states: dict[str, Array]) -> Mapping[str, Array]:
    """What makes plain states wide ones."""
    return {"wide": np.concatenate([states["sum"], -states["sum"]], axis=1)}


def after(version: int, state: Array, inputs: Sequence[Array]) -> tuple[Array, Array]:
    """Outputs and state after time steps of a version, `(rows, 2)` each."""
    output = state
    for x in inputs:
        before = state
        state = (before * np.float32(0.5) + x * np.float32(version)).astype(np.float32)
        output = (state * np.float32(2) - before).astype(np.float32)
    return output, state


class VersionExecutor(FakeExecutor):
    """Runs any of these programs."""

    def __init__(self, program: Program, hooks: Hooks) -> None:
        super().__init__(program, hooks)
        self._is_wide = program.fingerprint == "f-wide"
        number = program.fingerprint.removeprefix("f-plain").lstrip("-")
        self._weight = np.float32(1 if self._is_wide or not number else int(number))

    def invoke(self) -> None:
        if not self._is_wide:
            self._in[0] *= self._weight
            super().invoke()
            return
        self._hooks.run(self._rows)
        state = self._state[0] * np.float32(0.5) + np.tile(self._in[0], 2)
        np.copyto(self._next[0], state)
        np.copyto(self._out[0], state + np.float32(1))


@asynccontextmanager
async def serving(programs: Mapping[str, Program] | None = None, **options: Any) -> AsyncIterator[Harness]:
    """A started engine that serves versions of `plain`; by default version 1."""
    hooks = Hooks()
    async with running(
        programs or {"plain": PLAIN},
        executor=lambda program: VersionExecutor(program, hooks),
        **options,
    ) as at:
        at.hooks = hooks
        try:
            await at.engine.start()
            yield at
        finally:
            hooks.open_gate()


async def carry_to(at: Harness, version: int) -> None:
    """Load a version, and carry the sessions of the default to it."""
    await at.engine.load_version("plain", version, weights(version))
    await at.engine.set_default("plain", version, SessionPolicy.CARRY)
