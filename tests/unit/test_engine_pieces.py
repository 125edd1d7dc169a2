"""One large call must not stop everybody: it is done in pieces, and answered in few parts."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest

from stepwell.v1 import sessions_pb2 as pb
from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.core.scheduler import LoopQueue
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine import submission, threads
from stepwell_server.engine.api import OpenManyResult
from stepwell_server.engine.change import Change
from stepwell_server.engine.sessions import (
    close,
    directory,
    lookup,
    read,
)
from stepwell_server.engine.sessions import open as opening
from stepwell_server.engine.sessions.end import Removal
from stepwell_server.errors import RevisionConflict, ServerError, SessionExists, Unavailable
from stepwell_server.rpc.services import admin
from stepwell_server.store.base import Batch, Store
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from support.engine.harness import Answer, Answers, Harness, fails, kinds, running, x
from support.rpc.calls import calls
from support.stores.durable import start_task
from support.stores.fake_shared_store import RemoteStore
from support.stores.kinds import IN_PROCESS

pytestmark = IN_PROCESS  # turns of the event loop are counted
T = TypeVar("T")
PIECE = 16
COUNT = 10 * PIECE


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIECE", "LOOKUP_BATCH_SIZE"):
        monkeypatch.setattr(directory, name, PIECE)
    for module in (threads, opening, close, directory):
        monkeypatch.setattr(module, "PIECE_SIZE", PIECE)
    monkeypatch.setattr(submission, "REFUSAL_BATCH_SIZE", PIECE)
    for store in (Store, InProcessStore):
        monkeypatch.setattr(store, "fetch_size", PIECE)


async def turns_of(call: Coroutine[Any, Any, T]) -> tuple[T, int]:
    """What a call returns, and how many turns others had while it was made."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    try:
        return await call, turns
    finally:
        task.cancel()


class Parts(Answers):
    """Counts how many parts a reply has."""

    def __init__(self, count: int) -> None:
        super().__init__([1] * count)
        self.parts = 0

    def applied(self, *args: Any) -> None:
        self.parts += 1
        super().applied(*args)

    def failed(self, *args: Any) -> None:
        self.parts += 1
        super().failed(*args)


