"""The size of a reply is known before anything is changed."""

from __future__ import annotations

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.errors import MessageTooLarge, ModelNotFound, SessionGone
from support.engine.fake_executor import PLAIN
from support.engine.harness import Harness, fails, running

_LIMIT = 4096
#: A row of all outputs at one time step.
_STEP_BYTES = sum(spec_bytes for spec_bytes in PLAIN.output_bytes)
_FITS = (_LIMIT - 100) // _STEP_BYTES


def _x(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).random((*shape, *PLAIN.inputs[0].shape), np.float32)


async def test_time_steps_count() -> None:
    assert all(spec.temporal for spec in PLAIN.outputs)
    async with running() as at:
        await at.open("a")
        await at.step("a", _x(1, _FITS), reply_limit=_LIMIT, reply_bytes=100)
        with pytest.raises(
            MessageTooLarge, match=r"the reply to the step must be at most 4096 bytes; it would be"
        ):
            await at.submit("a", _x(1, _FITS + 1), reply_limit=_LIMIT, reply_bytes=100).only()
        assert (await at.engine.session_info("a")).revision == 1


async def test_what_is_not_sent_does_not_count(at: Harness) -> None:
    await at.open("a")
    for select in (Select.LAST, Select.NONE):
        await at.step("a", _x(1, _FITS + 1), reply_limit=_LIMIT, reply_bytes=100, select=select)
    await at.step("a", _x(1, 1), reply_limit=_STEP_BYTES + 100, reply_bytes=100)


async def test_rows_of_all_members_count(at: Harness) -> None:
    await at.open("a", "b")
    limit = 2 * _STEP_BYTES * 3 + 100
    for member in await at.submit(["a", "b"], _x(2, 3), reply_limit=limit, reply_bytes=100).all():
        assert not isinstance(member, Exception)
    with pytest.raises(MessageTooLarge):
        await at.submit(["a", "b"], _x(2, 4), reply_limit=limit, reply_bytes=100).require_all_applied()


async def test_sessions_that_are_gone_are_said_to_be_gone(at: Harness) -> None:
    with pytest.raises(SessionGone):
        await at.submit("gone", _x(1, _FITS + 1), reply_limit=_LIMIT).only()


async def test_predictions_count_the_final_state_too(at: Harness) -> None:
    rows = 3
    limit = rows * (_STEP_BYTES * 2 + PLAIN.state_row_bytes) + 100
    await at.engine.predict("plain", {"": _x(rows, 2)}, reply_limit=limit, reply_bytes=100)
    await fails(
        at.engine.predict("plain", {"": _x(rows, 2)}, reply_limit=limit - 1, reply_bytes=100),
        MessageTooLarge,
        "the reply to the prediction",
    )
    await fails(at.engine.predict("other", {"": _x(1, 2)}, reply_limit=limit), ModelNotFound)
