"""Sessions move between servers as complete records; a bad record harms only its own session."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import math
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell import SessionInfo as ShownSession
from stepwell.cli.sessions import session_cells, session_facts, session_json
from stepwell.v1 import sessions_pb2
from stepwell_server.engine.api import SessionFilter, SessionInfo
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.engine.threads import PIECE_SIZE
from stepwell_server.errors import (
    Internal,
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
from stepwell_server.rpc.convert import from_session
from stepwell_server.rpc.page_tokens import from_token, to_token
from stepwell_server.store.base import Batch
from stepwell_server.store.fields import CRITICAL, OWNER, VERSION, pack_fields, unpack_fields
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import HEADER, header_or_none, with_checksum
from support.engine.fake_executor import PLAIN, RICH
from support.engine.harness import STORES, Answer, Harness, fails, running, x
from support.samples import examples
from support.stores.durable import Disk, same_reply, start_task
from support.stores.fake_shared_store import RemoteStore
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


async def test_a_moved_session_continues_and_answers_a_retry_once() -> None:
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


async def test_an_existing_session_stays_unless_it_is_to_be_replaced() -> None:
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
        replacing = await start_task(brought(new, sessions, ExistingPolicy.REPLACE))
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


async def test_an_import_of_many_sessions_runs_in_pieces() -> None:
    """Other calls run in between: no iteration of the event loop imports more than one piece."""
    names = [f"s{number:03}" for number in range(PIECE_SIZE * 4)]
    async with two(resident_rows=len(names)) as (old, new):
        await old.open(*names)
        importing, counts = asyncio.create_task(brought(new, await exported(old, *names))), [0]
        while not importing.done():
            await asyncio.sleep(0)
            counts.append(sum(each.sessions for each in new.engine.stats()))
        assert await importing == [ImportOutcome.IMPORTED] * len(names)
        assert max(after - before for before, after in itertools.pairwise(counts)) == PIECE_SIZE


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
        assert await new.expired_after(60.5) == 1
        assert await new.expired_after(30.0) == 1


async def test_bad_records_change_nothing() -> None:
    async with two(resident_rows=4) as (old, new):
        await old.open_and_step("a", x(1, 3))
        ((_, record),) = await exported(old, "a")
        good = decode("a", record)

        def other(session_id: str = "a", **changes: Any) -> bytes:
            return dataclasses.replace(good, **changes).encode(session_id)

        for given, error, message in [
            (record[:-1], StateCorrupt, "must be intact"),
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
    async with disk.engine(is_killed=True) as at:
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
    assert unpack_fields(decode("b", disk.store.get("b")).fields)[2] == b"tenant"
    async with disk.engine(is_killed=True) as at:
        assert (await at.engine.list_sessions())[1] == disk.store.count() == disk.store.count_of("plain") == 2
        assert (await at.engine.session_info("b")).revision == 0, "what the log has of it does not count"
        same_reply(await at.single("a", x(1, 2), expected=0, request_id=5).only(), answer)
    async with disk.engine({"plain": dataclasses.replace(PLAIN, fingerprint="f-old")}) as at:
        assert isinstance(await refused(at, *sessions[0], existing=ExistingPolicy.SKIP), ModelMismatch)
        as_served = dataclasses.replace(decode("a", sessions[0][1]), fingerprint="f-old").encode("a")
        assert isinstance(await refused(at, "a", as_served), SessionExists)
        assert await brought(at, [("a", as_served)], ExistingPolicy.REPLACE) == [ImportOutcome.REPLACED]
        assert (await at.step("a", x(1))).revision == 2


#: A step of several time steps, whose reply is kept as arrays of its own.
STEP = x(1, 3, seed=7)
FINE_ID, HOSTILE_ID = 5, 7
Mutation = Callable[[bytes], bytes]

_NUMBERS = st.sampled_from(
    [0, 1, 2, 255, 2**16 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
) | st.integers(0, 2**64 - 1)
_TIMES = st.sampled_from(
    [float("nan"), float("inf"), float("-inf"), -1.0, 1e12, 1e300, 253_402_300_800.0]
) | st.floats(width=64)


def _with_column(name: str, value: float) -> Mutation:
    def mutate(record: bytes) -> bytes:
        changed = bytearray(record)
        heads = np.frombuffer(changed, HEADER, 1)
        heads[name] = value if HEADER[name].kind == "f" else int(value) % 2 ** (8 * HEADER[name].itemsize)
        return bytes(changed)

    return mutate


def _with_bytes(place: int, some: bytes) -> Mutation:
    def mutate(record: bytes) -> bytes:
        at = HEADER.itemsize + place % max(1, len(record) - HEADER.itemsize)
        return (record[:at] + some + record[at + len(some) :])[: max(len(record), at + len(some))]

    return mutate


def _cut(count: int) -> Mutation:
    return lambda record: record[: max(HEADER.itemsize, len(record) - count)]


def _encoded(**changes: Any) -> Mutation:
    """The parts add up: what is wrong is in them."""
    return lambda record: dataclasses.replace(decode("a", record), **changes).encode("a")


def foreign(told: object, data: bytes = bytes(24)) -> bytes:
    """A reply that says its own tensors."""
    head = json.dumps(told).encode()
    return b"\xff" + struct.pack("<I", len(head)) + head + data


_TOLD: st.SearchStrategy[Any] = st.sampled_from(
    [
        [[["y", "float32", [1, 3, 2]]], []],
        [[["y", "float32", [3, 1, 2]]], []],
        [[["y", "float32", [-1]]], []],
        [[["y", "float32", [2**70, 0]]], []],
        [[["y", "float32", []]], []],
        [[["y", "O", [3]]], []],
        [[["y", "f4,f4", [3]]], []],
        [[["y", ["x", "f4"], [3]]], []],
        [[[7, "float32", [1, 3, 2]]], []],
        [[["y", "<U2", [1, 3]]], []],
        [[["y", "float32", [True, 3, 2]]], []],
        [[["y", "float32", [1.0, 3, 2]]], []],
        {"y": 1},
        None,
        [[], [], []],
    ]
)
_FIELDS = st.dictionaries(
    st.sampled_from([VERSION, OWNER, 3, 9, 9 | CRITICAL]), st.binary(max_size=40), max_size=3
).map(pack_fields)
mutations = st.lists(
    st.one_of(
        st.builds(_with_column, st.sampled_from(HEADER.names or ()).filter(lambda n: n not in {"created", "last_used"}), _NUMBERS),
        st.builds(_with_column, st.sampled_from(["created", "last_used"]), _TIMES),
        st.builds(_with_bytes, st.integers(0, 400), st.binary(min_size=1, max_size=8)),
        st.builds(_cut, st.integers(1, 200)),
    ),
    min_size=1,
    max_size=3,
) | st.builds(
    lambda *given: [_encoded(**{name: value for each in given for name, value in each.items()})],
    st.fixed_dictionaries({}, optional={"extra": st.binary(max_size=60) | _TOLD.map(foreign)}),
    st.fixed_dictionaries({}, optional={"fields": _FIELDS | st.binary(max_size=20)}),
    st.fixed_dictionaries({}, optional={"reply": st.integers(0, 255), "model": st.text(max_size=5)}),
)  # fmt: skip


def _applied(some: list[Mutation], record: bytes) -> bytes:
    for mutate in some:
        try:
            record = mutate(record)
        except ServerError:  # what came before left nothing to be decoded
            break
    return with_checksum("a", record)


async def sample() -> bytes:
    """The record of a session after a step of several time steps."""
    async with running() as at:
        await at.open("a")
        await at.single("a", STEP, expected=0, request_id=HOSTILE_ID).only()
        return await at.exported("a")


async def error_of(call: Awaitable[object]) -> ServerError | None:
    try:
        await call
    except ServerError as error:
        return error
    return None


async def open_fine(at: Harness) -> Answer:
    """The session of somebody else, and the answer to its last step."""
    await at.open("fine")
    return await at.single("fine", STEP, expected=0, request_id=FINE_ID).only()


async def listed(at: Harness, limit: int) -> None:
    """Every list has everybody, page by page, and whoever shows it can."""
    for idle_longer_s in (None, -math.inf):
        after, names = "", list[str]()
        while True:
            page, total = await at.engine.list_sessions(after=after, limit=limit, idle_longer_s=idle_longer_s)
            assert total >= 1
            for info in page:
                message = sessions_pb2.Session.FromString(from_session(info).SerializeToString())
                shown = ShownSession._from_message(message)
                assert repr(shown)
                assert shown._repr_html_()
                session_cells(shown, everybodys=True)
                session_facts(shown)
                json.dumps(session_json(shown), allow_nan=False)
                names.append(info.session_id)
            if page.next is None:
                break
            after, _ = from_token(to_token(page.next))
            assert len(names) < 10, "pages without an end"
        assert names.count("fine") == 1, f"{idle_longer_s} {names}"
        assert len(set(names)) == len(names)


async def harmless(at: Harness, answer: Answer) -> None:
    """What somebody else gets is right, also in one frame with the hostile session."""
    await listed(at, 1)
    await listed(at, 100)
    own = answer.outputs["y"]
    for _ in range(2):  # the second time it is in memory, if it can be
        x_of_both = np.concatenate([STEP, STEP])
        hostile = await at.engine.export_sessions(["a"], deadline=float("inf"))
        header = None if isinstance(hostile[0], ServerError) else header_or_none("a", hostile[0])
        again = 0 if header is None or not header.revision else header.revision - 1
        found = await at.submit(
            ["a", "fine"],
            x_of_both,
            expected=[again, 0],
            batch_sizes=[1, 1],
            request_ids=[0 if header is None else header.request_id, FINE_ID],
        ).all()
        assert not isinstance(found[0], Internal)
        assert isinstance(found[1], Answer)
        same_reply(found[1], answer)
        assert found[1].outputs["y"].tobytes() == own.tobytes()
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: at.engine.session_info("a"),
        lambda: at.engine.get_state("a"),
        lambda: at.engine.fork("a", new_session_id="fork"),
        lambda: at.engine.close_session("a"),
    ]
    for call in calls:
        problem = await error_of(call())
        assert not isinstance(problem, Internal)
    step = x(1)
    assert (await at.step("fine", step)).revision == 2


@pytest.mark.parametrize("is_imported", [True, False], ids=["imported", "in the store"])
@pytest.mark.stores("memory", "fake_shared")
@given(some=mutations)
@settings(max_examples=examples(240))
def test_a_damaged_record_harms_no_other_session(
    is_imported: bool, some: list[Mutation], store_kind: str
) -> None:
    async def run() -> None:
        STORES.kind = store_kind
        good = await sample()
        damaged = _applied(some, good)
        async with running(resident_rows=4, check=False) as at:
            answer = await open_fine(at)
            if is_imported:
                first, second = await at.engine.import_sessions(
                    [SessionRecord("a", "a", damaged), SessionRecord("b", "a", good)], ExistingPolicy.REFUSE
                )
                assert second is ImportOutcome.IMPORTED, "the other record is good"
                assert first is ImportOutcome.IMPORTED or isinstance(first, ServerError)
                assert not isinstance(first, Internal)
            else:
                store = at.store.shared if isinstance(at.store, RemoteStore) else at.store
                store.commit(Batch(puts=[("a", damaged)], counts=[("plain", 1)]))
            await harmless(at, answer)

    asyncio.run(run())


def _with_rows(record: bytes, rows: int) -> bytes:
    """The record of a session whose remembered reply has other rows than the session."""
    reply = struct.pack("<B3I", 3, rows, 3, 2) + bytes(rows * 3 * 2 * 4)
    return dataclasses.replace(decode("a", record), extra=reply).encode("a")


@pytest.mark.stores("memory", "fake_shared")
@pytest.mark.engine(resident_rows=6)
async def test_a_reply_of_other_rows_moves_nobody_elses(store_kind: str, at: Harness) -> None:
    """Replies of one form are put together, one session's rows after the other's."""
    await at.open("a", "z", batch_size=2)
    for name in "az":
        await at.single(name, x(2, 3), expected=0, request_id=HOSTILE_ID).only()
    honest = await at.single("z", x(2, 3), expected=0, request_id=HOSTILE_ID).only()
    answer = await open_fine(at)
    record = await at.exported("a")
    for rows, is_taken in ((1, True), (0, False), (3, False)):
        await at.engine.close_session("a")
        later = dataclasses.replace(decode("a", _with_rows(record, rows)), revision=100).encode("a")
        (told,) = await at.engine.import_sessions([SessionRecord("a", "a", later)], ExistingPolicy.REFUSE)
        assert (told is ImportOutcome.IMPORTED) is is_taken
        if not is_taken:
            await at.open("a", batch_size=2)
            continue
        found = await at.submit(
            ["a", "z", "fine"],
            np.concatenate([x(2, 3), x(2, 3), STEP]),
            sizes=[2, 2, 1],
            batch_sizes=[2, 2, 1],
            expected=[99, 0, 0],
            request_ids=[HOSTILE_ID, HOSTILE_ID, FINE_ID],
        ).all()
        assert isinstance(found[0], StateCorrupt)
        assert isinstance(found[1], Answer)
        assert isinstance(found[2], Answer)
        same_reply(found[1], honest)
        same_reply(found[2], answer)
