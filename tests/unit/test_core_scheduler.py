"""Which jobs run in the next pass: fairness between sources, and what fits."""

from __future__ import annotations

import dataclasses

from stepwell_server.core.scheduler import Scheduler


@dataclasses.dataclass(eq=False)
class Job:
    name: str
    source: str = "a"
    row_count: int = 1
    steps_left: int = 1


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
            served[job.source] += 1
            scheduler.add(Job(job.source, job.source))
    assert set(served.values()) == {30}


def test_a_job_that_does_not_fit_waits_and_smaller_ones_pass_it_but_once() -> None:
    scheduler = scheduler_of(4, Job("a", "a", 2), Job("big", "b", 4), Job("c", "c", 1))
    assert names(scheduler.next_pass()) == ["a", "c"]
    scheduler.add(Job("late", "c", 1))
    assert names(scheduler.next_pass()) == ["big"], "it kept its place at the head of the round"
    assert names(scheduler.next_pass()) == ["late"]


def test_a_job_of_more_rows_than_a_pass_runs_alone() -> None:
    scheduler = scheduler_of(4, Job("huge", "a", 9), Job("b", "b"))
    assert names(scheduler.next_pass()) == ["huge"]
    assert names(scheduler.next_pass()) == ["b"]
    scheduler = scheduler_of(4, Job("b", "b"), Job("huge", "a", 9), Job("c", "c"))
    assert names(scheduler.next_pass()) == ["b", "c"]
    assert names(scheduler.next_pass()) == ["huge"]


def test_several_steps_together_only_if_nothing_else_waits() -> None:
    scheduler = scheduler_of(2, Job("long", "a", 1, 10), Job("less", "b", 1, 6), Job("c", "c"))
    chosen = scheduler.next_pass()
    assert names(chosen) == ["long", "less"]
    assert scheduler.steps_together(chosen, 100) == 1
    scheduler.next_pass()
    assert scheduler.steps_together(chosen, 100) == 6, "as many as the shortest has left"
    assert scheduler.steps_together(chosen, 4) == 4
    assert scheduler.steps_together(chosen, 0) == 1
