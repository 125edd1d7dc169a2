"""Replicas on one store, simulated: see `support.sim.schedule`. `tests/fault/simulate.py` runs as many schedules as one likes."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from stepwell_server.core import exactly_once
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.namespaces import tenant_of
from stepwell_server.core.quotas import Usage
from stepwell_server.engine import usage_counts
from stepwell_server.engine.intake import admission
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.intake.pager import Pager
from stepwell_server.engine.passes import direct
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.begin import Attempts, CreatedSessions, NewSessions, SessionCreator
from stepwell_server.engine.usage_counts import UsageCounts
from stepwell_server.errors import SessionExists
from stepwell_server.store.base import CommitResult
from stepwell_server.store.valkey import store as valkey_store
from stepwell_server.store.valkey.commits import Part, outcome_of
from stepwell_server.store.valkey.connection.client import ErrorReply
from stepwell_server.store.valkey.connection.nodes import Node
from stepwell_server.store.valkey.connection.requests import Request, Requests
from stepwell_server.store.valkey.scripts import COMMIT, REPLACE
from support.samples import ALL, one_in
from support.sim.client import KEYS, Bugs, make_nodes, tags
from support.sim.network import Network, Weather
from support.sim.node import ModelNode
from support.sim.programs import Mix
from support.sim.quota import PREFIX
from support.sim.replica import Replica
from support.sim.schedule import Plan, Schedule, run
from support.sim.world import World

_BLOCK, _BLOCKS = 20, 10 if ALL else 4


@pytest.mark.parametrize("block", one_in(_BLOCKS, range(_BLOCKS)))
def test_schedules_hold(block: int) -> None:
    reports = []
    for seed in range(block * _BLOCK, (block + 1) * _BLOCK):
        try:
            reports.append(run(seed).report)
        except AssertionError as error:
            raise AssertionError(f"tests/fault/simulate.py --trace --seed {seed}: {error}") from error
    # much happens in them, else they would hold because there is nothing in them
    assert sum(report.acknowledged for report in reports) > 150
    assert sum(report.unknown for report in reports) > 5
    assert sum(report.reads for report in reports) > 50
    assert sum(report.forks for report in reports) > 0
    assert sum(report.unjudged for report in reports) < sum(report.sessions for report in reports) / 20


def test_a_session_that_leaves_the_table_while_others_are_looked_at_is_not_lost() -> None:
    """A frame names several sessions, and versions move: this schedule had one that was not found, though it was there."""
    run(190335)


def test_a_session_that_ended_before_its_slot_moved_is_not_counted_after_a_fail_over() -> None:
    """Of this schedule's store a fail-over took back that counts were gone, and the slot came back to them."""
    run(400477)


@pytest.mark.parametrize("seed", range(10))
def test_a_fail_over_brings_nothing_back_of_a_slot_that_has_moved(seed: int) -> None:
    """Not what was deleted before either, which is not among the keys that move."""
    source, target = make_nodes(World(seed), 2, Bugs(), must_sync=False, flush_s=1.0)
    tag = next(tag for tag in tags()[1:] if source.owners[tag] is source)
    key = b"{%s}counts" % tag
    assert told(source, [b"HSET", key, b"a", b"1"], [b"HDEL", key, b"a"]) == [1, 1]
    move(source, tag, target)
    source.fail_over(2.0)
    move(target, tag, source)
    assert told(source, [b"HGET", key, b"a"]) == [None]


@pytest.mark.parametrize("seed", range(10))
def test_a_fail_over_while_a_slot_moves_leaves_all_of_a_command_or_nothing(seed: int) -> None:
    source, target = make_nodes(World(seed), 2, Bugs(), must_sync=False, flush_s=1.0)
    tag = next(tag for tag in tags()[1:] if source.owners[tag] is source)
    keys = [b"{%s}%s" % (tag, name) for name in (b"a", b"b")]
    told(source, [b"MSET", keys[0], b"1", keys[1], b"1"])
    source.begin_move(tag, target)
    source.move_some(tag)
    source.fail_over(2.0)
    while source.move_some(tag):
        pass
    source.end_move(tag)
    assert len(set(told(target, *([b"GET", key] for key in keys)))) == 1


def told(node: ModelNode, *commands: list[bytes]) -> list[Any]:
    """What a node answers."""
    replies: list[Any] = []
    node.do(commands, "", replies.extend)
    return replies


