"""Which tests `make test` and `make coverage` run."""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest

from support import samples

KINDS = ("memory", "sync", "valkey")


class Item:
    """A test as pytest has collected it."""

    def __init__(self, nodeid: str, *, is_slow: bool = False, **alternatives: Any) -> None:
        self.nodeid = nodeid
        if alternatives:
            self.callspec = types.SimpleNamespace(params=alternatives)
        self._marks = {"slow"} if is_slow else set()

    def get_closest_marker(self, name: str) -> bool:
        return name in self._marks

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self._marks.add(mark.name)


def collected() -> Any:
    return [
        *(Item(f"a.py::test_a[{kind}-{case}]", store_kind=kind) for kind in KINDS for case in range(20)),
        *(Item(f"a.py::test_b[{row}]") for row in ("memory", "sync")),
        Item("a.py::test_c"),
        Item("a.py::test_d", is_slow=True),
        Item("b.py::test_e"),
    ]


def marked() -> Any:
    items = collected()
    samples.mark_alternatives(items)
    return items


def cases_of_a(items: Any) -> tuple[list[str], list[int]]:
    """Kinds and cases of the test that runs with each kind of store."""
    found = [item.nodeid.partition("[")[2][:-1].split("-") for item in items if "test_a" in item.nodeid]
    return [kind for kind, _ in found], sorted(int(case) for _, case in found)


def test_each_case_is_quick_with_one_kind_of_store_and_all_kinds_are_among_them() -> None:
    quick = [item for item in marked() if not item.get_closest_marker("slow")]
    assert [item.nodeid for item in quick[20:]] == [
        *("a.py::test_b[memory]", "a.py::test_b[sync]"),
        *("a.py::test_c", "b.py::test_e"),
    ]
    kinds, cases = cases_of_a(quick)
    assert set(kinds) == set(KINDS)
    assert cases == list(range(20))


def test_ci_runs_one_case_in_three_with_one_more_kind_and_everything_else() -> None:
    items = marked()
    in_ci = {item for commit in ("6", "7") for item in samples.cases(items, commit)}
    kinds, cases = cases_of_a(item for item in in_ci if item.get_closest_marker("slow"))
    assert len(set(kinds)) > 1
    assert len(cases) == len(set(cases))
    assert 4 <= len(cases) <= 10
    left_out = set(items).difference(in_ci)
    assert all(item.get_closest_marker("soak") and item.get_closest_marker("slow") for item in left_out)
    assert len(left_out) == 40 - len(cases)
    assert len(in_ci) + len(left_out) == len(items)


CLIENTS = ("sync", "async", "async without frames")


def runs(items: Any) -> dict[str, int]:
    """How many cases `make test` runs, CI runs besides, and only a soak runs."""
    samples.mark_alternatives(items)
    is_slow, is_soak = ([bool(item.get_closest_marker(mark)) for item in items] for mark in ("slow", "soak"))
    both = list(zip(is_slow, is_soak, strict=True))
    return {
        "test": both.count((False, False)),
        "ci": both.count((True, False)),
        "soak": both.count((True, True)),
    }


@pytest.mark.parametrize("name", ["client", "shell", "durability", "defect", "front", "store_kind"])
def test_one_alternative_is_quick_and_of_some_cases_one_more_runs_in_ci(name: str) -> None:
    items: Any = [
        Item(f"a.py::test_a[{case}-{one}-sync]", is_slow=False, **{name: one})
        for case in range(30)
        for one in CLIENTS
    ]
    found = runs(items)
    assert (found["test"], found["ci"] + found["soak"]) == (30, 60)
    assert 5 <= found["ci"] <= 15


def test_of_a_slow_test_one_alternative_runs_in_ci() -> None:
    items: Any = [Item(f"a.py::test_a[{one}]", client=one, is_slow=True) for one in CLIENTS]
    assert runs(items) == {"test": 0, "ci": 1, "soak": 2}


def test_of_a_slow_test_each_front_runs_in_ci() -> None:
    items: Any = [Item(f"a.py::test_a[{one}]", front=one, is_slow=True) for one in ("native", "python")]
    assert runs(items) == {"test": 0, "ci": 2, "soak": 0}


def test_what_is_slow_of_the_alternatives_is_not_the_quick_one() -> None:
    items: Any = [Item(f"a.py::test_a[{one}]", client=one, is_slow=one != "async") for one in CLIENTS]
    assert runs(items)["test"] == 1
    assert not items[1].get_closest_marker("slow")


