"""A retrained model whose layers Keras named anew is served as the version before: under its names, with its sessions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import SpecsDiffer
from stepwell_server.program import Architecture, Names, Program
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, x
from support.engine.version_changes import two_versions
from support.engine.versions import after, serving, weights
from support.stores.durable import Disk
from support.stores.kinds import SHARED

CARRY, KEEP = SessionPolicy.CARRY, SessionPolicy.KEEP
INITIAL = np.array([[0.5, -0.25]], np.float32)
FIRST = dataclasses.replace(PLAIN, architecture=Architecture("structure"))


def retrained(version: int, structure: str = "structure", suffix: str = "") -> Program:
    """The plain program with other weights, and with the names that Keras makes up the next time."""
    mark = suffix or f"_{version}"
    names = Names((f"x{mark}",), (f"y{mark}",), (f"sum{mark}",))
    return dataclasses.replace(weights(version), architecture=Architecture(structure)).called(names)


async def expect(at: Harness, version: int, state: np.ndarray, seed: int) -> np.ndarray:
    answer = await at.step("a", x(1, seed=seed))
    y, state = after(version, state, [x(1, seed=seed)])
    assert answer.version == version
    np.testing.assert_array_equal(answer.outputs["y"], y)
    assert list(await at.state("a")) == ["sum"]
    return state


async def test_the_served_names_stay() -> None:
    async with serving({"plain": FIRST}) as at:
        await at.open("a")
        state = await expect(at, 1, INITIAL, 1)
        for version in (2, 3):
            await at.engine.load_version("plain", version, retrained(version))
            assert at.engine.model(f"plain@{version}").program.names == FIRST.names
            before = await at.step("a", x(1, seed=version), request_ids=7 + version)
            _, state = after(version - 1, state, [x(1, seed=version)])
            await at.engine.set_default("plain", version, CARRY)
            again = await at.step(
                "a", x(1, seed=version), request_ids=7 + version, expected=before.revision - 1
            )
            assert again.replayed
            np.testing.assert_array_equal(again.outputs["y"], before.outputs["y"])
            state = await expect(at, version, state, 10 + version)


async def test_versions_of_the_start_have_one_set_of_names() -> None:
    async with serving({"plain@1": FIRST, "plain@2": retrained(2)}) as at:
        assert at.engine.model("plain@2").program.names == FIRST.names


@pytest.mark.parametrize("structure", ["other", ""])
async def test_another_structure_keeps_its_own_names(structure: str) -> None:
    async with serving({"plain": FIRST}) as at:
        other = retrained(2, structure)
        with pytest.raises(SpecsDiffer, match=r"version 1 of model 'plain' to 2 only if .*'sum' is missing"):
            await at.engine.require_possible("plain", 2, other, CARRY)
        await at.engine.require_possible("plain", 2, other, KEEP)
        await at.engine.load_version("plain", 2, other)
        assert at.engine.model("plain@2").program.names == other.names
        with pytest.raises(SpecsDiffer):
            await at.engine.set_default("plain", 2, CARRY)


@pytest.mark.stores("async", "sync")
async def test_names_stay_over_restarts(disk: Disk) -> None:
    async with disk.engine({"plain": FIRST}, run=serving, is_killed=True) as at:
        await at.open("a")
        state = await expect(at, 1, INITIAL, 1)
        await at.engine.load_version("plain", 2, retrained(2))
        await at.engine.set_default("plain", 2, CARRY)
        state = await expect(at, 2, state, 2)
    # The first version is gone, and the second one's file has its own names.
    async with disk.engine({"plain@2": retrained(2)}, run=serving, is_killed=True) as at:
        assert at.engine.model("plain").program.names == FIRST.names
        state = await expect(at, 2, state, 3)
        await at.engine.load_version("plain", 3, retrained(3))
        await at.engine.set_default("plain", 3, CARRY)
    # One file was written anew, with the same weights, and has other names again.
    async with disk.engine({"plain@3": retrained(3, suffix="_9")}, run=serving) as at:
        assert at.engine.model("plain").program.names == FIRST.names
        await expect(at, 3, state, 4)


@SHARED
async def test_replicas_serve_the_same_names() -> None:
    async with two_versions() as (first, second):
        await first.engine.load_version("plain", 3, retrained(3, "one"))
        await second.internals.look()
        await second.engine.load_version("plain", 3, retrained(3, "one"))
        await first.engine.load_version("plain", 4, retrained(4, "one"))
        await second.internals.look()
        await second.engine.load_version("plain", 4, retrained(4, "one", "_8"))
        for at in (first, second):
            assert at.engine.model("plain@4").program.names == retrained(3).names