def move(source: ModelNode, tag: bytes, target: ModelNode) -> None:
    """Move a slot."""
    source.begin_move(tag, target)
    while source.move_some(tag):
        pass
    source.end_move(tag)


class LateNetwork(Network):
    """Give the next messages between two nodes this delay."""

    def __init__(self, world: World) -> None:
        super().__init__(world, Weather())
        self.next_s: dict[tuple[str, str], list[float]] = {}

    @override
    def delay(self, a: str, b: str) -> float:
        return said.pop(0) if (said := self.next_s.get((a, b))) else super().delay(a, b)


def test_what_comes_late_of_an_opening_that_was_undone_begins_nothing() -> None:
    """Of the two sessions of a call another replica makes one meanwhile; the first message that makes the other comes last."""
    world = World(1)
    network = LateNetwork(world)
    nodes = make_nodes(world, 2, Bugs(), must_sync=False, flush_s=1.0)
    own, taken = (next(i for i in "abcdef" if _node_of(i, nodes) is node) for node in nodes)
    options: dict[str, Any] = {"skew_s": 0.0, "resident_rows": 8, "idle_s": 0.0, "threads": False, "most": 0}
    first, second = (
        Replica(world, network, nodes, name, book=[], **options) for name in ("replica-0", "replica-1")
    )
    told: list[object] = []
    try:
        for replica in (first, second):
            replica.start()
        world.run(lambda: first.is_ready and second.is_ready, 10.0, "the start")
        # it looks, and then makes them
        network.next_s = {
            (first.name, nodes[0].name): [1e-3, 4.0],
            (first.name, nodes[1].name): [1e-3, 0.5],
        }
        first.call(
            lambda engine: engine.open_sessions("plain", session_ids=[own, taken], request_id=1), told.append
        )
        world.after(
            0.2, second.call, lambda engine: engine.open_session("plain", session_id=taken), told.append
        )
        world.run(lambda: len(told) == 2, 10.0, "both calls")
        assert isinstance(told[1], SessionExists), told[1]
        until = world.now + 10.0
        world.run(lambda: world.now >= until, 20.0, "the late message")
        assert not any(network.next_s.values()), "it has come"
        assert {session for node in nodes for session in node.live()} == {taken}
    finally:
        for replica in (first, second):
            replica.bury()


def _node_of(session_id: str, nodes: Sequence[ModelNode]) -> ModelNode:
    return nodes[0].owners[b"%d" % KEYS.partition(session_id)]


@pytest.mark.slow
def test_a_seed_gives_the_same_schedule_again() -> None:
    """Also in another process, whose sets are in another order."""
    traces = [run(seed).trace for seed in (1, 2, 3)]
    assert len(set(traces)) == 3
    assert [run(seed).trace for seed in (1, 2, 3)] == traces
    program = "from support.sim.schedule import run; print(*(run(seed).trace for seed in (1, 2, 3)))"
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": "."},
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert other.stdout.split() == traces


# ------------------------------------------------------------------------------- bugs that are put in are found


def is_found(seeds: range, bugs: Bugs | None = None, *, is_told: bool = True, **changes: Any) -> bool:
    """Whether one of some schedules shows that something is wrong; without `is_told` to who does not know what is lost."""
    for seed in seeds:
        plan = dataclasses.replace(Plan.drawn(seed), **copy.deepcopy(changes))
        try:
            result = Schedule(seed, plan=plan, bugs=bugs, is_told=is_told).run()
        except AssertionError:
            return True
        if result.report.violations:
            return True
    return False


def outcome_without(
    what: Callable[[Sequence[Part], CommitResult], CommitResult],
) -> Callable[..., CommitResult]:
    """`outcome_of` with something wrong."""

    def outcome(parts: Sequence[Part], *args: Any, **options: Any) -> CommitResult:
        return what(parts, outcome_of(parts, *args, **options))

    return outcome


