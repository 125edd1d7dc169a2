"""No record harms anybody but its own session, however it was made and however it got into the store."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell import SessionInfo
from stepwell.cli.sessions import session_cells, session_facts, session_json
from stepwell.v1 import sessions_pb2
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import Internal, ServerError, StateCorrupt
from stepwell_server.rpc.convert import from_session
from stepwell_server.rpc.page_tokens import from_token, to_token
from stepwell_server.store.base import Batch
from stepwell_server.store.fields import CRITICAL, OWNER, VERSION, pack_fields
from stepwell_server.store.record import HEADER, header_or_none, with_checksum
from support.engine.harness import STORES, Answer, Harness, running, x
from support.samples import examples
from support.stores.durable import same_reply
from support.stores.fake_shared_store import RemoteStore
from support.stores.records import decode

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
        (record,) = await at.engine.export_sessions(["a"], deadline=float("inf"))
        assert not isinstance(record, ServerError)
        return bytes(record)


async def error_of(call: Awaitable[object]) -> ServerError | None:
    try:
        await call
    except ServerError as error:
        return error
    return None


async def begun(at: Harness) -> Answer:
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
                shown = SessionInfo._from_message(message)
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


@pytest.mark.stores("memory", "fake_shared")
@given(some=mutations)
@settings(max_examples=examples(240))
def test_any_record_is_imported_or_refused_alone(some: list[Mutation], store_kind: str) -> None:
    async def tried() -> None:
        STORES.kind = store_kind
        good = await sample()
        async with running(resident_rows=4, check=False) as at:
            answer = await begun(at)
            first, second = await at.engine.import_sessions(
                [SessionRecord("a", "a", _applied(some, good)), SessionRecord("b", "a", good)],
                ExistingPolicy.REFUSE,
            )
            assert second is ImportOutcome.IMPORTED, "it is not the other's fault"
            assert first is ImportOutcome.IMPORTED or isinstance(first, ServerError)
            assert not isinstance(first, Internal)
            await harmless(at, answer)

    asyncio.run(tried())


@pytest.mark.stores("memory", "fake_shared")
@given(some=mutations)
@settings(max_examples=examples(240))
def test_any_record_in_the_store_harms_nobody_else(some: list[Mutation], store_kind: str) -> None:
    async def tried() -> None:
        STORES.kind = store_kind
        good = await sample()
        async with running(resident_rows=4, check=False) as at:
            answer = await begun(at)
            store = at.store.shared if isinstance(at.store, RemoteStore) else at.store
            store.commit(Batch(puts=[("a", _applied(some, good))], counts=[("plain", 1)]))
            await harmless(at, answer)

    asyncio.run(tried())


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
    answer = await begun(at)
    (record,) = await at.engine.export_sessions(["a"], deadline=float("inf"))
    assert not isinstance(record, ServerError)
    for rows, is_taken in ((1, True), (0, False), (3, False)):
        await at.engine.close_session("a")
        later = dataclasses.replace(decode("a", _with_rows(bytes(record), rows)), revision=100).encode("a")
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
