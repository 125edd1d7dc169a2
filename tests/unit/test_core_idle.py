"""Idle sessions are found when they are due, and looked at only then."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest

from stepwell_server import settings
from stepwell_server.core.idle import MAX_IDLE_MS, SLOTS, IdleLimits, IdleWatch
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
    watch = IdleWatch(table, IdleLimits(LIMIT_S), started=0.0)
    watch.watch(add(table, "a", used=3.0))
    watch.watch(add(table, "b", used=50.0))
    assert not len(take_due(watch, 3.0 + LIMIT_S))
    assert names(table, take_due(watch, 3.0 + LIMIT_S + 0.01)) == ["a"]
    assert not len(take_due(watch, 3.0 + LIMIT_S + 1)), "it is told once"
    assert names(table, take_due(watch, 1000.0)) == ["b"]


def test_use_and_claims_put_it_off() -> None:
    table = SessionTable()
    watch = IdleWatch(table, IdleLimits(LIMIT_S), started=0.0)
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
    watch = IdleWatch(table, IdleLimits(LIMIT_S), started=0.0)
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
    watch = IdleWatch(table, IdleLimits(LIMIT_S), started=0.0)
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
    watch = IdleWatch(table, IdleLimits(LIMIT_S), started=1000.0)
    handles = add(table, "a", used=-5e9)
    watch.watch(handles)
    for now in (1000.0, 1000.0 + LIMIT_S):
        assert not watch.too_long(handles, now).any()
        assert not len(take_due(watch, now))
    assert watch.too_long(handles, 1000.1 + LIMIT_S).all()
    assert names(table, take_due(watch, 1000.1 + LIMIT_S)) == ["a"]


def test_those_that_are_due_come_in_parts_and_what_happens_between_two_parts_counts() -> None:
    table = SessionTable()
    watch = IdleWatch(table, IdleLimits(LIMIT_S), started=0.0)
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
    watch = IdleWatch(table, IdleLimits(LIMIT_S), started=0.0)
    watch.watch(add(table, "a", "b", "c"))
    parts = watch.take_due_in_parts(lambda: LIMIT_S + 1, 1)
    assert names(table, next(parts)) == ["a"]
    del parts
    assert names(table, take_due(watch, LIMIT_S + 1)) == ["b", "c"]


def test_without_a_limit_nothing_is_watched() -> None:
    table = SessionTable()
    watch = IdleWatch(table, IdleLimits(0.0), started=0.0)
    handles = add(table, "a")
    watch.watch(handles)
    assert not watch.too_long(handles, 1e12).any()
    assert not len(take_due(watch, 1e12))


@pytest.mark.parametrize("busy", [False, True])
def test_a_session_is_looked_at_a_few_times_per_limit_however_often_one_asks(
    busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SessionTable()
    watch = IdleWatch(table, IdleLimits(LIMIT_S), started=0.0)
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


#: From less than a tick to the longest of a setting.
LIMITS_S = [1e-9, 0.2, 1.0, 1.5, 60.0, 3600.0, 3650 * 86_400.0, 1e300]


@pytest.mark.parametrize("limit_s", LIMITS_S)
@pytest.mark.parametrize("together", [False, True])
def test_every_limit_ends_in_its_time_and_never_before(limit_s: float, together: bool) -> None:
    table, chance = SessionTable(), np.random.default_rng(7)
    watch = IdleWatch(table, IdleLimits(limit_s), started=1e6)
    handles = add(table, "a", "b", "c", used=1e6)
    for some in [handles] if together else np.split(handles, 3):
        watch.watch(some)
    end, now, ended = 1e6 + limit_s, 1e6, 0
    while now <= end and limit_s < 1e9:
        assert not len(take_due(watch, now))
        now += max(limit_s * float(chance.random()) / 3, 1e-3)
    assert watch.next_in(now) == 0.0 or limit_s > 1e9
    ended = len(take_due(watch, max(now, end * 1.001)))
    assert ended == 3
    assert table.next_end == math.inf


def test_sessions_of_all_limits_end_in_their_order_and_each_is_looked_at_a_few_times() -> None:
    table, chance = SessionTable(), np.random.default_rng(3)
    limits_ms = np.exp(chance.uniform(np.log(1000), np.log(86_400_000), 500)).astype(np.int64)
    watch = IdleWatch(table, IdleLimits(0.0), started=0.0)
    handles = table.add(
        [f"s{i}" for i in range(500)], rows=None, model=0, batch_size=1, used=0.0, created=0.0,
        max_idle_ms=limits_ms,
    )  # fmt: skip
    watch.watch(handles)
    assert len(watch._slots) < 1000, "a few dozen of each width"
    now, looks = 0.0, np.zeros(500, np.int64)
    too_long = watch.too_long

    def counted(some: Handles, moment: float) -> Any:
        looks[some] += 1
        return too_long(some, moment)

    watch.too_long = counted  # type: ignore[method-assign, assignment]
    while watch.next_in(now) < math.inf:
        now += max(0.05, watch.next_in(now))
        for handle in take_due(watch, now).tolist():
            late_s = now - limits_ms[handle] / 1000
            assert 0 < late_s < 0.2
            table.remove(handle)
    assert len(table) == 0
    assert looks.max() < 40
    assert looks.mean() < 10


def test_a_limit_of_its_own_and_that_of_the_server() -> None:
    limits = IdleLimits(60.0, unnamed_idle_s=3600.0)
    assert [limits.seconds(own) for own in (0, 5000, 60_000, 90_000)] == [60.0, 5.0, 60.0, 60.0]
    assert limits.seconds_of(np.array([0, 5000, 90_000])).tolist() == [60.0, 5.0, 60.0]
    assert IdleLimits(0.0).seconds_of(np.array([0, 5000])).tolist() == [math.inf, 5.0]
    asked = [limits.of_new(ms, is_named=named) for ms in (None, 0, 5000) for named in (False, True)]
    assert asked == [3_600_000, 0, 0, 0, 5000, 5000]
    assert IdleLimits(0.0, 1e300).of_new(None, is_named=False) == MAX_IDLE_MS == settings.MAX_IDLE_S * 1000
