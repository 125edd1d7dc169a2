"""How much of what could be tried a test run tries.

Tests that are marked `slow` run in `make test-slow` and in CI, and not in `make test` (unless ARGS names their file). Of
kinds of store, clients of the SDK, long lists and random examples all of these try a sample, and `make soak` everything:
it runs all unit and congruence tests, and the other files that import this module.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

T = TypeVar("T")

#: Set by `make soak`.
ALL = "TEST_ALL" in os.environ
#: Prime, so that a sample of bytes meets every place of what is laid out in words.
_ONE_IN = 7
#: `make test` draws one random example in so many, CI twice as many.
_SHARE = 8
#: What a test is parametrized with for the same claim: kinds of store, clients of the SDK, when a change is durable, and
#: the defects that a checker of the tests must find.
_ALTERNATIVES = ("store_kind", "client", "shell", "durability", "defect")
#: And of a quick test: where it is slow, CI is to try it on the native front, which is the one that is used, too.
_QUICK_ALTERNATIVES = (*_ALTERNATIVES, "front")
#: Of a test with at least so many slow cases CI runs one in so many, the first among them.
_MANY, _MANY_ONE_IN = 4, 6
#: CI runs one quick case in so many with one more alternative.
_MORE_ONE_IN = 3
#: CI runs every so many of the slow tests that are left, and others of them for the next commit.
_TURNS = 2
#: Files with tests of 20 seconds and more.
_LONG = (
    *("packaging/test_production_page", "congruence/test_compile_causal", "fault/test_replicas_store"),
    *("packaging/test_install_commands", "integration/test_examples", "congruence/test_simulation"),
    *("congruence/test_compile_fuzz", "congruence/test_compile_everyday", "integration/test_demo"),
    *("unit/test_store_disk_damage", "integration/test_cluster_demo", "integration/test_triton_clients"),
    *("fault/test_windows_kill", "integration/test_retrained", "integration/test_cli_bench"),
)
#: Set by `make coverage`.
_CASES = os.environ.get("TEST_CASES")


def some(values: Sequence[T]) -> Sequence[T]:
    """Each of the values, or one in seven, the first and the last among them."""
    return values if ALL else [*values[:-1:_ONE_IN], *values[-1:]]


def one_in(count: int, values: Iterable[Any]) -> list[Any]:
    """All of the values, for a test of each. Those between every so many are `slow`; CI runs every other of them."""
    return [
        pytest.param(value, marks=_marks_between(place) if place % count else ())
        for place, value in enumerate(values)
    ]


def only(quick: Collection[str], values: Iterable[str]) -> list[Any]:
    """The same where `quick` names those that are not `slow`, such as the models that other quick tests compile as well."""
    found = list(values)
    assert set(quick) <= set(found), f"{set(quick) - set(found)} must be among the values"
    return [
        pytest.param(value, marks=() if value in quick else _marks_between(place))
        for place, value in enumerate(found)
    ]


def _marks_between(place: int) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow, *([pytest.mark.soak] if place % 2 else [])]


def examples(count: int) -> int:
    """How many random examples to draw, of so many in a soak."""
    share = _SHARE if _CASES is None else _SHARE // 2
    return count if ALL else max(1, count // share)


def mark_alternatives(items: Iterable[pytest.Item]) -> None:
    """Mark the cases of a test that differ only in an alternative slow, all but one: another one from case to case.

    Of one case in three, one of the others runs in CI too; the rest have the mark `soak` as well. Of a test that is slow
    itself, CI runs one.
    """
    alike: dict[str, list[pytest.Item]] = {}
    for item in items:
        alike.setdefault(_without_alternatives(item), []).append(item)
    for case, found in alike.items():
        if len(found) == 1:
            continue
        quick = [item for item in found if not item.get_closest_marker("slow")]
        among = quick or found
        first = among[_number(case) % len(among)]
        others = [item for item in found if item is not first]
        number = _number(f"{case} in CI")
        in_ci = others[number % len(others)] if quick and number // len(others) % _MORE_ONE_IN == 0 else first
        for item in others:
            item.add_marker(pytest.mark.slow)
            if item is not in_ci:
                item.add_marker(pytest.mark.soak)


def mark(items: Sequence[pytest.Item]) -> None:
    """Mark which tests are slow, and which run in soaks only."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    mark_alternatives(items)
    _mark_many(slow)


def _mark_many(slow: Iterable[pytest.Item]) -> None:
    """Mark most cases `soak` of a test that has many which are slow in themselves."""
    of: dict[str, list[pytest.Item]] = {}
    for item in slow:
        if not item.get_closest_marker("soak"):
            of.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in of.values():
        for place, item in enumerate(found if len(found) >= _MANY else ()):
            if place % _MANY_ONE_IN:
                item.add_marker(pytest.mark.soak)


def _without_alternatives(item: pytest.Item) -> str:
    """The name of a case of a test, without the alternatives that it runs with."""
    call: Any = getattr(item, "callspec", None)
    test, _, case = item.nodeid.partition("[")
    case = f"-{case.removesuffix(']')}-"
    for name in _ALTERNATIVES if item.get_closest_marker("slow") else _QUICK_ALTERNATIVES:
        if call and isinstance(value := call.params.get(name), str):
            case = case.replace(f"-{value}-", "-", 1)
    return test + case


def _number(name: str) -> int:
    return zlib.crc32(name.encode())


def cases(items: Sequence[pytest.Item], chosen: str | None = _CASES) -> list[pytest.Item]:
    """The tests that this run tries: all, or with TEST_CASES=N the quick ones and part of the slow ones, by turns.

    N is a number that grows by one with each commit, so that two commits in a row have all tests without the mark `soak`.
    """
    if chosen is None:
        return list(items)
    assert chosen.isdecimal(), f"TEST_CASES must be a number of commits; got {chosen}"
    return [
        item
        for item in items
        if not item.get_closest_marker("soak")
        and (not item.get_closest_marker("slow") or (_number(item.nodeid) - int(chosen)) % _TURNS == 0)
    ]


def long_first(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """The tests, so that each worker begins with some of the longest ones: at the end it would be the only one at work.

    pytest-xdist gives each worker at first an equal number of tests that follow each other, and later half of those that
    another one has left, from their end.
    """
    of: dict[str, list[pytest.Item]] = {}
    for item in items:
        of.setdefault(item.nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py"), []).append(
            item
        )
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for place, name in enumerate(name for name in _LONG if name in of):
        shares[place % workers] += of.pop(name)
    others = itertools.chain.from_iterable(of.values())
    left = len(items)
    for place, share in enumerate(shares):
        count = left // (workers - place)
        share.extend(itertools.islice(others, max(0, count - len(share))))
        left -= len(share)
    return [*itertools.chain.from_iterable(shares), *others]


def settle() -> None:
    """Set what holds for all tests with random examples: which they draw, and that no clock decides.

    A run that is no soak draws the same ones each time: it fails for what was changed, not for a defect that was there
    before and that nobody has met. To find such defects is what soaks are for, which draw others each time.
    """
    settings.register_profile(
        "stepwell",
        deadline=None,
        derandomize=not ALL,
        report_multiple_bugs=False,
        # they count seconds, unlucky draws, and fixtures that are in order here
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("stepwell")
    if not ALL:
        # Hypothesis mixes numbers and words of the product's modules into what it draws, of those that are imported by
        # then: which they are depends on the tests that ran before in this process. It has no setting for that.
        nothing = providers._local_constants
        assert callable(providers._get_local_constants)
        assert not nothing.integers, "nothing was drawn before"
        providers._get_local_constants = lambda: nothing
