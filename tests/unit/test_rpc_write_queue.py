"""Replies are written one at a time and in order."""

from __future__ import annotations

import asyncio

from stepwell_server.rpc.steps.write_queue import WriteQueue


class _Wire:
    """A write that ends when told to, and what the outbox says of it."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.ends: list[asyncio.Future[None]] = []
        self.written: list[int] = []
        self.progress = 0
        self.outbox = WriteQueue(self._write, self.written.append, self._progressed)

    async def _write(self, reply: bytes) -> None:
        self.begun.append(reply)
        if reply == b"at once":
            return
        if reply == b"refused":
            raise ConnectionError("refused")
        self.ends.append(asyncio.get_running_loop().create_future())
        await self.ends[-1]

    def _progressed(self) -> None:
        self.progress += 1

    async def turns(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


async def test_a_write_starts_at_once_and_is_noticed_at_the_next_check() -> None:
    wire = _Wire()
    wire.outbox.put(b"a", 7)
    assert (wire.begun, wire.written, wire.outbox.look()) == ([b"a"], [], False)
    wire.ends[0].set_result(None)
    await wire.turns()
    assert (wire.written, wire.progress) == ([], 0)  # no one watched
    assert wire.outbox.look()
    assert wire.written == [7]


async def test_the_next_reply_finds_the_last_one_written() -> None:
    wire = _Wire()
    for reply, held in ((b"a", 1), (b"at once", 2), (b"b", 3)):
        wire.outbox.put(reply, held)
        for end in wire.ends:
            if not end.done():
                end.set_result(None)
    assert wire.begun == [b"a", b"at once", b"b"]
    assert wire.written == [1, 2]
    assert wire.outbox.look()
    assert wire.written == [1, 2, 3]


async def test_replies_queue_behind_a_write_and_follow_it() -> None:
    wire = _Wire()
    for held, reply in enumerate((b"a", b"b", b"at once", b"c")):
        wire.outbox.put(reply, held)
    assert wire.begun == [b"a"]
    wire.ends[0].set_result(None)
    await wire.turns()
    assert (wire.begun, wire.written) == ([b"a", b"b"], [0])
    wire.ends[1].set_result(None)
    await wire.turns()
    assert (wire.begun, wire.written) == ([b"a", b"b", b"at once", b"c"], [0, 1, 2])
    wire.outbox.watch()
    wire.ends[2].set_result(None)
    await wire.turns()
    assert wire.written == [0, 1, 2, 3]
    assert wire.progress == 3


async def test_nothing_is_written_after_a_failure() -> None:
    wire = _Wire()
    wire.outbox.put(b"a", 0)
    wire.outbox.put(b"b", 1)
    wire.ends[0].set_exception(ConnectionError("gone"))
    await wire.turns()
    assert isinstance(wire.outbox.error, ConnectionError)
    assert wire.progress == 1
    wire.outbox.put(b"c", 2)
    assert (wire.begun, wire.written, wire.outbox.look()) == ([b"a"], [], True)

    refused = _Wire()
    refused.outbox.put(b"refused", 0)
    assert isinstance(refused.outbox.error, ConnectionError)


async def test_closing_drops_unwritten_replies() -> None:
    for ended in (False, True):
        wire = _Wire()
        wire.outbox.put(b"a", 0)
        wire.outbox.put(b"b", 1)
        if ended:
            wire.ends[0].set_exception(ConnectionError("gone"))
        wire.outbox.close()
        await wire.turns()
        assert (wire.begun, wire.written) == ([b"a"], [])
        assert wire.ends[0].cancelled() is not ended
        wire.outbox.close()


async def test_many_replies_without_a_wait_follow_one_with_a_wait() -> None:
    wire = _Wire()
    wire.outbox.put(b"a", 1)
    for _ in range(5000):
        wire.outbox.put(b"at once", 1)
    wire.ends[0].set_result(None)
    await wire.turns()
    assert (len(wire.begun), sum(wire.written)) == (5001, 5001)