@pytest.mark.slow
def test_a_store_that_lets_sessions_begin_where_others_ended_is_found() -> None:
    rule = ("elseif kind == 2 and is_marked and has == follow then", "elseif kind == 2 and is_marked then")
    changes: dict[str, Any] = {
        "weather": Weather(lost=0.05, late=0.3, late_s=1.5),
        "mix": Mix(step=1.0, frame=0.0, close=6.0, think_s=0.02),
        "owners": [["a"], ["b"], ["c"], ["d"]],
        "faults": (),
        "together": False,
        "contested": False,
        "most": 0,
        "limit_s": 0.0,
    }
    assert is_found(range(65, 165), Bugs({"COMMIT": rule}), **changes)


@pytest.mark.slow
def test_a_client_that_takes_unknown_outcomes_for_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        valkey_store,
        "outcome_of",
        outcome_without(lambda _, told: dataclasses.replace(told, unknown=frozenset())),
    )
    assert is_found(range(200))


def test_a_client_that_knows_after_attempts_what_it_cannot_know_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A conflict after an attempt without an answer may be that attempt's own change, and another's after it."""

    def as_if_sent_once(parts: Sequence[Part], told: CommitResult) -> CommitResult:
        answered = {i for part in parts if part.request.problem is None for i in part.session_ids}
        return CommitResult(told.conflicts | (told.unknown & answered), told.unknown - answered, told.stale)

    monkeypatch.setattr(valkey_store, "outcome_of", outcome_without(as_if_sent_once))
    assert is_found(range(200), faults=("cut",), fault_every_s=0.3, guests=2)


#: As if stamps were revisions: they come twice where a fail-over takes writes back.
REVISIONS_ALONE = (
    "if has == sub(follows, 8 * i - 7, 8 * i) then",
    """local old = call('GETRANGE', key, 17 + 8, 17 + 15)
  if #old == 8 and struct.unpack('<I4', old) + 1 == struct.unpack('<I4', blob, begin + 9) then""",
)
FAIL_OVERS: dict[str, Any] = {
    "faults": ("fail_over",),
    "fault_every_s": 0.3,
    "guests": 2,
    "seconds": 4.0,
    "limit_s": 0.0,
    "most": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize("is_told", [True, False])
def test_a_store_that_compares_revisions_alone_is_found(is_told: bool) -> None:
    """Also by who is not told what a fail-over took back, as nobody is of a real store."""
    bugs = Bugs({"REPLACE": REVISIONS_ALONE})
    assert is_found(range(200), bugs, is_told=is_told, must_sync=False, **FAIL_OVERS)


@pytest.mark.parametrize(
    "bugs",
    [
        Bugs(waits_for_no_disk=True),
        Bugs({"FETCH": ("if value and fence ~= '0' and", "if false and")}),
    ],
    ids=["changes", "reads"],
)
def test_a_store_that_does_not_wait_for_the_disk_is_found(bugs: Bugs) -> None:
    assert is_found(range(50, 250), bugs, must_sync=True, flush_s=0.3, **FAIL_OVERS)


@pytest.mark.parametrize("code", ["ASK", "TRYAGAIN", "MOVED"])
def test_a_client_that_takes_redirected_changes_for_done_is_found(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a slot moves from node to node."""
    goes_on = Requests._is_retried

    async def believe(self: Requests, node: Node, request: Request, reply: ErrorReply) -> bool:
        if reply.code == code and request.command[1] in (REPLACE.sha, COMMIT.sha):
            request.reply, request.is_answered = [], True
        return await goes_on(self, node, request, reply)

    monkeypatch.setattr(Requests, "_is_retried", believe)
    assert is_found(range(100), shards=3, faults=("move",), fault_every_s=0.1)


LIMITS: dict[str, Any] = {
    "limit_s": 6.0,
    "idle_s": 30.0,
    "seconds": 25.0,
    "owners": [["a"]],
    "faults": (),
    "most": 0,
    "contested": False,
    "together": False,
}


@pytest.mark.slow
def test_a_store_for_which_a_change_is_no_use_is_found() -> None:
    used = ("stamp .. used .. sub(blob", "stamp .. call('GETRANGE', key, 9, 16) .. sub(blob")
    assert is_found(range(100), Bugs({"REPLACE": used}), **LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 1e6])
def test_a_replica_that_takes_a_limit_for_another_is_found(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    seconds, seconds_of = IdleLimits.seconds, IdleLimits.seconds_of
    monkeypatch.setattr(IdleLimits, "seconds", lambda self, own_ms: factor * seconds(self, own_ms))
    monkeypatch.setattr(IdleLimits, "seconds_of", lambda self, own_ms: factor * seconds_of(self, own_ms))
    assert is_found(range(100), **LIMITS)


QUOTAS: dict[str, Any] = {
    "most": 2,
    "owners": [[f"{PREFIX}{name}"] for name in "abcdef"],
    "mix": Mix(close=6.0, fork=0.0, think_s=0.1),
    "idle_s": 0.0,
    "rivals": False,
    "together": False,
    "limit_s": 0.0,
}


def test_a_replica_that_asks_once_what_tenants_have_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_counts, "FRESH_S", float("inf"))
    assert is_found(range(100), **QUOTAS)


def test_a_replica_that_forgets_what_it_is_making_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_self: UsageCounts, *_args: Any) -> None:
        """Count what the store has."""

    monkeypatch.setattr(UsageCounts, "add_pending", nothing)
    assert is_found(range(100), **QUOTAS)


@pytest.mark.slow
def test_a_replica_that_forgets_what_the_store_may_have_made_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forget(self: Quotas, session_ids: Sequence[str], each: Usage) -> None:
        """Take sessions for not made when the store's answer was lost."""
        self._counts.add_pending(tenant_of(session_ids[0]), each * -len(session_ids))
        self.end((session_id, each) for session_id in session_ids)

    monkeypatch.setattr(Quotas, "cancel", forget)
    faults = ("pause", "fail_over", "storm")
    assert is_found(range(125, 325), must_sync=True, flush_s=0.3, faults=faults, **QUOTAS)


def test_a_replica_that_judges_by_its_own_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admission, "_judge", Admission._judge_as_stored)
    assert is_found(range(200))


@pytest.mark.slow
def test_a_replica_that_applies_what_fits_whatever_its_request_id_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(revision: Any, last_request: Any, expected: Any, request: Any) -> Any:
        if expected is not None and (expected == revision).all():
            return None
        return exactly_once.judge(revision, last_request, expected, request)

    def applies(revision: int, last_request: int, expected: int | None, request: int) -> bool:
        return expected == revision or exactly_once.applies(revision, last_request, expected, request)

    for module in (admission, direct):
        monkeypatch.setattr(module, "judge", judge)
    monkeypatch.setattr(direct, "applies", applies)
    assert is_found(range(20), mix=Mix(reuse=3.0), must_sync=True)


@pytest.mark.slow
def test_a_replica_that_reads_its_own_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_self: Pager, *_args: Any) -> None:
        """Believe what is in the arena."""

    compare: Callable[..., Awaitable[None]] = nothing
    monkeypatch.setattr(Pager, "compare", compare)
    mix = Mix(think_s=1e-3, read=6.0)
    changes: dict[str, Any] = {
        "owners": [["a"]],
        "guests": 2,
        "mix": mix,
        "faults": ("cut", "kill"),
        "limit_s": 0.0,
        "most": 0,
    }
    assert is_found(range(120, 220), resident_rows=64, idle_s=0.0, **changes)


