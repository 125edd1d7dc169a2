"""Sessions move from one server to another with all that is kept of them."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.api import SessionFilter, SessionInfo
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import (
    InvalidInput,
    MessageTooLarge,
    ModelMismatch,
    ModelNotFound,
    ServerError,
    SessionExists,
    SessionExpired,
    SessionNotFound,
    StateCorrupt,
    Unavailable,
)
from stepwell_server.store.fields import CRITICAL, pack_fields, unpack_fields
from stepwell_server.store.memory import MemoryStore
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import Harness, fails, running, x
from support.stores.durable import Disk, begun, same_reply
from support.stores.records import decode

PROGRAMS = {"plain": PLAIN, "rich": RICH}


@asynccontextmanager
async def two(**options: Any) -> AsyncIterator[tuple[Harness, Harness]]:
    """Two servers that share nothing but their clock."""
    async with (
        running(PROGRAMS, **options) as first,
        running(PROGRAMS, clock=first.clock, **options) as second,
    ):
        yield first, second


async def exported(at: Harness, *session_ids: str) -> list[tuple[str, bytes]]:
    found = await at.engine.export_sessions(session_ids, deadline=float("inf"))
    return [(i, bytes(record)) for i, record in zip(session_ids, found, strict=True)]  # type: ignore[arg-type]


async def brought(
    at: Harness, sessions: Sequence[tuple[str, bytes]], existing: ExistingPolicy = ExistingPolicy.REFUSE
) -> list[Any]:
    arriving = [SessionRecord(session_id, session_id, record) for session_id, record in sessions]
    return await at.engine.import_sessions(arriving, existing)


async def refused(at: Harness, session_id: str, record: bytes, **options: Any) -> ServerError:
    (result,) = await brought(at, [(session_id, record)], **options)
    assert isinstance(result, ServerError)
    return result


def kept(info: SessionInfo) -> Any:
    return dataclasses.replace(info, last_used=0.0, resident=False)


async def rich(at: Harness, session_id: str, steps: int, request_id: int) -> Any:
    """A change of several inputs and outputs."""
    rows = np.random.default_rng(request_id)
    inputs = {
        "x": rows.standard_normal((1, steps, 2)).astype(np.float32),
        "token": np.ones((1, steps), np.int32),
        "gain": np.ones(1, np.float32),
    }
    return await at.single(session_id, None, inputs=inputs, expected=0, request_id=request_id).only()


async def test_what_moves_goes_on_and_a_retry_is_answered_once() -> None:
    async with two(resident_rows=12) as (old, new):
        answers = {}
        for name, steps in (("one", 0), ("three", 3), ("away", 2)):
            await old.open(name)
            step = x(1, steps) if steps else x(1)
            answers[name] = step, await old.single(name, step, expected=0, request_id=7 + steps).only()
        await old.open("rows", batch_size=3)
        await old.step("rows", x(3, 2, seed=4))
        await old.open("rich", model="rich")
        of_rich = await rich(old, "rich", 4, request_id=99)
        await old.open("fresh")
        await old.open(*[f"others{number}" for number in range(11)])  # the first are paged out
        old.clock.advance(100.0)
        names = [*answers, "rows", "rich", "fresh"]
        before = {name: await old.engine.session_info(name) for name in names}
        sessions = await exported(old, *names)
        after = {name: await old.engine.session_info(name) for name in names}
        assert after == before, "an export is no use"
        assert await brought(new, sessions) == [ImportOutcome.IMPORTED] * len(names)
        for name in names:
            info = await new.engine.session_info(name)
            assert kept(info) == kept(before[name])
            assert info.last_used == new.clock.now(), "its time begins anew"
        for name, (step, first) in answers.items():
            found = await new.single(
                name, step, expected=0, request_id=7 + (step.shape[1] if step.ndim == 3 else 0)
            ).only()
            same_reply(found, first)
        same_reply(await rich(new, "rich", 4, request_id=99), of_rich)
        for name in names:
            ours, theirs = await new.state(name), await old.state(name)
            assert {n: a.tobytes() for n, a in ours.items()} == {n: a.tobytes() for n, a in theirs.items()}
        for name, (step, _) in answers.items():
            same_reply(await new.step(name, step), await old.step(name, step), replayed=False)
        assert (await new.engine.list_sessions())[1] == len(names)


async def test_what_is_there_is_left_unless_it_is_to_be_replaced() -> None:
    async with two(threads=True) as (old, new):
        await old.open("a", "b", "c")
        await old.step("a", x(1))
        sessions = await exported(old, "a", "b", "c")
        await new.open("a", batch_size=2)
        await new.step("a", x(2))
        await new.step("a", x(2))
        results = await brought(new, sessions)
        assert [type(result).__name__ for result in results] == [
            "SessionExists",
            "ImportOutcome",
            "ImportOutcome",
        ]
        assert results[0].message == "session_id must be new; session 'a' is open"
        assert await brought(new, sessions, ExistingPolicy.SKIP) == [
            ImportOutcome.SKIPPED,
            *[ImportOutcome.IMPORTED] * 2,
        ]
        assert (await new.engine.session_info("a")).batch_size == 2
        pending = await new.begin_pass("a", x(2), sizes=[2])
        replacing = await begun(brought(new, sessions, ExistingPolicy.REPLACE))
        new.hooks.open_gate()
        assert await replacing == [ImportOutcome.REPLACED, *[ImportOutcome.IMPORTED] * 2]
        assert (await pending.only()).revision == 3, "it was under way before"
        info = await new.engine.session_info("a")
        assert (info.batch_size, info.revision, info.model) == (1, 1, "plain")
        await new.step("b", x(1))
        assert type((await brought(new, sessions))[1]).__name__ == "SessionExists", "it has gone on"
        await new.engine.close_session("a")
        await new.open("a", model="rich")
        assert (await brought(new, sessions[:1], ExistingPolicy.REPLACE)) == [ImportOutcome.REPLACED]
        assert [model.sessions for model in new.engine.models()] == [3, 0]


async def test_a_session_that_ended_later_does_not_come_back_older() -> None:
    async with two() as (old, new):
        await old.open("a")
        sessions = await exported(old, "a")
        assert await brought(new, sessions) == [ImportOutcome.IMPORTED]
        await new.step("a", x(1))
        await new.engine.close_session("a")
        error = await refused(new, *sessions[0])
        assert error.message == "session 'a' must not go back to revision 0: it ended here at revision 1"
        assert await brought(new, sessions, ExistingPolicy.REPLACE) == [ImportOutcome.IMPORTED]
        await new.engine.close_session("a")
        assert await brought(new, sessions) == [ImportOutcome.IMPORTED], "as it was when it ended"


async def test_a_limit_for_being_idle_moves_and_counts_from_the_import() -> None:
    async with two() as (old, new):
        opened = await old.engine.open_session("plain", max_idle_ms=60_000)
        name = opened.session.session_id
        old.clock.advance(50.0)
        assert await brought(new, await exported(old, name)) == [ImportOutcome.IMPORTED]
        new.clock.advance(50.0)
        await new.internals.expire_idle()
        assert (await new.engine.session_info(name)).max_idle_s == 60.0
        replaced = await old.engine.open_session("plain", session_id="other", max_idle_ms=90_000)
        await new.open("other")
        sessions = await exported(old, replaced.session.session_id)
        assert await brought(new, sessions, ExistingPolicy.REPLACE) == [ImportOutcome.REPLACED]
        assert (await new.engine.session_info("other")).max_idle_s == 90.0
        await new.step(name, x(1))
        new.clock.advance(60.5)
        assert await new.internals.expire_idle() == 1
        new.clock.advance(30.0)
        assert await new.internals.expire_idle() == 1


async def test_bad_records_change_nothing() -> None:
    async with two(resident_rows=4) as (old, new):
        await old.open("a")
        await old.step("a", x(1, 3))
        ((_, record),) = await exported(old, "a")
        good = decode("a", record)

        def other(session_id: str = "a", **changes: Any) -> bytes:
            return dataclasses.replace(good, **changes).encode(session_id)

        for given, error, message in [
            (record[:-1], StateCorrupt, "must be as it was written"),
            (b"", StateCorrupt, "it has 0 bytes"),
            (record[:30] + bytes([record[30] ^ 1]) + record[31:], StateCorrupt, "checksum"),
            (dataclasses.replace(good).encode("b"), StateCorrupt, "checksum"),
            (other(model="x"), ModelNotFound, r"must be one of \['plain', 'rich'\]; it is 'x'"),
            (other(fingerprint="f"), ModelMismatch, "of fingerprint f-plain; it has f"),
            (other(batch_size=0), StateCorrupt, "its batch_size is 0, not 1 to 2147483647"),
            (other(batch_size=2**32 - 1), StateCorrupt, "its batch_size is 4294967295"),
            (
                other(batch_size=5),
                InvalidInput,
                "batch_size of session 'a' must be 1 to resident_rows, 4; got 5",
            ),
            (
                other(revision=2**62 + 1),
                InvalidInput,
                r"revision and position of session 'a' must be at most 2\*\*62, \d+; got 4611686018427387905 and 3",
            ),
            (other(position=2**63 - 1), InvalidInput, "got 1 and 9223372036854775807"),
            (other(position=2**64 - 1), StateCorrupt, "are 1 and 18446744073709551615, more than"),
            (other(created=float("nan")), StateCorrupt, "created and last_used are nan"),
            (other(created=float("inf")), StateCorrupt, "created and last_used are inf"),
            (other(last_used=-1.0), StateCorrupt, "not seconds of the years 1970 to 9999"),
            (other(created=1e12), StateCorrupt, "not seconds of the years 1970 to 9999"),
            (
                other(created=new.clock.now() + 86_401),
                InvalidInput,
                "created and last_used of session 'a' must be at most a day after now",
            ),
            (other(last_used=new.clock.now() + 86_401), InvalidInput, "at most a day after now"),
            (other(batch_size=2), InvalidInput, "must have 32 bytes, 16 for each of batch_size 2; got 16"),
            (
                other(rows=good.rows[:-4]),
                InvalidInput,
                "must have 16 bytes, 16 for each of batch_size 1; got 12",
            ),
            (
                other(extra=good.extra[:-1]),
                InvalidInput,
                "last reply of session 'a' must be one of its model",
            ),
            (other(extra=b"\xff" * 9), InvalidInput, "last reply of session 'a' must be one of its model"),
            (other(extra=b""), InvalidInput, "a reply of arrays must have some; it has none"),
            (other(reply=9), InvalidInput, "the kind of its reply must be 0 to 3; got 9"),
            (
                other(rows=np.float32("nan").tobytes() + good.rows[4:]),
                InvalidInput,
                r"session 'a': state '.*' must hold finite numbers within float32's range; got nan at index \[0, 0\]",
            ),
            (
                other(fields=pack_fields({9: bytes(1021)})),
                InvalidInput,
                "that this server does not know must have at most 1024 bytes together; got 1025",
            ),
            (other(fields=pack_fields({9 | CRITICAL: b""})), StateCorrupt, "critical field"),
        ]:
            found = await refused(new, "a", given)
            assert type(found) is error
            with pytest.raises(error, match=message):
                raise found
        await fails(
            brought(new, [("a", record)] * 1001), InvalidInput, "sessions must be at most 1000; got 1001"
        )
        await fails(brought(new, [("a", record)] * 2), InvalidInput, "got one twice")
        assert isinstance(await refused(new, " a", record), InvalidInput)
        assert await new.engine.list_sessions() == ([], 0)
        assert await brought(new, [("b", b""), ("a", record)]) != [ImportOutcome.IMPORTED] * 2, (
            "each by itself"
        )
        assert (await new.engine.list_sessions())[1] == 1


@pytest.mark.engine(max_session_idle_s=60.0)
async def test_sessions_that_cannot_be_exported_say_why_and_the_others_come(at: Harness) -> None:
    await at.open("gone")
    at.clock.advance(61.0)
    await at.open("a", "closed")
    await at.engine.close_session("closed")
    found = await at.engine.export_sessions(["gone", "a", "closed", "never"], deadline=float("inf"))
    kinds = [type(each) for each in found]
    assert [kinds[0], *kinds[2:]] == [SessionExpired, SessionNotFound, SessionNotFound]
    assert not isinstance(found[1], ServerError)


@pytest.mark.engine(PROGRAMS)
async def test_pages_of_what_fits_are_bounded(at: Harness) -> None:
    await at.open(*[f"s{number:02}" for number in range(40)])
    await at.open("t", model="rich")
    at.clock.advance(60.0)
    await at.step("s07", x(1, 40))  # a reply that is much larger than the others
    found: dict[str, Any] = {}
    after, pages = "", 0
    while True:
        page, following = await at.engine.export_page(
            SessionFilter(prefix="s"), after=after, page_bytes=400, max_bytes=300, deadline=float("inf")
        )
        found |= dict(page)
        pages += 1
        if following is None:
            break
        after = following
    assert sorted(found) == [f"s{number:02}" for number in range(40)]
    assert pages > 5
    assert [name for name, each in found.items() if isinstance(each, MessageTooLarge)] == ["s07"]
    page, _ = await at.engine.export_page(
        SessionFilter(idle_longer_s=30.0, model="plain"),
        after="", page_bytes=1 << 20, max_bytes=1 << 20, deadline=float("inf"),
    )  # fmt: skip
    assert len(page) == 39


@pytest.mark.stores("async", "sync")
async def test_what_was_imported_outlives_a_kill_and_a_store_that_fails_has_nothing_of_it(disk: Disk) -> None:
    async with running(store=MemoryStore()) as old:
        await old.open("a", "b")
        answer = await old.single("a", x(1, 2), expected=0, request_id=5).only()
        sessions = await exported(old, "a", "b")
    fields = pack_fields({2: b"tenant"})
    sessions[1] = ("b", dataclasses.replace(decode("b", sessions[1][1]), fields=fields).encode("b"))
    async with disk.engine() as at:
        disk.store.fail(Unavailable("no room"))
        results = await brought(at, sessions)
        assert [str(result) for result in results] == ["no room"] * 2
        assert await at.engine.list_sessions() == ([], 0)
        assert await brought(at, sessions) == [ImportOutcome.IMPORTED] * 2
        await at.step("b", x(1))
        disk.store.fail(Unavailable("no room"))
        assert str((await brought(at, sessions[1:], ExistingPolicy.REPLACE))[0]) == "no room"
        assert (await at.step("b", x(1))).revision == 2
        assert await brought(at, sessions[1:], ExistingPolicy.REPLACE) == [ImportOutcome.REPLACED]
        disk.kill()
    assert unpack_fields(decode("b", disk.store.get("b")).fields)[2] == b"tenant"
    async with disk.engine() as at:
        assert (await at.engine.list_sessions())[1] == disk.store.count() == disk.store.count_of("plain") == 2
        assert (await at.engine.session_info("b")).revision == 0, "what the log has of it does not count"
        same_reply(await at.single("a", x(1, 2), expected=0, request_id=5).only(), answer)
        disk.kill()
    async with disk.engine({"plain": dataclasses.replace(PLAIN, fingerprint="f-old")}) as at:
        assert isinstance(await refused(at, *sessions[0], existing=ExistingPolicy.SKIP), ModelMismatch)
        as_served = dataclasses.replace(decode("a", sessions[0][1]), fingerprint="f-old").encode("a")
        assert isinstance(await refused(at, "a", as_served), SessionExists)
        assert await brought(at, [("a", as_served)], ExistingPolicy.REPLACE) == [ImportOutcome.REPLACED]
        assert (await at.step("a", x(1))).revision == 2
