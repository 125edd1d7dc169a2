"""Sessions that are imported on one of two servers that share a store: one replaces another in one commit."""

from __future__ import annotations

import numpy as np
import pytest

from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import OutcomeUnknown, ServerError, SessionExists
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, x
from support.engine.two_engines import make_resident_on_both
from support.stores.durable import begun
from support.stores.kinds import SHARED

pytestmark = SHARED


async def exported(at: Harness, session_id: str, *, to: str = "") -> SessionRecord:
    (record,) = await at.engine.export_sessions([session_id], deadline=float("inf"))
    assert not isinstance(record, ServerError)
    return SessionRecord(to or session_id, session_id, bytes(record))


async def test_a_session_is_replaced_in_one_commit_also_after_another_server_changed_it(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    record, state = await exported(first, "a"), (await first.state("a"))["sum"]
    await first.step("a", x(1, seed=2))
    await second.state("a")
    second.store.commits_held = True
    before = len(second.store.asked("commit"))
    replacing = await begun(second.engine.import_sessions([record], ExistingPolicy.REPLACE))
    await second.store.until("commit", before + 1)
    await first.step("a", x(1, seed=3))
    second.store.let_go()
    assert await replacing == [ImportOutcome.REPLACED]
    assert len(second.store.asked("commit")) == before + 2, "the first one met the other server's change"
    assert not any(batch.deletes for batch in second.store.tried), "the session never was away"
    for at in (first, second):
        assert (await at.engine.session_info("a")).revision == 1
        assert np.array_equal((await at.state("a"))["sum"], state)
    await first.step("a", x(1), expected=1)


@pytest.mark.engine(programs={"plain": PLAIN, "other": PLAIN})
async def test_a_session_of_another_model_is_replaced_and_counted_where_it_belongs(
    first: Harness, second: Harness
) -> None:
    await first.open("other", model="other")
    record = await exported(first, "other", to="a")
    await make_resident_on_both(first, second, "a")
    assert await second.engine.import_sessions([record], ExistingPolicy.REPLACE) == [ImportOutcome.REPLACED]
    assert (await first.engine.session_info("a")).model == "other"
    assert [await first.store.count_of(model) for model in ("plain", "other")] == [0, 2]


@pytest.mark.parametrize("kept", [False, True])
async def test_if_the_store_does_not_say_whether_it_replaced_one_its_word_counts(
    kept: bool, first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a")
    record = await exported(first, "a")
    await second.step("a", x(1))
    second.store.unknown["a"] = kept
    (result,) = await second.engine.import_sessions([record], ExistingPolicy.REPLACE)
    assert isinstance(result, OutcomeUnknown)
    for at in (first, second):
        assert (await at.engine.session_info("a")).revision == (1 if kept else 2)


@pytest.mark.engine(threads=True)
async def test_a_session_that_leaves_the_table_before_its_turn_is_replaced_without_being_away(
    first: Harness, second: Harness
) -> None:
    await make_resident_on_both(first, second, "a", "b")
    records = [await exported(first, name) for name in "ab"]
    await first.submit(["a", "b"], x(2)).all()
    blocked = await second.begin_pass("a", x(1))
    replacing = await begun(second.engine.import_sessions(records, ExistingPolicy.REPLACE))
    assert second.internals.removal.forget_idle(["b"]) == 1
    second.hooks.open_gate()
    assert await replacing == [ImportOutcome.REPLACED] * 2
    assert not any(batch.deletes for batch in second.store.tried)
    await blocked.all()


async def test_an_import_that_another_server_overtakes_is_judged_again(
    first: Harness, second: Harness
) -> None:
    await first.open("a")
    records = [await exported(first, "a", to=name) for name in ("b", "c")]
    second.store.commits_held = True
    importing = await begun(second.engine.import_sessions(records, ExistingPolicy.REFUSE))
    await second.store.until("commit")
    await first.open("b", batch_size=2)
    second.store.let_go()
    refused, imported = await importing
    assert isinstance(refused, SessionExists)
    assert imported is ImportOutcome.IMPORTED
    assert (await second.engine.session_info("b")).batch_size == 2