def test_a_refused_call_for_many_that_leaves_some_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_self: SessionCreator, _made: CreatedSessions) -> None:
        """Leave them."""

    monkeypatch.setattr(SessionCreator, "_delete", nothing)
    assert is_found(range(100), contested=True, faults=(), shards=3, owners=[], guests=0, seconds=6.0)


@pytest.mark.slow
def test_an_attempt_that_takes_back_what_another_was_answered_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call for many sessions of which the store did not say what it kept: it was undone, whoever had come again meanwhile."""

    async def believe(_self: Attempts, *_args: Any) -> bool:
        return True

    def never(new: NewSessions) -> bool:
        return len(new.ids) == 1

    monkeypatch.setattr(Attempts, "take_over", believe)
    monkeypatch.setattr(NewSessions, "is_repeatable", property(never))
    changes: dict[str, Any] = {
        "together": True,
        "contested": False,
        "owners": [["a", "b", "c"]],
        "shards": 3,
        "faults": (),
        "mix": Mix(step=1.0, close=3.0, think_s=0.02),
        "weather": Weather(lost=0.1, late=0.4, late_s=5.0),
        "moves": False,
        "seconds": 15.0,
        "limit_s": 0.0,
        "most": 0,
    }
    assert is_found(range(80, 180), **changes)
    monkeypatch.undo()
    assert not is_found(range(50, 75), **changes)
