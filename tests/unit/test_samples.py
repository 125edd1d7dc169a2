"""Which tests `make coverage` and `make test-rest` run."""

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


ITEMS: Any = [
    *(Item(f"test_a[{kind}-{case}]", kind=kind) for kind in KINDS for case in range(20)),
    *(Item(f"test_b[{row}]") for row in ("memory", "sync")),
    Item("test_c"),
    Item("test_d", is_slow=True),
    Item("test_a[fake_shared-0]", kind="fake_shared", is_slow=True),
]


def test_two_runs_try_each_test_once() -> None:
    measured, rest = samples.cases(ITEMS, "measured"), samples.cases(ITEMS, "rest")
    assert sorted(item.nodeid for item in [*measured, *rest]) == sorted(item.nodeid for item in ITEMS)
    assert not set(measured) & set(rest)


def test_each_case_is_measured_with_one_kind_of_store_and_all_kinds_are_among_them() -> None:
    names = [item.nodeid for item in samples.cases(ITEMS, "measured")]
    assert names[20:] == ["test_b[memory]", "test_b[sync]", "test_c"]
    kinds, cases = zip(*(name[len("test_a[") : -1].split("-") for name in names[:20]), strict=True)
    assert set(kinds) == set(KINDS)
    assert sorted(map(int, cases)) == list(range(20))


def test_all_others_run_without_the_variable() -> None:
    assert samples.cases(ITEMS, None) == ITEMS
