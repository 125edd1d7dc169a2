"""States of replies outlive a kill, and do not fill the memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.engine.change import Change
from stepwell_server.engine.state.replies import ReplyArrays
from stepwell_server.errors import ServerError, Unavailable
from support.checks.model_of_sessions import initial, traced
from support.engine.harness import Answer, Answers, CallbackAnswers, x
from support.stores.durable import DurableStore, same_reply
from support.stores.kinds import DURABLE

pytestmark = DURABLE


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("select", Select)
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize(
    "said",
    [
        {"states": Select.ALL},
        {"states": Select.LAST},
        {"states": Select.ALL, "state_rows": [2, 0]},
        {"states": Select.ALL, "rows": [1, 2], "state_rows": [2]},
        {"rows": [1, 2]},
    ],
    ids=str,
)
async def test_a_retry_gets_the_first_states(
    durable_store: DurableStore, said: dict[str, Any], steps: int, select: Select, killed: bool
) -> None:
    value = x(len(said.get("rows", "all")), *([steps] if steps else []))
    again: dict[str, Any] = {"expected": 0, "request_id": 7, "select": select, **said}
    async with durable_store.engine(resident_rows=4, steps=2) as at:
        await at.open("a", batch_size=3)
        first = await at.single("a", value, **again).only()
        at.clock.advance(1)
        await at.open("b", batch_size=4)
        assert not at.internals.model("plain").replies.series
        if killed:
            durable_store.kill()
        else:
            await at.single("a", value, **again).only()
    async with durable_store.engine(resident_rows=4) as at:
        second = await at.single("a", value, **again).only()
    same_reply(second, first)
    assert bool(first.states) == ("states" in said)
    if said == {"states": Select.ALL} and steps:
        assert first.states["sum"].tobytes() == traced(initial(3), value)[1].tobytes()


async def test_a_step_of_some_rows_whose_session_was_loaded_anew_is_one_of_some_rows(
    durable_store: DurableStore,
) -> None:
    """Sent from within the answer to a change that the store could not keep: then the session leaves the table."""
    sent: list[Answers] = []
    async with durable_store.engine() as at:
        await at.open("a", batch_size=3)
        durable_store.store.fail(Unavailable("the test says no"))

        def send(answer: Answer | ServerError) -> None:
            assert isinstance(answer, Unavailable)
            sent.append(at.single("a", x(1, 4, seed=1), rows=[2], states=Select.ALL))

        at.engine.submit(Change(["a"], CallbackAnswers(send), inputs={"": x(3)}))
        await at.settled()
        outputs, after = traced(initial(1), x(1, 4, seed=1))
        answer = await sent[0].only()
        assert answer.outputs["y"].tobytes() == outputs.tobytes()
        assert answer.states["sum"].tobytes() == after.tobytes()
        assert (answer.revision, answer.position) == (1, 4)


async def test_replies_beyond_their_share_of_the_memory_are_only_in_the_store(
    durable_store: DurableStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = x(1, 5)
    own = ReplyArrays({"y": value}, {"sum": value}).byte_count
    monkeypatch.setattr("stepwell_server.engine.state.replies.MAX_ARRAY_BYTES", 3 * own)
    said: dict[str, Any] = {"states": Select.ALL, "request_ids": 7, "expected": 0}
    async with durable_store.engine() as at:
        names = [f"s{i}" for i in range(8)]
        await at.open(*names)
        firsts = {name: await at.step(name, value, **said) for name in names}
        await at.settled()
        replies = at.internals.model("plain").replies
        assert len(replies.series) <= 4, "the last one may be one too many"
        resident = [name for name in names if (await at.engine.session_info(name)).resident]
        assert resident == names[-len(resident) :], "those that were kept first have gone"
        for name in names:
            again = await at.step(name, value, **said)
            assert again.replayed
            assert again.states["sum"].tobytes() == firsts[name].states["sum"].tobytes()
        for name in names:
            await at.step(name, x(1))
        assert not replies.series
        assert not replies.is_over_limit


async def test_who_knows_no_states_in_a_record_reads_its_outputs(durable_store: DurableStore) -> None:
    """Servers before there were any, on the same data."""
    async with durable_store.engine() as at:
        replies = at.internals.model("plain").replies
        outputs, states = {"y": x(2, 3)}, {"sum": x(2, 3, seed=1)}
        before = replies.pack(ReplyArrays(outputs, {}))
        assert replies.pack(ReplyArrays(outputs, states)).startswith(before)
        assert before == bytes([3]) + np.array([2, 3, 2], "<u4").tobytes() + outputs["y"].tobytes()
