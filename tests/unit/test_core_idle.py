"""Idle sessions are found when they are due, and looked at only then."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from stepwell_server.core.idle import SLOTS, IdleWatch
from stepwell_server.core.sessions import Handles, SessionTable

LIMIT_S = 160.0


def take_due(watch: IdleWatch, now: float) -> Handles:
    return np.concatenate([np.zeros(0, np.intp), *watch.take_due_in_parts(lambda: now, sys.maxsize)])


def add(table: SessionTable, *session_ids: str, used: float = 0.0) -> Handles:
    return table.add(session_ids, rows=None, model=0, batch_size=1, used=used, created=0.0)


def names(table: SessionTable, handles: Handles) -> list[str]:
    return sorted(table.session_id(handle) for handle in handles.tolist())


def test_a_session_is_due_as_soon_as_it_was_idle_for_longer_than_the_limit() -> None:
    table = SessionTable()
    watch = IdleWatch(table, LIMIT_S, started=0.0)
    watch.watch(add(table, "a", used=3.0))
    watch.watch(add(table, "b", used=50.0))
    assert not len(take_due(watch, 3.0 + LIMIT_S))
    assert names(table, take_due(watch, 3.0 + LIMIT_S + 0.01)) == ["a"]
    assert not len(take_due(watch, 3.0 + LIMIT_S + 1)), "it is told once"
    assert names(table, take_due(watch, 1000.0)) == ["b"]


def test_use_and_claims_put_it_off() -> None:
    table = SessionTable()
    watch = IdleWatch(table, LIMIT_S, started=0.0)
    a, b = add(table, "a", "b")
    watch.watch(np.array([a, b]))
    table.used[a] = 100.0
    table.claimed[b] = True
    assert not len(take_due(watch, LIMIT_S + 1))
    table.claimed[b] = False
    assert names(table, take_due(watch, LIMIT_S + 2)) == ["b"]
    assert not len(take_due(watch, 100.0 + LIMIT_S))
    assert names(table, take_due(watch, 100.0 + LIMIT_S + 1)) == ["a"]


def test_a_handle_that_was_given_to_another_session_is_that_ones() -> None:
    table = SessionTable()
    watch = IdleWatch(table, LIMIT_S, started=0.0)
    (a,) = add(table, "a")
    watch.watch(np.array([a]))
    table.remove(int(a))
    assert not len(take_due(watch, LIMIT_S + 1))
    (b,) = add(table, "b", used=200.0)
    assert b == a
    watch.watch(np.array([b]))
    assert not len(take_due(watch, 200.0 + LIMIT_S))
    assert names(table, take_due(watch, 201.0 + LIMIT_S)) == ["b"]


def test_a_handle_that_was_given_away_at_once_is_due_once() -> None:
    table = SessionTable()
    watch = IdleWatch(table, LIMIT_S, started=0.0)
    for session_id in "ab":
        handles = add(table, session_id, used=3.0)
        watch.watch(handles)
        table.remove(int(handles[0]))
    c = add(table, "c", used=3.0)
    watch.watch(c)
    table.used[c] = 100.0
    assert not len(take_due(watch, 3.0 + LIMIT_S + 1)), "it moves on"
    assert names(table, take_due(watch, 1000.0)) == ["c"]


def test_the_start_counts_as_use() -> None:
    table = SessionTable()
    watch = IdleWatch(table, LIMIT_S, started=1000.0)
    handles = add(table, "a", used=-5e9)
    watch.watch(handles)
    for now in (1000.0, 1000.0 + LIMIT_S):
        assert not watch.too_long(handles, now).any()
        assert not len(take_due(watch, now))
    assert watch.too_long(handles, 1000.1 + LIMIT_S).all()
    assert names(table, take_due(watch, 1000.1 + LIMIT_S)) == ["a"]


def test_those_that_are_due_come_in_parts_and_what_happens_between_two_parts_counts() -> None:
    table = SessionTable()
    watch = IdleWatch(table, LIMIT_S, started=0.0)
    handles = add(table, *[f"s{i}" for i in range(10)])
    watch.watch(handles)
    now = LIMIT_S + 1
    parts = watch.take_due_in_parts(lambda: now, 4)
    assert names(table, next(parts)) == ["s0", "s1", "s2", "s3"]
    table.used[handles[4]] = now
    table.claimed[handles[5]] = True
    table.remove(int(handles[6]))
    (again,) = add(table, "again", used=now)
    assert again == handles[6]
    watch.watch(np.array([again]))
    assert names(table, next(parts)) == ["s7"]
    assert names(table, next(parts)) == ["s8", "s9"]
    assert next(parts, None) is None
    table.claimed[handles[5]] = False
    assert names(table, take_due(watch, now)) == ["s5"]
    assert names(table, take_due(watch, 2 * now)) == ["again", "s4"]


def test_what_a_look_that_ended_early_has_not_come_to_is_due_the_next_time() -> None:
    table = SessionTable()
    watch = IdleWatch(table, LIMIT_S, started=0.0)
    watch.watch(add(table, "a", "b", "c"))
    parts = watch.take_due_in_parts(lambda: LIMIT_S + 1, 1)
    assert names(table, next(parts)) == ["a"]
    del parts
    assert names(table, take_due(watch, LIMIT_S + 1)) == ["b", "c"]


def test_without_a_limit_nothing_is_watched() -> None:
    table = SessionTable()
    watch = IdleWatch(table, 0.0, started=0.0)
    handles = add(table, "a")
    watch.watch(handles)
    assert not watch.too_long(handles, 1e12).any()
    assert not len(take_due(watch, 1e12))


@pytest.mark.parametrize("busy", [False, True])
def test_a_session_is_looked_at_a_few_times_per_limit_however_often_one_asks(
    busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SessionTable()
    watch = IdleWatch(table, LIMIT_S, started=0.0)
    handles = add(table, *[f"s{i}" for i in range(100)])
    watch.watch(handles)
    looks = 0
    too_long = watch.too_long

    def counted(some: Handles, now: float) -> Any:
        nonlocal looks
        looks += len(some)
        return too_long(some, now)

    monkeypatch.setattr(watch, "too_long", counted)
    now, asked = 0.0, 0
    while now < 3 * LIMIT_S:
        now += LIMIT_S / SLOTS / 2
        asked += 1
        if busy:
            table.used[handles] = now
        assert not len(take_due(watch, now)) or not busy
    assert looks <= 100 * 3 * 4 < 100 * asked
