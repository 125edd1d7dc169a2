"""Rings: a program that takes and returns parts of a window gives the same bits as one that copies all of it."""

from __future__ import annotations

import dataclasses
import math
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select, SessionPolicy
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.engine.state import window_changes
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.window_changes import NewElements, WindowChanges
from stepwell_server.errors import ServerError, StateCorrupt
from stepwell_server.store.base import Batch
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import is_change
from support.engine import fake_executor
from support.engine.fake_executor import BAD, RINGS, with_windows
from support.engine.harness import Harness, running
from support.samples import one_in
from support.stores.changes import Windowed
from support.stores.durable import Disk, DurableStore
from support.stores.kinds import DURABLE


def same(one: Any, two: Any) -> None:
    if isinstance(one, ServerError):
        assert (type(one), str(one)) == (type(two), str(two))
        return
    for first, second in ((one.outputs, two.outputs), (one.states, two.states)):
        assert list(first) == list(second)
        for name in first:
            assert first[name].tobytes() == second[name].tobytes(), name
    assert (one.revision, one.position) == (two.revision, two.position)


async def both(first: Harness, second: Harness, *args: Any, **fields: Any) -> None:
    one, two = [await at.submit(*args, **fields).all() for at in (first, second)]
    for answer, other in zip(one, two, strict=True):
        same(answer, other)


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("seed", one_in(3, range(3)))
async def test_any_changes_give_the_same_bits_as_whole_windows(threads: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {"a": 1, "b": 3, "c": 1, "d": 2, "e": 1}
    async with AsyncExitStack() as stack:
        first, second = [
            await stack.enter_async_context(
                running({"plain": with_windows(are_rings=are_rings)}, threads=threads, resident_rows=9)
            )
            for are_rings in (True, False)
        ]
        for name, size in sizes.items():
            for at in (first, second):
                await at.open(name, batch_size=size)
        for i in range(150):
            await change(first, second, sizes, rng, i)
        for name in sizes:
            one, two = await first.state(name), await second.state(name)
            assert {key: value.tobytes() for key, value in one.items()} == {
                key: value.tobytes() for key, value in two.items()
            }


@DURABLE
@pytest.mark.parametrize("threads", [False, True])
async def test_sessions_of_which_changes_are_stored_outlive_kills(
    durable_store: DurableStore, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_executor, "_WINDOWS", ((70, 3), (50, 50), (20, 1)))
    monkeypatch.setattr(window_changes, "_MIN_BYTES", 0)
    monkeypatch.setattr(window_changes, "_HEAD_BYTES", 0)
    packed: list[int] = []
    pack = NewElements.pack

    def counted(form: NewElements, rows: Any) -> Any:
        packed.append(len(rows))
        return pack(form, rows)

    monkeypatch.setattr(NewElements, "pack", counted)
    rng, sizes = np.random.default_rng(8 + threads), {"a": 1, "b": 3, "c": 1, "d": 2, "e": 1}
    async with running({"plain": with_windows(are_rings=False)}, store=MemoryStore()) as second:
        for life in range(5):
            async with durable_store.engine(
                {"plain": with_windows(are_rings=True)}, is_killed=True, threads=threads, resident_rows=9
            ) as first:
                (model,) = first.internals.models
                assert model.changes is not None
                assert 20 < model.changes.period < 40
                for name, size in sizes.items() if not life else ():
                    for at in (first, second):
                        await at.open(name, batch_size=size)
                for i in range(40):
                    await change(first, second, sizes, rng, 40 * life + i)
                for name in sizes:
                    one, two = await first.state(name), await second.state(name)
                    assert {key: value.tobytes() for key, value in one.items()} == {
                        key: value.tobytes() for key, value in two.items()
                    }
    assert sum(packed) > 200, "most steps store changes"


async def change(
    first: Harness, second: Harness, sizes: dict[str, int], rng: np.random.Generator, number: int
) -> None:
    names = list(sizes)
    name = names[rng.integers(len(names))]
    size = sizes[name]
    kind = rng.choice(
        [
            "frame",
            "frame",
            "frame",
            "one",
            "one",
            "long",
            "states",
            "reset",
            "set",
            "mask",
            "rows",
            "bad",
            "fork",
            "export",
        ]
    )
    if kind == "frame":
        chosen = [name for name in names if rng.random() < 0.6] or [name]
        counts = [sizes[name] for name in chosen]
        await both(first, second, chosen, drawn(rng, sum(counts), 2), sizes=counts)
    elif kind == "one":
        await both(first, second, name, drawn(rng, size, 2), sizes=[size])
    elif kind == "long":
        await both(first, second, name, drawn(rng, size, rng.integers(2, 20), 2), sizes=[size])
    elif kind == "states":
        x = drawn(rng, size, rng.integers(1, 12), 2)
        await both(first, second, name, x, sizes=[size], states=[Select.ALL, Select.LAST][rng.integers(2)])
    elif kind == "reset":
        rows = sorted(set(rng.integers(size, size=2).tolist())) if rng.random() < 0.5 else ()
        await both(first, second, name, sizes=[size], reset=True, **({"rows": rows} if rows else {}))
    elif kind == "set":
        specs = with_windows(are_rings=False).state
        state = {spec.name: drawn(rng, size, *spec.shape) for spec in specs}
        await both(first, second, name, sizes=[size], reset=True, state=state)
    elif kind == "mask":
        steps = int(rng.integers(1, 9))
        mask = rng.random((size, steps)) < 0.3
        await both(first, second, name, drawn(rng, size, steps, 2), sizes=[size], reset_rows=mask.reshape(-1))
    elif kind == "rows":
        rows = sorted(set(rng.integers(size, size=2).tolist()))
        await both(first, second, name, drawn(rng, len(rows), 2), sizes=[len(rows)], rows=rows)
    elif kind == "bad":
        chosen = [name, *(other for other in names if other != name)]
        counts = [sizes[each] for each in chosen]
        x = drawn(rng, sum(counts), 2)
        x[0, 0] = BAD
        await both(first, second, chosen, x, sizes=counts)
    elif len(sizes) < 9:
        new = f"{kind}{number}"
        for at in (first, second):
            if kind == "fork":
                await at.engine.fork(name, new_session_id=new)
            else:
                (record,) = await at.engine.export_sessions([name], deadline=math.inf)
                assert not isinstance(record, ServerError)
                arriving = [SessionRecord(new, name, bytes(record))]
                (outcome,) = await at.engine.import_sessions(arriving, ExistingPolicy.REFUSE)
                assert outcome is ImportOutcome.IMPORTED
        sizes[new] = size


@pytest.mark.stores("memory")
async def test_a_change_without_the_records_before_it_is_not_exported() -> None:
    store = MemoryStore()
    async with running({"plain": with_windows(are_rings=True)}, store=store) as at:
        store.commit(Batch(puts=[("a", Windowed("a").step())], counts=[("m", 1)]))
        (found,) = await at.engine.export_sessions(["a"], deadline=math.inf)
        assert isinstance(found, StateCorrupt)
        store.commit(Batch(deletes=["a"], counts=[("m", -1)]))


def drawn(rng: np.random.Generator, *shape: Any) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("are_rings", [False, True])
async def test_versions_with_rings_and_with_whole_windows_share_rows(are_rings: bool) -> None:
    rng, programs = (
        np.random.default_rng(4),
        [with_windows(are_rings=each) for each in (are_rings, not are_rings)],
    )
    later = dataclasses.replace(programs[1], fingerprint="f-later")
    async with running({"plain": programs[0]}) as moved, running({"plain": programs[0]}) as kept:
        for at in (moved, kept):
            await at.open("a", "b", "c")
        for turn in range(24):
            if turn == 9:
                await moved.engine.load_version("plain", 2, later)
                await moved.engine.set_default("plain", 2, SessionPolicy.CARRY)
                first, second = moved.internals.models
                assert first.arena is second.arena
            names = ["a", "b", "c"][: 1 + turn % 3]
            await both(moved, kept, names, drawn(rng, len(names), 2))
        for name in "abc":
            one, two = await moved.state(name), await kept.state(name)
            assert [each.tobytes() for each in one.values()] == [each.tobytes() for each in two.values()]


def test_a_packed_row_is_in_the_order_of_time() -> None:
    rng, windows = np.random.default_rng(2), RINGS
    arena, whole = Arena(windows, 6), Arena(with_windows(are_rings=False), 6)
    parts = arena.parts(windows)
    assert parts is not None
    rows = np.array([4, 1, 5], np.intp)
    for each in (arena, whole):
        each.reset(rows, windows.initial)
    for _ in range(9):
        new = [drawn(rng, 3, *spec.shape) for spec in windows.states_returned]
        parts.write(rows, new)
        before = whole.read(rows)
        whole.write(
            rows,
            [
                np.concatenate([old[:, 1:], value[:, None]], 1) if spec.gap else value
                for spec, old, value in zip(windows.state, before, new, strict=True)
            ],
        )
    expected = whole.pack(rows)
    assert arena.pack(rows).tobytes() == expected.tobytes()
    assert b"".join(arena.pack_row(int(row)) for row in rows) == expected.tobytes()
    packed = np.zeros_like(expected)
    arena.pack_into(rows, packed)
    assert packed.tobytes() == expected.tobytes()
    taken = [np.zeros((3, *spec.shape), spec.dtype) for spec in windows.states_taken]
    parts.gather(rows, taken)
    for spec, now, part in zip(windows.state, whole.read(rows), taken, strict=True):
        assert part.tobytes() == (now[:, :: spec.gap] if spec.gap else now).tobytes()
    arena.unpack(np.array([0, 2, 3], np.intp), expected)
    assert arena.pack(np.array([0, 2, 3], np.intp)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("are_rings", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 70])
def test_the_new_elements_of_some_rows_are_those_of_each(
    are_rings: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_executor, "_WINDOWS", ((70, 3), (50, 50), (20, 1)))
    program, rng = with_windows(are_rings=True), np.random.default_rng(5)
    arena, rows = Arena(with_windows(are_rings=are_rings), 6), np.array([4, 1, 5], np.intp)
    arena.write(rows, [drawn(rng, 3, *spec.shape) for spec in program.state])
    form = NewElements(arena, [spec.gap > 0 for spec in program.state], count)
    parts = arena.parts(program)
    for _ in range(90):
        if parts is not None:
            parts.write(rows, [drawn(rng, 3, *spec.shape) for spec in program.states_returned])
        states, packed = arena.read(rows), form.pack(rows)
        for place, row in enumerate(rows.tolist()):
            newest = [
                state[place, -count:] if spec.gap else state[place]
                for spec, state in zip(program.state, states, strict=True)
            ]
            expected = b"".join(
                [*(each.tobytes() for each in newest), *(each[row].tobytes() for each in arena.outputs)]
            )
            assert packed[place].tobytes() == form.pack_row(row) == expected


@pytest.mark.stores("async")
@pytest.mark.parametrize("policy", [SessionPolicy.CARRY, SessionPolicy.MIGRATE])
async def test_the_first_record_after_a_conversion_has_whole_rows(
    disk: Disk, policy: SessionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change would complete the record from before it."""
    monkeypatch.setattr(fake_executor, "_WINDOWS", ((70, 3), (50, 50), (20, 1)))
    monkeypatch.setattr(window_changes, "_MIN_BYTES", 0)
    monkeypatch.setattr(WindowChanges, "period", property(lambda _: 10**6, lambda *_: None), raising=False)
    rng, first = np.random.default_rng(6), with_windows(are_rings=True)
    later = dataclasses.replace(first, fingerprint="f-later")

    async def is_stored_as_change(at: Harness) -> bool:
        (answer,) = await at.submit("a", drawn(rng, 1, 2)).all()
        assert not isinstance(answer, ServerError), answer
        return is_change(await disk.record("a") or b"")

    def converted(states: dict[str, Any]) -> dict[str, Any]:
        return {name: value * np.float32(2) for name, value in states.items()}

    async with disk.engine({"plain": first}, migrations={"double": converted}, is_killed=True) as at:
        await at.open("a")
        assert [await is_stored_as_change(at) for _ in range(3)] == [True] * 3
        before = await at.state("a")
        await at.engine.load_version("plain", 2, later)
        await at.engine.set_default("plain", 2, policy, "double" if policy is SessionPolicy.MIGRATE else "")
        if policy is SessionPolicy.MIGRATE:
            before = converted(before)
        assert [await is_stored_as_change(at) for _ in range(3)] == [
            policy is SessionPolicy.CARRY,
            True,
            True,
        ]
        after = await at.state("a")
    for name, window in after.items():
        if name != "h":
            np.testing.assert_array_equal(window[:, :-3], before[name][:, 3:], name)
    async with disk.engine({"plain@2": later}, migrations={"double": converted}) as at:
        again = await at.state("a")
    assert {name: value.tobytes() for name, value in again.items()} == {
        name: value.tobytes() for name, value in after.items()
    }
