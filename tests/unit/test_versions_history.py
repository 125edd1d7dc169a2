"""The history of a model says where a session is now, however many changes lie between."""

from __future__ import annotations

import random

import pytest

from stepwell_server.engine.versions.history import History, MigrationStep, Move, MoveKind

_Change = tuple[int, int, MoveKind]


def _followed(changes: list[_Change | None], version: int, epoch: int) -> tuple[int, list[str]]:
    """Where the changes lead to, one after the other, and what becomes of the state."""
    effect: list[str] = []
    number = 0
    for change in changes:
        if change is None:  # the default moved, and its sessions stayed
            continue
        number += 1
        source, target, how = change
        if number > epoch and source == version:
            version = target
            if how is MoveKind.RESET or effect == ["reset"]:
                effect = ["reset"]
            elif how is MoveKind.MIGRATE:
                effect.append(f"{source}>{target}")
    return version, effect


def _found(history: History, version: int, epoch: int) -> tuple[int, list[str]]:
    move = history.of(version, epoch)
    if move is None:
        return version, []
    effect = ["reset"] if move.how is MoveKind.RESET else [step.function for step in move.migrations]
    return move.target, effect


def _changed(chance: random.Random, history: History, source: int, target: int) -> tuple[History, _Change]:
    how = chance.choices(list(MoveKind), [6, 1, 2])[0]
    function = f"{source}>{target}" if how is MoveKind.MIGRATE else ""
    return history.with_move(source, target, how, function), (source, target, how)


def test_a_move_leads_to_where_the_changes_lead_one_after_the_other() -> None:
    """Also where the default moved, and sessions stayed on the version that it had been."""
    for seed in range(300):
        _move(seed)


def _move(seed: int) -> None:
    chance = random.Random(seed)
    history, changes, current = History(), list[_Change | None](), 1
    for _ in range(chance.randrange(1, 30)):
        target = chance.choice([version for version in range(1, 6) if version != current])
        if chance.random() < 0.25:
            changes.append(None)
        else:
            history, change = _changed(chance, history, current, target)
            changes.append(change)
        current = target
    for version in range(1, 6):
        for epoch in range(history.epoch + 1):
            assert _found(history, version, epoch) == _followed(changes, version, epoch)


def test_sessions_of_forgotten_versions_go_where_they_went() -> None:
    """Versions are forgotten on which no session is now, while records still name them; and numbers are used again."""
    for seed in range(300):
        _forget(seed)


def _forget(seed: int) -> None:
    chance = random.Random(seed)
    full = left = History()
    changes, current, forgotten = list[_Change | None](), 1, set[int]()
    records = {(1, 0)}
    for _ in range(chance.randrange(2, 50)):
        fresh = max(version for version, _ in records) + 1
        known = [version for version in range(1, fresh + 1) if version not in {current, *forgotten}]
        target = chance.choice([*known, fresh, fresh, *forgotten])
        if target == current:
            continue
        forgotten.discard(target)
        if chance.random() < 0.2:
            changes.append(None)
        else:
            state = chance.getstate()
            full, change = _changed(chance, full, current, target)
            chance.setstate(state)
            left, _ = _changed(chance, left, current, target)
            changes.append(change)
        current = target
        records.add((current, full.epoch))
        if chance.random() < 0.3:
            used = {_followed(changes, *record)[0] for record in records} | {current}
            free = {v for v in range(1, fresh) if v not in used and chance.random() < 0.8}
            there = set(range(1, fresh + 1)) - forgotten - free
            left = left.without(free, there, lambda one, other: one % 2 == other % 2)
            forgotten |= free - left.versions()
    for version, epoch in records:
        move = left.of(version, epoch)
        assert _found(left, version, epoch) == _followed(changes, version, epoch)
        if version in forgotten:
            assert move is not None
            assert move.source % 2 == version % 2, "its records are like those"


def test_a_hundred_carries_are_one_move_for_each_version() -> None:
    history = History()
    for version in range(1, 101):
        history = history.with_move(version, version + 1, MoveKind.CARRY)
    assert len(history.moves) == 100
    assert history.of(1, 0) == Move(1, 1, 101)
    assert history.of(50, 49) == Move(50, 50, 101)
    assert history.of(50, 50) is None


def test_there_and_back_is_nothing() -> None:
    history = History().with_move(1, 2, MoveKind.CARRY).with_move(2, 1, MoveKind.CARRY)
    assert history == History(2, (Move(2, 2, 1),))


@pytest.mark.parametrize("how", [MoveKind.CARRY, MoveKind.RESET])
def test_a_default_that_goes_there_and_back_keeps_few_moves(how: MoveKind) -> None:
    history = History()
    for number in range(200):
        source = 1 + number % 2
        history = history.with_move(source, 3 - source, how)
    assert len(history.moves) <= 4


def test_a_session_reset_before_a_carry_is_reset() -> None:
    history = History().with_move(1, 2, MoveKind.RESET).with_move(2, 3, MoveKind.CARRY)
    assert history.of(1, 0) == Move(1, 1, 3, MoveKind.RESET)
    assert history.of(2, 1) == Move(2, 2, 3)


def test_migrations_are_made_one_after_the_other_until_a_reset() -> None:
    history = History().with_move(1, 2, MoveKind.MIGRATE, "f").with_move(2, 3, MoveKind.CARRY)
    history = history.with_move(3, 4, MoveKind.MIGRATE, "g")
    assert history.of(1, 0) == Move(1, 1, 4, MoveKind.MIGRATE, (MigrationStep("f", 2), MigrationStep("g", 4)))
    assert history.versions() == {1, 2, 3, 4}
    assert history.renumbered(2, -1).of(1, 0) == Move(
        1, 1, 4, MoveKind.MIGRATE, (MigrationStep("f", -1), MigrationStep("g", 4))
    )
    assert history.with_move(4, 5, MoveKind.RESET).of(1, 0) == Move(1, 1, 5, MoveKind.RESET)


def test_neighbours_that_say_the_same_are_one_move() -> None:
    history = History()
    for version in range(1, 101):
        history = history.with_move(version, version + 1, MoveKind.CARRY)
    left = history.without(range(1, 101), {101}, lambda _one, _other: True)
    assert left.moves == (Move(100, 100, 101, others=((1, 99),)),)
    assert left.of(7, 6) == left.of(99, 98) == left.moves[0]
    assert left.of(7, 100) is None
    assert len(history.without(range(1, 51), range(51, 102), lambda _one, _other: True).moves) == 50
    assert history.without(range(1, 101), {101}, lambda _one, _other: False) == history
    later = left.with_move(101, 102, MoveKind.CARRY)
    assert later.without({100, 101}, {102}, lambda _one, _other: True).moves == (
        Move(101, 101, 102, others=((1, 100),)),
    )
