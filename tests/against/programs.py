"""Programs of calls, drawn from a seed: the actions of `support.checks.actions`, and what there is on the wire alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from support import samples
from support.checks import actions
from support.checks.actions import Action

KINDS = (
    "open again",
    "open many",
    "open with an idle limit",
    "export and import",
    "import what is damaged",
    "close many",
    "close another",
    "close matching",
    "list",
    "triton sequence",
    "triton stream",
    "triton alone",
    "refused frame",
    "refused step",
    "refused open",
    "values",
    "version",
    "label",
    "default",
    "load",
    "unload",
    "models",
    "new stream",
)


@dataclasses.dataclass(frozen=True)
class Extra:
    """A call, or a few that belong together, of sessions of a program; `Player` does what its kind says."""

    kind: str
    names: tuple[str, ...]
    number: int


Step = Action | Extra


@dataclasses.dataclass(frozen=True)
class Program:
    """What is done, one after the other, with sessions of one model for the most part."""

    number: int
    model: str
    steps: Sequence[Step]
    restart_at: int | None = None
    """The servers are restarted before this step."""
    is_killed: bool = False
    """They are killed, else they are stopped."""


_extras = st.builds(Extra, st.sampled_from(KINDS), actions.some_names, st.integers(0, 9))
_steps = st.lists(
    st.one_of(
        *[actions.changes] * 8,
        *(actions.simple, actions.opens, actions.forks, actions.reads, actions.many_forks, _extras, _extras),
    ),
    min_size=30,
    max_size=90,
)


def draw(count: int, seed: int, models: Sequence[str]) -> list[Program]:
    """As many programs as there are, at most `count`; the same ones for the same seed."""
    if not count:
        return []
    samples.settle()
    found: list[Program] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        derandomize=False,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(st.sampled_from(models), _steps)
    def keep(model: str, steps: list[Step]) -> None:
        found.append(Program(len(found), model, tuple(steps)))

    keep()
    return found[:count]


def with_restarts(programs: Sequence[Program], every: int) -> list[Program]:
    """The same programs; in the middle of one of `every` the servers are restarted: killed and stopped by turns."""
    return [
        dataclasses.replace(
            program, restart_at=len(program.steps) // 2, is_killed=program.number // every % 2 == 0
        )
        if program.number % every == every - 1
        else program
        for program in programs
    ]
