"""What a stream calls its sets: a number each, never used twice, and said to be unneeded once."""

from __future__ import annotations

import gc

import numpy as np

from stepwell._sets import SessionSet, StreamSets


def some() -> SessionSet:
    return SessionSet(("a", "b"), np.ones(2, np.intp))


def test_a_set_keeps_its_number_once_it_is_known() -> None:
    sets, one, other = StreamSets(), some(), some()
    naming = sets.name(one)
    naming.answered(naming.number)
    assert sets.name(one) is naming
    assert sets.name(other).number == 2, "another set of the same ids is another"
    assert list(sets.unneeded()) == []


def test_a_set_whose_declaration_was_not_answered_gets_another_number() -> None:
    """An answer to the first declaration that comes after all is none to the second."""
    sets, one = StreamSets(), some()
    first = sets.name(one)
    second = sets.name(one)
    assert (first.number, second.number) == (1, 2)
    assert list(sets.unneeded()) == [1]
    assert list(sets.unneeded()) == []
    first.answered(1)
    assert second.is_known is None


def test_a_set_that_was_declined_is_not_declared_again() -> None:
    sets, one = StreamSets(), some()
    naming = sets.name(one)
    naming.answered(0)
    assert sets.name(one).is_known is False
    del one
    gc.collect()
    assert list(sets.unneeded()) == []


def test_the_set_of_a_group_that_is_gone_is_not_needed() -> None:
    sets, known, asked = StreamSets(), some(), some()
    sets.name(known).answered(1)
    sets.name(asked)
    del known, asked
    gc.collect()
    assert sorted(sets.unneeded()) == [1, 2]
