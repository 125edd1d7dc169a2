"""Which jobs run in the next pass: fairness between sources, and what fits."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepwell_server.core.callers import Caller, Role
from stepwell_server.core.scheduler import ACTIVE_S, ALL_CALLERS, FairQueue, Scheduler, Source, source_of


@dataclasses.dataclass(eq=False)
class Job:
    name: str
    of: str | Source = "a"
    row_count: int = 1
    steps_left: int = 1
    is_splittable: bool = False

    @property
    def source(self) -> Source:
        return (self.of,) if isinstance(self.of, str) else self.of

    def split_off(self, rows: int) -> Job:
        if rows >= self.row_count:
            return self
        self.row_count -= rows
        return dataclasses.replace(self, row_count=rows)


def names(jobs: list[Job]) -> list[str]:
    return [job.name for job in jobs]


def scheduler_of(max_rows: int, *jobs: Job) -> Scheduler[Job]:
    scheduler: Scheduler[Job] = Scheduler(max_rows)
    for job in jobs:
        scheduler.add(job)
    return scheduler


def test_a_pass_takes_what_fits_and_leaves_the_rest_in_its_order() -> None:
    scheduler = scheduler_of(2, Job("1"), Job("2"), Job("3"))
    assert scheduler.rows_waiting == 3
    assert names(scheduler.next_pass()) == ["1", "2"]
    assert scheduler.rows_waiting == 1
    assert names(scheduler.next_pass()) == ["3"]
    assert not scheduler
    assert scheduler.next_pass() == []


def test_sources_take_turns() -> None:
    scheduler = scheduler_of(4, *(Job(f"a{i}", "a") for i in range(1000)), Job("b0", "b"), Job("c0", "c"))
    assert names(scheduler.next_pass()) == ["a0", "b0", "c0", "a1"]


def test_a_source_that_was_left_out_comes_first_in_the_next_pass() -> None:
    scheduler = scheduler_of(2, *(Job(f"{s}{i}", s) for i in range(2) for s in "abc"))
    assert names(scheduler.next_pass()) == ["a0", "b0"]
    assert names(scheduler.next_pass()) == ["c0", "a1"]
    assert names(scheduler.next_pass()) == ["b1", "c1"]


def test_every_source_is_served_in_turn_under_constant_load() -> None:
    scheduler = scheduler_of(3, *(Job(s, s) for s in "abcdefg"))
    served = dict.fromkeys("abcdefg", 0)
    for _ in range(70):
        for job in scheduler.next_pass():
            served[job.name] += 1
            scheduler.add(Job(job.name, job.name))
    assert set(served.values()) == {30}


def test_a_job_that_does_not_fit_is_first_in_the_next_pass() -> None:
    scheduler = scheduler_of(4, Job("a", "a", 2), Job("big", "b", 4), Job("c", "c", 1))
    assert names(scheduler.next_pass()) == ["a"]
    assert names(scheduler.next_pass()) == ["big"]
    assert names(scheduler.next_pass()) == ["c"]


def test_a_job_of_more_rows_than_a_pass_runs_alone() -> None:
    scheduler = scheduler_of(4, Job("huge", "a", 9), Job("b", "b"))
    assert names(scheduler.next_pass()) == ["huge"]
    assert names(scheduler.next_pass()) == ["b"]
    scheduler = scheduler_of(4, Job("b", "b"), Job("huge", "a", 9), Job("c", "c"))
    assert names(scheduler.next_pass()) == ["b"]
    assert names(scheduler.next_pass()) == ["huge"]
    assert names(scheduler.next_pass()) == ["c"]


def test_several_steps_together_only_if_nothing_else_waits() -> None:
    scheduler = scheduler_of(2, Job("long", "a", 1, 10), Job("less", "b", 1, 6), Job("c", "c"))
    chosen = scheduler.next_pass()
    assert names(chosen) == ["long", "less"]
    assert scheduler.steps_together(chosen, 100) == 1
    scheduler.next_pass()
    assert scheduler.steps_together(chosen, 100) == 6, "as many as the shortest has left"
    assert scheduler.steps_together(chosen, 4) == 4
    assert scheduler.steps_together(chosen, 0) == 1


def many(tenant: str, connections: int, rows: int, *, is_splittable: bool = False) -> list[Job]:
    who = Caller("ann", tenant, Role.USER)
    return [
        Job(f"{tenant}{n}", source_of(who, f"{tenant}{n}"), rows, is_splittable=is_splittable)
        for n in range(connections)
    ]


def test_a_tenant_with_a_hundred_connections_has_one_share() -> None:
    jobs = [*many("flood", 100, 1), *many("quiet", 2, 1), *many("other", 1, 1)]
    scheduler = scheduler_of(6, *jobs)
    assert names(scheduler.next_pass()) == ["flood0", "quiet0", "other0", "flood1", "quiet1", "flood2"]


def test_while_others_are_about_a_pass_is_short_and_shared_in_rows() -> None:
    scheduler = scheduler_of(1000, *many("quiet", 1, 8))
    assert scheduler.max_rows_of_pass(0.0, 100) is None, "it is alone"
    scheduler.next_pass(0.0)
    for job in many("flood", 2, 600, is_splittable=True):
        scheduler.add(job)
    assert scheduler.max_rows_of_pass(ACTIVE_S / 2, 100) == 100, "the other will be back"
    taken = scheduler.next_pass(ACTIVE_S / 2, 100)
    assert Counter(j.name for j in taken) == {"flood0": 1, "flood1": 1}
    assert sorted(job.row_count for job in taken) == [48, 52]
    scheduler.add(*many("quiet", 1, 8))
    assert names(scheduler.next_pass(0.0, scheduler.max_rows_of_pass(0.0, 100))) == ["quiet0"], (
        "alone: it has little"
    )
    scheduler.add(*many("quiet", 1, 8))
    mixed = scheduler.next_pass(0.0, scheduler.max_rows_of_pass(0.0, 100))
    assert sum(job.row_count for job in mixed) == 100
    assert Counter(job.name for job in mixed)["quiet0"] == 1, "and then with the others"
    while scheduler:
        scheduler.next_pass(0.0, scheduler.max_rows_of_pass(0.0, 100))
    assert scheduler.rows_waiting == 0
    for job in [*many("a", 1, 300), *many("b", 1, 300)]:
        scheduler.add(job)
    assert scheduler.max_rows_of_pass(10.0, 100) == 600, "nobody is better off with less"
    scheduler.next_pass(10.0, 600)
    scheduler.add(*many("a", 1, 300))
    assert scheduler.max_rows_of_pass(10.0 + 2 * ACTIVE_S, 100) is None, "the other has been gone for long"


def test_a_moment_with_few_rows_does_not_shorten_the_passes_of_equals() -> None:
    scheduler = scheduler_of(1000, *many("a", 1, 100), *many("b", 1, 100))
    scheduler.next_pass(0.0, 200)
    now, limits = 0.0, list[int | None]()
    for _ in range(12):
        for job in [*many("a", 1, 5), *many("b", 1, 195)]:
            scheduler.add(job)
        limits.append(scheduler.max_rows_of_pass(now, 10))
        scheduler.next_pass(now)
        now += ACTIVE_S / 4
    assert limits[0] is None, "both had as many a moment ago"
    assert limits[-1] == 10, "one that has had little for long is small"


def test_what_many_callers_have_in_common_is_no_source_of_its_own() -> None:
    scheduler = scheduler_of(1000, *many("a", 1, 6), *many("b", 1, 5))
    scheduler.next_pass(0.0)
    scheduler.add(Job("of both", ALL_CALLERS, 120))
    scheduler.next_pass(0.0)
    scheduler.add(Job("of both", ALL_CALLERS, 120))
    scheduler.add(*many("a", 1, 1))
    assert scheduler.max_rows_of_pass(0.0, 10) is None, "a and b had as many each"
    scheduler.next_pass(0.0)
    scheduler.add(Job("of all", ALL_CALLERS, 120))
    scheduler.add(*many("c", 1, 300))
    assert scheduler.max_rows_of_pass(0.0, 10) == 120 + 3 * 1, "and c may only have as many as a and b"


def test_a_step_without_a_job_makes_no_other_source_of_its_connection() -> None:
    scheduler = scheduler_of(1000, *many("a", 1, 60), *many("b", 1, 50))
    scheduler.next_pass(0.0)
    scheduler.alone_until, scheduler.alone_by = 1.0, "a0"
    for job in [*many("a", 1, 60), *many("b", 1, 50)]:
        scheduler.add(job)
    assert scheduler.max_rows_of_pass(0.0, 10) is None
    scheduler.alone_by = "c0"
    assert scheduler.max_rows_of_pass(0.0, 10) == 10, "the step of another connection is one"


def test_others_are_about_while_they_wait_and_for_a_moment_after() -> None:
    scheduler = scheduler_of(1000, *many("a", 1, 300))
    assert not scheduler.is_contended(0.0)
    scheduler.next_pass(0.0)
    scheduler.add(*many("a", 1, 300))
    assert not scheduler.is_contended(0.0)
    scheduler.add(*many("b", 1, 1))
    assert scheduler.is_contended(0.0)
    scheduler.next_pass(0.0)
    scheduler.add(*many("a", 1, 300))
    assert scheduler.is_contended(ACTIVE_S / 2)
    assert not scheduler.is_contended(2 * ACTIVE_S)


def test_steps_that_run_without_jobs_keep_the_passes_of_other_connections_short() -> None:
    frame, more = many("a", 1, 300), many("a", 1, 300)
    scheduler = scheduler_of(1000, *frame)
    assert scheduler.max_rows_of_pass(1.0, 100) is None, "nobody else is active"
    scheduler.alone_until, scheduler.alone_by = 1.0 + ACTIVE_S, frame[0].source[-1]
    assert not scheduler.is_contended(1.0), "the same connection"
    scheduler.alone_by = ["another"]
    assert scheduler.is_contended(1.0)
    assert scheduler.max_rows_of_pass(1.0, 100) == 100
    assert len(scheduler.next_pass(1.0, 100)) == 1
    assert not scheduler.is_contended(1.0 + 2 * ACTIVE_S)
    scheduler.add(*more)
    assert scheduler.max_rows_of_pass(1.0 + 2 * ACTIVE_S, 100) is None


def test_a_source_is_the_only_one_as_long_as_no_other_is_about() -> None:
    scheduler = scheduler_of(1000, *many("a", 1, 300))
    assert scheduler.only_source(0.0) is None, "nobody had a pass yet"
    scheduler.next_pass(0.0)
    only = scheduler.only_source(0.0)
    assert only is not None
    assert only[0] == "a"
    scheduler.add(*many("b", 1, 1))
    scheduler.next_pass(ACTIVE_S / 2)
    assert scheduler.only_source(ACTIVE_S / 2) is None
    scheduler.add(*many("a", 1, 300))
    scheduler.next_pass(ACTIVE_S)
    assert scheduler.only_source(ACTIVE_S) is None
    assert scheduler.only_source(1.9 * ACTIVE_S) == only


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(0, 5), st.integers(1, 40), st.booleans()),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 64),
)
def test_no_tenant_waits_for_more_than_a_round_and_nothing_is_lost(
    asked: list[tuple[str, int, int, bool]], most: int
) -> None:
    jobs = [
        Job(str(n), (tenant, "", connection), rows, is_splittable=is_splittable)
        for n, (tenant, connection, rows, is_splittable) in enumerate(asked)
    ]
    expected = Counter({job.name: job.row_count for job in jobs})
    scheduler = scheduler_of(64, *jobs)
    run: Counter[str] = Counter()
    waited: Counter[str] = Counter()
    while scheduler:
        waiting = {job.source[0] for job in jobs if run[job.name] < expected[job.name]}
        limit = scheduler.max_rows_of_pass(0.0, most)
        taken = scheduler.next_pass(0.0, limit)
        assert taken, "something always runs"
        rows = sum(job.row_count for job in taken)
        assert len(taken) == 1 or rows <= 64
        run.update({job.name: job.row_count for job in taken})
        served = {job.source[0] for job in taken}
        for tenant in waiting:
            waited[str(tenant)] = 0 if tenant in served else waited[str(tenant)] + 1
            # a pass of each other one, and as many of those that have little; debts of 40 rows at most
            assert waited[str(tenant)] <= 16
    assert run == expected
    assert scheduler.rows_waiting == 0


@pytest.mark.parametrize(("waiting", "rows", "may"), [(0, 1000, True), (1, 16, True), (1, 17, False)])
def test_few_steps_may_overtake_what_waits_and_many_may_not(waiting: int, rows: int, may: bool) -> None:
    scheduler = scheduler_of(64, *[Job("a")] * waiting)
    assert scheduler.may_overtake(rows, 64) is may


def test_a_queue_knows_whether_others_have_items() -> None:
    queue: FairQueue[str] = FairQueue()
    assert not queue.has_others(("a",))
    queue.add(("a",), "a1")
    assert not queue.has_others(("a",))
    assert queue.has_others(("b",))
    queue.add(("b",), "b1")
    assert queue.has_others(("a",))
    queue.pop(("b",))
    assert not queue.has_others(("a",)), "b is known and has nothing"


def served(queue: FairQueue[str], count: int, cost: dict[str, float]) -> list[str]:
    """The next items, each with what it costs its source by its first letter."""
    taken = []
    for _ in range(count):
        source = queue.next()
        item = queue.pop(source)
        queue.charge(source, cost[item[0]])
        taken.append(item)
    return taken


def test_each_level_of_sources_has_equal_shares_of_what_is_used() -> None:
    queue: FairQueue[str] = FairQueue()
    for n in range(400):
        queue.add(("t", "ann", 1), f"a{n}")
        queue.add(("t", "bob", 1), f"b{n}")
        queue.add(("t", "bob", 2), f"c{n}")
        queue.add(("u", "eve", 1), f"e{n}")
    counts = Counter(item[0] for item in served(queue, 400, {"a": 1, "b": 1, "c": 1, "e": 4}))
    assert counts == {"a": 160, "b": 80, "c": 80, "e": 80}, "u has cost as much as t"


def test_what_was_used_may_be_charged_later_and_a_source_without_items_is_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(("a",), "a1")
    queue.add(("b",), "b1")
    source = queue.next()
    assert (source, queue.first(source), queue.pop(source)) == (("a",), "a1", "a1")
    queue.add(("a",), "a2")
    queue.charge(source, 5.0)
    queue.charge(("c",), 1.0)
    assert served(queue, 2, {"a": 1.0, "b": 1.0}) == ["b1", "a2"]
    assert not queue
    queue.add(("d",), "d")
    queue.add(("d",), "d")
    assert queue.pop_all(queue.next()) == ["d", "d"]
    assert not queue


def test_a_source_that_was_served_does_not_wait_for_each_that_is_new_and_those_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(3):
        queue.add(("t", "old"), "o")
    cost, order = {"o": 10.0, "n": 1.0}, served(queue, 1, {"o": 10.0})
    for n in range(1000):
        queue.add(("t", n), "n")
        order += served(queue, 1, cost)
    assert order.count("o") == 3
    while queue:
        served(queue, 1, cost)
    queue.add(("t", "last"), "n")
    queue.next()
    assert len(queue._root.children["t"].children) < 20
