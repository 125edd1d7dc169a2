"""The log of a model's moves says where a session is now, however many of them are put together."""

from __future__ import annotations

import random

import pytest

from stepwell_server.engine.versions.history import History, How, Move


def _followed(log: list[tuple[int, int, How]], version: int, epoch: int) -> tuple[int, list[How]]:
    """What the moves say one after the other, without any of them put together."""
    way: list[How] = []
    for number, (source, target, how) in enumerate(log, 1):
        if number > epoch and version == source:
            version = target
            way.append(how)
    return version, way


def _effect(way: list[tuple[How, str]]) -> list[str]:
    """What becomes of a state: names of the functions after the last reset, and whether there was one."""
    effect: list[str] = []
    for how, function in way:
        if how is How.RESET:
            effect = ["reset"]
        elif how is How.MIGRATE:
            effect.append(function)
    return effect


@pytest.mark.parametrize("seed", range(200))
def test_a_way_is_what_the_moves_say_one_after_the_other(seed: int) -> None:
    chance = random.Random(seed)
    history, log, current = History(), [], 1
    for _ in range(chance.randrange(1, 30)):
        target = chance.choice([version for version in range(1, 6) if version != current])
        how = chance.choices(list(How), [6, 1, 2])[0]
        history = history.with_move(current, target, how, f"{current}>{target}" if how is How.MIGRATE else "")
        log.append((current, target, how))
        current = target
    for version in range(1, 6):
        for epoch in range(len(log) + 1):
            expected, hows = _followed(log, version, epoch)
            found, way = history.way(version, epoch)
            assert found == expected
            walked, at = [], version
            for number, (source, target, how) in enumerate(log, 1):
                if number > epoch and source == at:
                    walked.append((how, f"{source}>{target}"))
                    at = target
            assert len(walked) == len(hows)
            assert _effect([(move.how, move.function) for move in way]) == _effect(walked)


def test_a_hundred_carries_are_one_move_for_each_version() -> None:
    history = History()
    for version in range(1, 101):
        history = history.with_move(version, version + 1, How.CARRY)
    assert len(history.moves) == 100
    assert history.way(1, 0) == (101, [Move(1, 1, 101, How.CARRY, "", 100)])
    assert history.way(50, 49) == (101, [Move(50, 50, 101, How.CARRY, "", 100)])
    assert history.way(50, 50) == (50, [])


def test_there_and_back_is_nothing() -> None:
    history = History().with_move(1, 2, How.CARRY).with_move(2, 1, How.CARRY)
    assert history.way(1, 0) == (1, [])
    assert history.way(2, 1) == (1, [Move(2, 2, 1, How.CARRY, "", 2)])
    assert history.way(1, 2) == (1, ())


def test_what_was_reset_before_a_carry_is_reset() -> None:
    history = History().with_move(1, 2, How.RESET).with_move(2, 3, How.CARRY)
    assert history.way(1, 0) == (3, [Move(1, 1, 3, How.RESET, "", 2)])
    assert history.way(2, 1) == (3, [Move(2, 2, 3, How.CARRY, "", 2)])


@pytest.mark.parametrize("seed", range(300))
def test_followers_of_forgotten_versions_go_the_same_ways(seed: int) -> None:
    """However often moves are put together, and whatever comes after."""
    chance = random.Random(seed)
    full = left = History()
    defaults, current, forgotten = [1], 1, set[int]()
    for _ in range(chance.randrange(2, 40)):
        fresh = max(defaults) + 1
        known = [version for version in range(1, fresh + 1) if version not in {current, *forgotten}]
        target = chance.choice([*known, fresh, fresh])
        how = chance.choices(list(How), [8, 1, 1])[0]
        function = f"{current}>{target}" if how is How.MIGRATE else ""
        full, left = (each.with_move(current, target, how, function) for each in (full, left))
        current = target
        defaults.append(current)
        if chance.random() < 0.2:
            free = {v for v in range(1, fresh) if v != current and chance.random() < 0.7}
            left = left.compacted(free, lambda _one, _other: True)
            forgotten |= {v for v in free if v not in left.versions()}
    for epoch, version in enumerate(defaults):
        goal, way = full.way(version, epoch)
        start = left.follower_in(epoch) if version in forgotten else version
        if start is None:  # it is there
            assert epoch == left.epoch
            continue
        found, short = left.way(start, epoch)
        assert found == goal
        effects = [_effect([(move.how, move.function) for move in each]) for each in (short, way)]
        assert effects[0] == effects[1]


def test_neighbours_that_say_the_same_are_one_move() -> None:
    history = History()
    for version in range(1, 101):
        history = history.with_move(version, version + 1, How.CARRY)
    left = history.compacted(range(1, 101), lambda _one, _other: True)
    assert left.moves == (Move(100, 100, 101, How.CARRY, "", 100),)
    assert left.follower_in(7) == 100
    assert left.follower_in(100) is None
    assert len(history.compacted(range(1, 51), lambda _one, _other: True).moves) == 50
    assert history.compacted(range(1, 101), lambda _one, _other: False) == history
