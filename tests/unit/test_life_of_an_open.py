"""What the opening of one session costs in the engine: looks at the store, commits and Python functions."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import stepwell_server
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from support.engine.harness import running

_ROOT = str(Path(stepwell_server.__file__).parent)
#: Calls of functions of the server in an opening: 176 when this was written. One more look at the id, or one more commit,
#: is some 20 of them.
_MAX_CALLS = 180


@pytest.mark.parametrize("session_id", ["named", ""])
@pytest.mark.usefixtures("without_collector")
async def test_an_opening_asks_the_store_once_and_commits_once(session_id: str) -> None:
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(_ROOT):
            calls[frame.f_code.co_qualname] += 1

    async with running() as at:
        for number in range(3):
            await at.engine.open_session(
                "plain", session_id=session_id and f"{number}", request_id=number + 1
            )
        sys.setprofile(note)
        try:
            await at.engine.open_session("plain", session_id=session_id, request_id=9)
        finally:
            sys.setprofile(None)
    assert calls[InProcessStore.fetch.__qualname__] == 1
    assert calls[MemoryStore.commit.__qualname__] == 1
    assert calls.total() <= _MAX_CALLS, calls.most_common(20)
