"""Rows of the arena, the table of sessions and their claims: nothing shared, nothing left of sessions that ended."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import pytest

from stepwell_server.core.claims import Claims
from stepwell_server.core.recent_values import RecentValues
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Slots, page_by_page


def add(table: SessionTable, session_id: str, *rows: int, **more: int) -> int:
    facts = {"model": 3, "batch_size": len(rows), "used": 1.0, "created": 2.0, **more}
    return int(table.add([session_id], rows=np.array(rows, np.intp), **facts)[0])


def handles(*values: int) -> np.ndarray:
    return np.array(values, np.intp)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's list of mappings")
def test_no_write_to_large_columns_waits_for_a_large_page() -> None:
    zeros = page_by_page((1 << 16, 64), np.dtype(np.float32))
    assert not zeros.any()
    assert page_by_page((0, 64), np.dtype(np.float32)).shape == (0, 64)
    place, flags, is_here = zeros.__array_interface__["data"][0], "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(each, 16) for each in first.split("-"))
            is_here = start <= place < end
        elif is_here and first == "VmFlags:":
            flags = line
    assert "nh" in flags.split()


def test_rows_are_taken_once_and_within_the_budget_of_each_kind() -> None:
    slots = Slots(4)
    first, second = slots.take_resident(3), slots.take_working(4)
    assert first is not None
    assert second is not None
    assert not set(first.tolist()) & set(second.tolist())
    assert slots.take_resident(2) is None
    assert slots.take_working(1) is None
    assert (slots.resident, slots.working, slots.capacity) == (3, 4, 8)
    last = slots.take_resident(1)
    assert last is not None
    assert sorted([*first.tolist(), *second.tolist(), *last.tolist()]) == list(range(8))


def test_working_rows_may_be_exchanged_for_resident_ones() -> None:
    slots = Slots(2)
    old, new = slots.take_resident(2), slots.take_working(2)
    assert old is not None
    assert new is not None
    slots.free_working(old)  # the session keeps `new` from now on
    assert (slots.resident, slots.working) == (2, 0)
    slots.free_resident(new)
    taken = slots.take_resident(2)
    assert taken is not None
    assert set(taken.tolist()) == set(new.tolist()), "the last rows freed are the first ones taken"


def test_rows_that_were_never_had_are_taken_last() -> None:
    slots = Slots(100)
    first = slots.take_resident(3)
    assert first is not None
    slots.free_resident(first[:2])
    assert slots.touched == 3
    taken = slots.take_resident(3)
    assert taken is not None
    assert taken.tolist() == [0, 1, 3]
    assert slots.touched == 4, "as many as were ever had at once: memory beyond is not written"


def test_rows_taken_and_freed_at_random_are_never_shared() -> None:
    rng = np.random.default_rng(0)
    slots = Slots(16)
    held: list[np.ndarray] = []
    for _ in range(300):
        if held and rng.random() < 0.5:
            slots.free_resident(held.pop(rng.integers(len(held))))
        else:
            rows = slots.take_resident(int(rng.integers(1, 5)))
            held += [] if rows is None else [rows]
        owned = [row for rows in held for row in rows.tolist()]
        assert len(set(owned)) == len(owned) == slots.resident


def test_a_handle_is_reused_after_its_session_is_gone_and_remembers_nothing() -> None:
    table = SessionTable()
    first = add(table, "a", 5, 6, opened_with=9, revision=3, position=4)
    table.request_id[first] = 77
    table.reply[first] = 2
    table.claimed[first] = True
    assert table.opened_with[first] == 9
    table.remove(first)
    assert "a" not in table
    assert table.find("a") is None
    assert table.count(3) == 0
    again = add(table, "b", 8)
    assert again == first
    assert table.session_id(again) == "b"
    assert table.rows(again).tolist() == [8]
    assert not table.claimed[again]
    for column in ("revision", "position", "request_id", "opened_with", "reply"):
        assert getattr(table, column)[again] == 0, column


def test_an_id_is_added_once() -> None:
    table = SessionTable()
    add(table, "a", 1)
    with pytest.raises(KeyError, match="session 'a' exists"):
        add(table, "a", 2)
    assert len(table) == 1


def test_many_are_added_at_once_or_one_by_one_and_misspelt_facts_are_refused() -> None:
    table = SessionTable(capacity=2)
    facts = {"model": 1, "batch_size": 2, "used": 0.0, "created": 0.0}
    ready = table.add(["a", "b"], rows=np.array([5, 6, 7, 8], np.intp), position=[3, 4], **facts)
    away = table.add(["c"], rows=None, **facts)
    assert table.rows_of(ready).tolist() == [5, 6, 7, 8]
    assert table.position[ready].tolist() == [3, 4]
    assert table.row[away].tolist() == [-1]
    with pytest.raises(TypeError, match="positon"):
        table.add(["d"], rows=None, positon=3, **facts)
    with pytest.raises(TypeError, match="batch_size"):
        table.add(["d"], rows=None, model=1, used=0.0, created=0.0)
    assert "d" not in table


def test_growing_keeps_every_column() -> None:
    table = SessionTable(capacity=2)
    for i in range(9):
        add(table, f"s{i}", i, revision=i, position=2 * i)
    assert len(table) == table.end == 9
    every = table.find_all([f"s{i}" for i in range(9)])
    assert table.revision[every].tolist() == list(range(9))
    assert table.position[every].tolist() == list(range(0, 18, 2))
    assert table.row[every].tolist() == list(range(9))
    assert table.count(3) == 9


def test_many_sessions_cost_no_copies_and_the_garbage_collector_nothing() -> None:
    table = SessionTable()
    before = table.revision
    ids = [f"s{i}" for i in range(50_000)]
    found = table.add(ids, rows=None, model=1, batch_size=1, used=0.0, created=0.0)
    assert table.revision is before, "columns are not copied"
    assert [table.session_id(handle) for handle in found.tolist()] == ids
    del ids
    lists = [each for each in gc.get_objects() if isinstance(each, list) and len(each) >= 50_000]
    assert not [each for each in lists if each[0] == "s0"], "nothing that it would go through each time"


def test_find_all_marks_who_is_missing() -> None:
    table = SessionTable()
    a, b = add(table, "a", 1), add(table, "b", 2)
    assert table.find_all(["b", "x", "a"]).tolist() == [b, -1, a]


def test_find_all_of_a_known_tuple_sees_sessions_that_end_and_begin() -> None:
    table, ids = SessionTable(), tuple([f"s{i}" for i in range(200)])
    before = table.add(ids, rows=None, model=1, batch_size=1, used=0.0, created=0.0)
    for _ in range(2):
        found = table.find_all(ids)
        assert found.tolist() == before.tolist()
        found[:] = -1  # its own copy
    table.remove(int(before[7]))
    assert np.flatnonzero(table.find_all(ids) < 0).tolist() == [7]
    other = add(table, "other", 1)
    assert other == before[7], "the handle is used again, by another session"
    assert np.flatnonzero(table.find_all(ids) < 0).tolist() == [7]
    again = add(table, "s7", 1)
    assert table.find_all(ids)[7] == again
    assert table.find_all(ids).tolist() == [table.find(each) for each in ids]


@pytest.mark.parametrize(("count", "is_kept"), [(63, False), (64, True), (2048, True), (2049, False)])
def test_find_all_keeps_only_tuples_that_come_again(count: int, is_kept: bool) -> None:
    table, ids = SessionTable(), tuple([f"s{i}" for i in range(count)])
    table.add(ids, rows=None, model=1, batch_size=1, used=0.0, created=0.0)
    before = sys.getrefcount(ids)
    table.find_all(ids)
    assert sys.getrefcount(ids) == before + is_kept
    for _ in range(64):
        table.find_all((*ids[1:], ids[0]))
    assert sys.getrefcount(ids) == before


def test_rows_of_many_sessions_come_in_their_order() -> None:
    table = SessionTable()
    a, b, c = add(table, "a", 9), add(table, "b", 4, 2, 7), add(table, "c", 1)
    assert table.rows_of(handles(b, a, c)).tolist() == [4, 2, 7, 9, 1]
    assert table.rows_of(handles(c, a)).tolist() == [1, 9]
    assert table.rows_of(handles()).tolist() == []
    table.set_rows_of(handles(c, b), np.array([20, 21, 22, 23], np.intp))
    assert table.rows(c).tolist() == [20]
    assert table.rows(b).tolist() == [21, 22, 23]


def test_rows_may_be_changed_by_whoever_got_them_without_harm() -> None:
    table = SessionTable()
    a = add(table, "a", 9)
    table.rows(a)[0] = 1
    assert table.rows(a).tolist() == [9]


def test_paging_out_leaves_no_rows_behind() -> None:
    table = SessionTable()
    a, b = add(table, "a", 1), add(table, "b", 2, 3)
    table.page_out(handles(a, b))
    assert table.row[[a, b]].tolist() == [-1, -1]
    table.set_rows_of(handles(b, a), np.array([5, 6, 7], np.intp))
    assert table.rows_of(handles(a, b)).tolist() == [7, 5, 6]


def test_the_oldest_is_forgotten_first_and_what_is_set_again_is_new() -> None:
    remembered: RecentValues[str, int] = RecentValues(2)
    remembered.put("a", 1)
    remembered.put("b", 2)
    remembered.put("a", 3)
    remembered.put("c", 4)
    assert remembered.get("b") is None
    assert (remembered.get("a"), remembered.get("c"), len(remembered)) == (3, 4, 2)
    remembered.forget("a")
    remembered.forget("never there")
    assert remembered.get("a") is None


def table_of(count: int) -> SessionTable:
    table = SessionTable()
    names = [f"s{i}" for i in range(count)]
    table.add(names, rows=np.arange(count, dtype=np.intp), model=0, batch_size=1, used=0.0, created=0.0)
    return table


def test_a_line_is_served_one_by_one_in_its_order() -> None:
    table = table_of(2)
    claims: Claims[str] = Claims(table)
    claims.claim(handles(0, 1))
    for item in ("first", "second"):
        claims.wait(0, item)
    assert claims.waiting(0) == 2
    assert claims.release(handles(0, 1)) == [(0, "first")]
    assert not table.claimed[:2].any(), "an item whose turn it is holds no claim yet"
    claims.claim(handles(0))
    assert claims.release(handles(0)) == [(0, "second")]
    assert claims.release(handles(0)) == []
    assert claims.waiting(0) == 0


def test_only_the_lines_of_released_sessions_move() -> None:
    # more sessions released than lines, and the other way round: two ways through the code
    for released in ((0, 1, 2, 3), (2,)):
        claims: Claims[str] = Claims(table_of(6))
        claims.claim(handles(0, 1, 2, 3, 4, 5))
        for handle in (2, 4, 5):
            claims.wait(handle, f"for {handle}")
        assert claims.release(handles(*released)) == [(2, "for 2")]
        assert [claims.waiting(handle) for handle in (2, 4, 5)] == [0, 1, 1]


def test_a_dropped_line_is_handed_over_once() -> None:
    claims: Claims[str] = Claims(table_of(1))
    claims.claim(handles(0))
    claims.wait(0, "a")
    claims.wait(0, "b")
    assert list(claims.drop_queue(0)) == ["a", "b"]
    assert list(claims.drop_queue(0)) == []
    assert claims.release(handles(0)) == []