def test_cases_that_differ_in_anything_else_are_no_alternatives() -> None:
    items: Any = [
        *(Item(f"a.py::test_a[{one}-{what}]", client=one) for one, what in zip(CLIENTS, "abc", strict=True)),
        *(Item(f"a.py::test_b[server{place}]", server=one) for place, one in enumerate(CLIENTS)),
        *(Item(f"a.py::test_c[client{place}]", client=place) for place in range(3)),
        # only the word of the client itself is left out of the name
        Item("a.py::test_d[async-sync]", client="sync"),
        Item("a.py::test_d[sync-async]", client="async"),
        Item("a.py::test_d[a-sync]", client="sync"),
    ]
    assert runs(items) == {"test": 12, "ci": 0, "soak": 0}


def test_ci_runs_quick_tests_each_time_and_a_slow_one_every_second_time() -> None:
    items: Any = [Item(f"a.py::test_{number}", is_slow=number < 40) for number in range(60)]
    first, second, third = (samples.cases(items, commit) for commit in ("8", "9", "10"))
    assert first == third
    assert set(first).intersection(second) == set(items[40:])
    assert set(first).union(second) == set(items)
    assert 10 <= len(first) - 20 <= 30


def test_of_a_long_table_ci_runs_half() -> None:
    marks = [[mark.name for mark in value.marks] for value in samples.one_in(4, range(9))]
    slow, soak = ["slow"], ["slow", "soak"]
    assert marks == [[], soak, slow, soak, [], soak, slow, soak, []]
    marks = [[mark.name for mark in value.marks] for value in samples.only(("b", "c"), "abcdef")]
    assert marks == [slow, [], [], soak, slow, soak]
    with pytest.raises(AssertionError, match="'g'"):
        samples.only(("g",), "abcdef")


def test_of_many_slow_cases_ci_runs_a_sixth() -> None:
    items: Any = [
        *(Item(f"tests/congruence/a.py::test_many[{case}]", is_slow=True) for case in range(60)),
        *(Item(f"tests/congruence/a.py::test_quick[{case}]") for case in range(60)),
        *(Item(f"tests/congruence/a.py::test_few[{case}]", is_slow=True) for case in range(3)),
        *(Item(f"tests/fault/a.py::test_four[{case}]", is_slow=True) for case in range(4)),
    ]
    samples.mark(items)
    in_ci = [item.nodeid for item in items if item.get_closest_marker("slow") and item not in soaked(items)]
    assert in_ci == [
        *(f"tests/congruence/a.py::test_many[{case}]" for case in range(0, 60, 6)),
        *(f"tests/congruence/a.py::test_few[{case}]" for case in range(3)),
        "tests/fault/a.py::test_four[0]",
    ]
    assert not any("test_quick" in item.nodeid for item in soaked(items))


def soaked(items: Any) -> list[Any]:
    return [item for item in items if item.get_closest_marker("soak")]


def test_each_worker_begins_with_some_of_the_longest_files_and_each_file_stays_together() -> None:
    files = [f"tests/unit/test_{number}.py" for number in range(40)]
    long = [f"tests/{name}.py" for name in samples._LONG]
    names = [*files[:20], *long[:3], *files[20:], *long[3:]]
    items: Any = [Item(f"{name}::test_{case}") for name in names for case in range(12)]
    ordered = samples.long_first(items, 4)
    assert set(ordered) == set(items)
    assert len(ordered) == len(items)
    size = len(items) // 4
    shares = [ordered[place * size : (place + 1) * size] for place in range(4)]
    firsts = [share[0].nodeid.partition("::")[0] for share in shares]
    assert firsts == [long[0], long[1], long[2], long[3]]
    runs = [name for name, _ in itertools.groupby(ordered, lambda item: item.nodeid.partition("::")[0])]
    assert len(runs) - len(names) <= 3, "a file is divided where a worker's share ends, and nowhere else"


def test_one_process_keeps_the_order_of_all_files_but_the_longest() -> None:
    items: Any = [
        Item(f"tests/unit/{name}.py::test_a") for name in ("test_b", "test_store_disk_damage", "test_a")
    ]
    assert samples.long_first(items, 1) == [items[1], items[0], items[2]]


def test_without_the_variable_all_run_in_their_order() -> None:
    items = marked()
    assert samples.cases(items, None) == items