async def frame(at: Harness, session_ids: list[str], **fields: Any) -> tuple[list[Answer | ServerError], int]:
    """Answers to a frame, and in how many parts they came."""
    answers, count = Parts(len(session_ids)), len(session_ids)
    sizes = np.ones(count, np.intp)
    at.engine.submit(Change(session_ids, answers, inputs={"": x(count)}, batch_sizes=sizes, **fields))
    return await answers.all(), answers.parts


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.engine(resident_rows=COUNT // 2)
async def test_many_sessions_are_opened_in_pieces(named: bool, at: Harness) -> None:
    names = [f"s{number:03}" for number in range(COUNT)]
    fields: dict[str, Any] = {"session_ids": names} if named else {"count": COUNT}
    opened, turns = await turns_of(at.engine.open_sessions("plain", **fields))
    assert turns >= COUNT // PIECE - 1
    answers = await at.submit(list(opened.session_ids), x(COUNT)).all()
    assert kinds(answers) == ["Answer"] * COUNT
    resident = [(await at.engine.session_info(i)).resident for i in opened.session_ids]
    assert sum(resident) <= COUNT // 2


@pytest.mark.engine(resident_rows=4)
async def test_some_thousand_sessions_are_opened_a_few_at_a_time(at: Harness) -> None:
    _, turns = await turns_of(at.engine.open_sessions("plain", count=2048))
    # they get ids, are looked at, get records and are made
    assert turns >= 4 * (2048 // threads.PIECE_SIZE - 1)


async def test_many_sessions_are_looked_up_a_few_at_a_time(
    at: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    wait = lookup.Lookup.wait

    async def spy(self: Any, session_ids: Sequence[str], *given: Any, **named: Any) -> Any:
        counts.append(len(session_ids))
        return await wait(self, session_ids, *given, **named)

    monkeypatch.setattr(lookup.Lookup, "wait", spy)
    await at.engine.open_sessions("plain", count=2048)
    assert counts == [directory.LOOKUP_PART_SIZE] * (2048 // directory.LOOKUP_PART_SIZE)


@pytest.mark.parametrize("request_id", [0, 7])
@pytest.mark.stores("memory", "async")
@pytest.mark.engine(resident_rows=4)
async def test_an_opening_of_some_thousand_looks_at_a_few_sessions_at_a_time(
    request_id: int, monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    looked: list[int] = []
    for owner, name in ((SessionTable, "find_all"), (InProcessStore, "fetch"), (Removal, "reserve")):
        monkeypatch.setattr(owner, name, _noting_ids(getattr(owner, name), looked))
    await at.engine.open_sessions("plain", count=2048, request_id=request_id)
    assert max(looked) == threads.PIECE_SIZE


def _noting_ids(function: Callable[..., T], counts: list[int]) -> Callable[..., T]:
    def noted(self: object, session_ids: Sequence[str], *more: Any) -> T:
        counts.append(len(session_ids))
        return function(self, session_ids, *more)

    return noted


@pytest.mark.stores("memory", "async")
async def test_only_ids_that_were_closed_are_forgotten_as_closed(
    monkeypatch: pytest.MonkeyPatch, at: Harness
) -> None:
    forgotten: list[str] = []
    commit = at.store.commit

    def noted(batch: Batch) -> None:
        forgotten.extend(batch.forgets)
        commit(batch)

    monkeypatch.setattr(at.store, "commit", noted)
    await at.open("again")
    await at.engine.close_session("again")
    await at.engine.open_sessions("plain", session_ids=["first", "again"])
    await at.engine.open_sessions("plain", count=2)
    assert forgotten == ["again"]


async def most_per_turn(look: Callable[[], int], calls: Coroutine[Any, Any, T]) -> tuple[T, int]:
    """What calls return, and by how much a number grows in one turn of the event loop at most."""
    most, last = 0, look()

    async def others() -> None:
        nonlocal most, last
        while True:
            await asyncio.sleep(0)
            now = look()
            most, last = max(most, now - last), now

    task = asyncio.create_task(others())
    try:
        return await calls, most
    finally:
        task.cancel()


@pytest.mark.parametrize("part", ["reserved", "stored", "made"])
async def test_of_many_large_calls_one_piece_is_done_in_a_turn(part: str) -> None:
    async with running(resident_rows=4, store=MemoryStore()) as at:
        look = {
            "reserved": lambda: len(at.internals.removal.pending),
            "stored": at.store.count,
            "made": lambda: len(at.internals.table),
        }[part]
        opening = asyncio.gather(*(at.engine.open_sessions("plain", count=1024) for _ in range(4)))

        async def all_of_them() -> Sequence[OpenManyResult]:
            return await opening

        opened, most = await most_per_turn(look, all_of_them())
        assert most == threads.PIECE_SIZE
        assert look() == (0 if part == "reserved" else 4096 - 4 * (part == "stored"))
        assert len({one for each in opened for one in each.session_ids}) == 4096


async def test_tenants_take_turns_with_their_pieces() -> None:
    taken: list[str] = []
    whose = threads.Pieces(LoopQueue(asyncio.get_running_loop().call_soon))

    async def call(tenant: str) -> None:
        ids = [f"{tenant}{SEPARATOR}{place}" for place in range(4 * threads.PIECE_SIZE)]
        async for _ in whose.of(ids):
            taken.append(tenant)  # noqa: PERF401 - each in its turn

    await asyncio.gather(*map(call, ["many"] * 5), call("few"))
    assert taken[:8] == ["many", "few"] * 4
    assert taken[8:] == ["many"] * 16


async def test_pieces_go_on_when_a_call_is_cancelled_that_waits_for_its_turn() -> None:
    whose = threads.Pieces(LoopQueue(asyncio.get_running_loop().call_soon))
    waiting = [asyncio.create_task(whose.turn(tenant)) for tenant in ("a", "a", "b")]
    await asyncio.sleep(0)
    waiting[0].cancel()
    done = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(each) for each in done] == [asyncio.CancelledError, type(None), type(None)]


async def test_if_one_piece_is_not_kept_none_is() -> None:
    class Full(MemoryStore):
        room = 3 * threads.PIECE_SIZE

        def commit(self, batch: Batch) -> None:
            if self.count() + len(batch.puts) > self.room:
                raise Unavailable("no room")
            super().commit(batch)

    async with running(resident_rows=4, store=(store := Full())) as at:
        await fails(at.engine.open_sessions("plain", count=4 * threads.PIECE_SIZE), Unavailable, "no room")
        assert (store.count(), store.count_of("plain"), len(at.internals.table)) == (0, 0, 0)
        assert at.internals.models[0].slots.resident == 0
        assert not at.internals.removal.pending
        await at.engine.open_sessions("plain", count=2 * threads.PIECE_SIZE)


@pytest.mark.usefixtures("small_pieces")
async def test_ids_that_are_being_opened_in_pieces_are_taken(at: Harness) -> None:
    names = [f"s{number:03}" for number in range(COUNT)]
    many = await start_task(at.engine.open_sessions("plain", session_ids=names))
    while names[-1] not in at.internals.removal:
        assert not many.done()
        await asyncio.sleep(0)
    one = await at.engine.open_session("plain", session_id=names[-1])
    assert one.resumed
    assert len((await many).session_ids) == COUNT


@pytest.mark.usefixtures("small_pieces")
async def test_a_session_that_somebody_opens_meanwhile_is_noticed() -> None:
    found: set[str] = set()
    for turns in range(0, 135, 6):
        async with running() as at:
            names = [f"s{number:03}" for number in range(COUNT)]
            many = await start_task(at.engine.open_sessions("plain", session_ids=names))
            for _ in range(turns):
                await asyncio.sleep(0)
            one = await at.engine.open_session("plain", session_id=names[0])
            result: object = (await asyncio.gather(many, return_exceptions=True))[0]
            found.add(type(result).__name__)
            assert isinstance(result, SessionExists) is not one.resumed
            _, total = await at.engine.list_sessions()
            assert total == (COUNT if one.resumed else 1)
    assert found == {"SessionExists", "OpenManyResult"}


@pytest.mark.usefixtures("small_pieces")
async def test_a_call_that_is_cancelled_between_pieces_leaves_no_id_taken(at: Harness) -> None:
    names = [f"s{number:03}" for number in range(COUNT)]
    for turns in range(0, 135, 3):
        many = await start_task(at.engine.open_sessions("plain", session_ids=names))
        for _ in range(turns):
            await asyncio.sleep(0)
        many.cancel()
        await asyncio.gather(many, return_exceptions=True)
        await at.settled()
        assert await at.engine.close_sessions(names) in {0, COUNT}, "all or none"
    assert len((await at.engine.open_sessions("plain", session_ids=names)).session_ids) == COUNT


def _calls(at: Harness, names: list[str]) -> dict[str, Callable[[], Coroutine[Any, Any, Any]]]:
    return {
        "close": lambda: at.engine.close_sessions(names),
        "read": lambda: at.engine.get_states(names),
        "look": lambda: at.engine.get_states(names, with_state=False),
        "fork": lambda: at.engine.fork_sessions(names),
        "frame": lambda: frame(at, names),
    }


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("call", "are_there"),
    [
        *((call, are_there) for call in ("close", "read", "look", "fork") for are_there in (True, False)),
        ("frame", False),
    ],
)
@pytest.mark.stores("memory")
@pytest.mark.engine(resident_rows=2 * COUNT)
async def test_steps_of_others_are_answered_between_the_pieces(
    call: str, are_there: bool, at: Harness
) -> None:
    names = [f"s{number:03}" for number in range(COUNT)]
    await at.open(f"beta{SEPARATOR}quiet", *(names if are_there else ()))
    large = await start_task(_calls(at, names)[call]())
    for _ in range(3):
        assert (await at.submit(f"beta{SEPARATOR}quiet", x(1)).only()).revision
        assert not large.done(), "it was done in one piece"
    result: Any = (await asyncio.gather(large, return_exceptions=True))[0]
    if call == "close":
        assert result == (COUNT if are_there else 0)
    elif call == "fork":
        assert isinstance(result, OpenManyResult if are_there else ServerError)
    elif call == "frame":
        answers, parts = result
        assert (set(kinds(answers)), parts) == ({"SessionNotFound"}, 1)
    else:
        assert len(result.members) == (COUNT if are_there else 0)
        assert sum(len(members) for members, _ in result.errors) == (0 if are_there else COUNT)


@pytest.mark.parametrize("part", ["described", "converted"])
@pytest.mark.parametrize("wanted", [{}, {"model": "plain"}])
@pytest.mark.stores("memory", "async")
async def test_of_many_lists_one_piece_is_done_in_a_turn(
    part: str, wanted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 0

    def count(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def counted(*args: Any) -> Any:
            nonlocal done
            done += 1
            return function(*args)

        monkeypatch.setattr(owner, name, counted)

    if part == "described":
        count(read.SessionList, "_info")
    else:
        count(admin, "_listed")
    async with calls(resident_rows=4) as at:
        await at.call(pb.OpenSessionsRequest(model="plain", count=512))
        done = 0
        request = pb.ListSessionsRequest(page_size=512, **wanted)
        lists = asyncio.gather(*(at.call(request) for _ in range(4)))

        async def all_of_them() -> Any:
            return await lists

        pages, most = await most_per_turn(lambda: done, all_of_them())
    assert [len(page.sessions) for page in pages] == [512] * 4
    assert done == 4 * 512
    assert most <= threads.PIECE_SIZE


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("call", ["open", "open again", "close", "read", "fork"])
@pytest.mark.stores("disk")
async def test_a_store_on_disk_is_asked_for_a_long_list_in_parts(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    fetch = InProcessStore.fetch

    def counted(self: InProcessStore, session_ids: Sequence[str], known: Sequence[int] = ()) -> Any:
        asked.append(len(session_ids) - sum(map(bool, known)))  # what is known is not looked for
        return fetch(self, session_ids, known)

    monkeypatch.setattr(InProcessStore, "fetch", counted)
    async with running(resident_rows=2 * COUNT) as at:
        names = [f"s{number:03}" for number in range(COUNT)]
        await at.open("quiet")
        opening = functools.partial(at.engine.open_sessions, "plain", session_ids=names, request_id=7)
        if call == "open again":
            await opening()
        ways: dict[str, Callable[[], Any]] = {"open": opening, "open again": opening, **_calls(at, names)}
        result: Any = (await asyncio.gather(ways[call](), return_exceptions=True))[0]
        assert isinstance(result, ServerError) is (call == "fork")
        if call.startswith("open"):
            assert list(result.session_ids) == names
            assert result.replayed is (call == "open again")
        assert any(asked) or call == "read", "the store was asked"
        assert max(asked) <= PIECE


async def test_ids_for_many_sessions_are_drawn_by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    idents: list[int] = []
    digits_of = directory._digits

    def noted(tokens: bytes) -> Any:
        idents.append(threading.get_ident())
        return digits_of(tokens)

    monkeypatch.setattr(directory, "_digits", noted)
    async with running() as at:
        few = await at.engine.open_sessions("plain", count=COUNT, request_id=7)
        monkeypatch.setattr(directory, "PIECE", PIECE)
        again = await at.engine.open_sessions("plain", count=COUNT, request_id=7)
    assert (again.session_ids, again.replayed) == (few.session_ids, True)
    here = threading.get_ident()
    assert [thread == here for thread in idents] == [True, False]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.stores("memory")
@pytest.mark.engine(resident_rows=2 * COUNT)
async def test_a_close_of_many_that_is_sent_again_is_done_in_pieces(at: Harness) -> None:
    names = [f"s{number:03}" for number in range(COUNT)]
    await at.open(*names)
    first, looked_for = await turns_of(at.engine.close_sessions(names, request_id=40))
    again, turns = await turns_of(at.engine.close_sessions(names, request_id=40))
    assert (first, again) == (COUNT, COUNT)
    assert turns >= looked_for + COUNT // PIECE, "each is looked for, and then found closed"


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.engine(resident_rows=2 * COUNT)
async def test_a_session_that_takes_the_place_of_another_is_not_read_for_it(at: Harness) -> None:
    names = [f"s{number:03}" for number in range(COUNT)]
    await at.open(*names)
    read = await start_task(at.engine.get_states(names))
    await asyncio.sleep(0)
    await at.engine.close_session(names[0])
    await at.open_and_step("other", x(1))
    states = await read
    if 0 in states.members.tolist():
        assert states.revisions[0] == 0, "its own, read before it was closed"
    else:
        ((members, error),) = states.errors
        assert members.tolist() == [0]
        assert names[0] in error.message


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.engine(resident_rows=2 * COUNT)
async def test_a_close_that_is_cancelled_between_pieces_holds_no_session(at: Harness) -> None:
    names = [f"s{number:03}" for number in range(COUNT)]
    for turns in range(0, 30, 3):
        await at.engine.open_sessions("plain", session_ids=names)
        many = await start_task(at.engine.close_sessions(names))
        for _ in range(turns):
            await asyncio.sleep(0)
        many.cancel()
        await asyncio.gather(many, return_exceptions=True)
        await at.settled()
        assert set(kinds(await at.submit(names, x(COUNT)).all())) <= {"Answer", "SessionNotFound"}
        await at.engine.close_sessions(names)


async def test_a_large_state_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, at: Harness) -> None:
    await at.open("a", batch_size=23)
    await at.step("a", x(23))
    whole, few = await turns_of(at.engine.get_state("a"))
    monkeypatch.setattr(read, "COPY_BATCH_ROWS", 4)
    again, turns = await turns_of(at.engine.get_state("a"))
    assert turns >= few + 5
    assert again.state["sum"].tobytes() == whole.state["sum"].tobytes()


async def test_a_step_waits_while_a_large_state_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "COPY_BATCH_ROWS", 1)
    async with running() as at:
        await at.open("a", batch_size=8)
        reading = await start_task(at.engine.get_state("a"))
        step = at.submit("a", x(8), sizes=[8])
        state = (await reading).state["sum"]
        assert (state == state[0]).all(), "as before the step, every row of it"
        assert (await step.only()).revision == 1


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.stores("async", "sync", "fake_shared")
async def test_a_request_past_its_deadline_after_its_lookup_is_not_applied(at: Harness) -> None:
    await at.open("a")
    ids = ["a", *(f"never{number}" for number in range(COUNT))]
    reset = at.submit(ids, reset=True, batch_sizes=[1] * len(ids), deadline=at.clock.monotonic() + 5)
    at.clock.advance(6)
    assert set(kinds(await reset.all())) == {"DeadlineExceeded"}
    assert (await at.engine.session_info("a")).revision == 0


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.stores("async", "sync", "fake_shared")
async def test_a_frame_of_unknown_ids_is_looked_for_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PIECE_SIZE", PIECE)
    async with running() as at:
        names = [f"never{number}" for number in range(COUNT)]
        (answers, parts), turns = await turns_of(frame(at, names))
        assert set(kinds(answers)) == {"SessionNotFound"}
        assert parts == 1
        assert turns >= 2


async def test_unknown_ids_cost_one_look_at_what_is_remembered(at: Harness) -> None:
    count = threads.PIECE_SIZE
    await at.open("closed")
    await at.engine.close_session("closed")
    looks: list[int] = []
    store: Any = at.store.shared if isinstance(at.store, RemoteStore) else at.store
    seen: Any = at.internals.remembering_store
    tombstones = store.tombstones

    def counted(session_ids: Sequence[str]) -> Any:
        looks.append(len(session_ids))
        return tombstones(session_ids)

    seen.tombstones = store.tombstones = counted
    foreign = "s-00000000-" + "a" * 22
    names = [f"never{number}" for number in range(count - 2)]
    answers, parts = await frame(at, ["closed", foreign, *names])
    assert kinds(answers[:3]) == ["SessionNotFound", "SessionLost", "SessionNotFound"]
    assert "was closed" in str(answers[0])
    assert parts == 3, "one for each reason"
    assert looks[0] == count
    assert len(looks) <= 4, "one more to word each reason"


@pytest.mark.parametrize("shape", ["plain", "long", "nothing"])
async def test_many_replays_are_answered_in_few_parts(shape: str) -> None:
    names = [f"s{number}" for number in range(COUNT)]
    inputs = x(COUNT, 3) if shape == "long" else x(COUNT)
    async with running(resident_rows=COUNT) as at:
        await at.open(*names)
        fields: dict[str, Any] = {"reset": True} if shape == "nothing" else {"inputs": {"": inputs}}
        results = []
        for _ in range(2):
            answers = Parts(COUNT)
            requests = np.arange(1, COUNT + 1, dtype=np.uint64)
            expected = np.zeros(COUNT, np.uint64)
            at.engine.submit(Change(names, answers, expected=expected, request_ids=requests, **fields))
            results.append((await answers.all(), answers.parts))
        (first, _), (again, parts) = results
        assert parts == 1
        for one, other in zip(first, again, strict=True):
            assert isinstance(one, Answer)
            assert isinstance(other, Answer)
            assert other.replayed
            assert (one.revision, one.position) == (other.revision, other.position)
            assert {n: a.tobytes() for n, a in one.outputs.items()} == {
                n: a.tobytes() for n, a in other.outputs.items()
            }


async def test_replays_of_several_forms_are_each_their_own(at: Harness) -> None:
    await at.open("a", "b", "c", "d")
    first = {
        "a": await at.step("a", x(1, seed=1), request_ids=1),
        "b": await at.step("b", x(1, 2, seed=2), request_ids=2),
        "c": await at.step("c", x(1, 3, seed=3), request_ids=3),
        "d": await at.step("d", x(1, 2, seed=4), request_ids=4),
    }
    both = np.concatenate([x(1, 2, seed=2), x(1, 2, seed=4)])
    answers = await at.submit(["b", "d"], both, expected=[0] * 2, request_ids=[2, 4]).all()
    answers += [await at.step("a", x(1, seed=1), expected=0, request_ids=1)]
    answers += [await at.step("c", x(1, 3, seed=3), expected=0, request_ids=3)]
    for name, answer in zip("bdac", answers, strict=True):
        assert isinstance(answer, Answer)
        assert answer.replayed
        assert answer.outputs["y"].tobytes() == first[name].outputs["y"].tobytes()
        assert answer.outputs["y"].shape == first[name].outputs["y"].shape


async def test_many_conflicts_are_answered_in_few_parts_and_few_each_with_its_own() -> None:
    names = [f"s{number}" for number in range(COUNT)]
    async with running(resident_rows=COUNT) as at:
        await at.open(*names)
        await at.submit(names[:5], x(5)).all()
        answers, parts = await frame(at, names, expected=np.full(COUNT, 9, np.uint64))
        assert parts == 2, "one for each revision that they have"
        found = [answer for answer in answers if isinstance(answer, RevisionConflict)]
        assert [(error.expected, error.actual) for error in found] == [(9, 1)] * 5 + [(9, 0)] * (COUNT - 5)
        assert "(and so for 4 others of the session_ids)" in found[0].message
        few, parts = await frame(at, names[:6], expected=np.full(6, 9, np.uint64))
        assert parts == 6
        assert [name in str(error) for name, error in zip(names, few, strict=False)] == [True] * 6
