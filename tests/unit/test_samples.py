"""Which tests `make test`, `make coverage` and `make test-rest` run."""

from __future__ import annotations

import types
from typing import Any

import pytest

from support import samples

KINDS = ("memory", "sync", "valkey")


class Item:
    """A test as pytest has collected it."""

    def __init__(self, nodeid: str, *, kind: str = "", is_slow: bool = False) -> None:
        self.nodeid = nodeid
        if kind:
            self.callspec = types.SimpleNamespace(params={"store_kind": kind})
        self._mark = pytest.mark.slow.mark if is_slow else None

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        assert name == "slow"
        return self._mark

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self._mark = mark.mark


def collected() -> Any:
    return [
        *(Item(f"test_a[{kind}-{case}]", kind=kind) for kind in KINDS for case in range(20)),
        *(Item(f"test_b[{row}]") for row in ("memory", "sync")),
        Item("test_c"),
        Item("test_d", is_slow=True),
    ]


def test_each_case_is_quick_with_one_kind_of_store_and_all_kinds_are_among_them() -> None:
    items = collected()
    samples.mark_other_stores(items)
    names = [item.nodeid for item in items if not item.get_closest_marker("slow")]
    assert names[20:] == ["test_b[memory]", "test_b[sync]", "test_c"]
    kinds, cases = zip(*(name[len("test_a[") : -1].split("-") for name in names[:20]), strict=True)
    assert set(kinds) == set(KINDS)
    assert sorted(map(int, cases)) == list(range(20))


def test_two_runs_try_each_test_once() -> None:
    items = collected()
    measured, rest = samples.cases(items, "measured"), samples.cases(items, "rest")
    assert sorted(item.nodeid for item in [*measured, *rest]) == sorted(item.nodeid for item in items)
    assert not set(measured) & set(rest)


def test_some_cases_of_each_quick_test_are_measured() -> None:
    names = [item.nodeid.partition("[")[0] for item in samples.cases(collected(), "measured")]
    assert names == [*["test_a"] * 21, "test_b", "test_c"]


def test_all_others_run_without_the_variable() -> None:
    items = collected()
    assert samples.cases(items, None) == items
