"""Versions come, go and move while sessions are used, the server is killed, and starts again, in any order."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.engine.api import Select, SessionPolicy
from stepwell_server.engine.catalog import changes
from stepwell_server.engine.sessions.transfer import ExistingPolicy, ImportOutcome, SessionRecord
from stepwell_server.errors import Overloaded, ServerError, Unavailable
from stepwell_server.store.memory import MemoryStore
from support.checks.model_of_versions import (
    PROGRAMS,
    ModelOfVersions,
    OneSession,
    SentChange,
    initial,
    is_wide,
    same,
    to_plain,
    to_wide,
)
from support.engine.fake_executor import WAIT_S
from support.engine.harness import STORES, Answer, FixedCost, Harness
from support.engine.versions import serving
from support.run_folder import memory_folder
from support.samples import examples
from support.stores.durable import Disk, stalled, start_task
from support.stores.fake_shared_store import RemoteStore

SETTINGS = settings(max_examples=examples(120))
NAMES = "abcdef"
#: So few that unused versions are forgotten all the time.
_MAX_KNOWN = 3
#: More than all sessions have.
_MANY = 64


@dataclasses.dataclass(frozen=True)
class Do:
    """One thing that is done. What each number means is up to it."""

    kind: str
    names: tuple[str, ...]
    version: int
    how: str
    ref: str
    number: int
    flag: bool


@dataclasses.dataclass(frozen=True)
class Shape:
    """How the engine is put together."""

    resident_rows: int
    threads: bool


_KINDS = [
    *["step"] * 6, "reset", *["again"] * 2, *["open"] * 3, "fork", "move away", "close", "read",
    *["load"] * 3, *["default"] * 4, *["default under way"] * 3, "label", "unload", "force", "restart",
    *["kill"] * 2, *["cut"] * 2, "forget",
]  # fmt: skip
actions = st.builds(
    Do,
    st.sampled_from(_KINDS),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True).map(tuple),
    st.sampled_from([1, 2, 2, 3, 4, 5, 6]),
    st.sampled_from(["carry", "carry", "carry", "reset", "migrate", "keep"]),
    st.sampled_from(["plain", "plain", "plain", "plain@2", "plain@3", "plain:canary"]),
    st.integers(0, 5),
    st.booleans(),
)
programs = st.lists(actions, min_size=20, max_size=60)
shapes = st.builds(Shape, st.sampled_from([4, 6, _MANY]), st.booleans())


class Play:
    """Does to an engine what a program says, and holds it against the model."""

    def __init__(self, kind: str, shape: Shape) -> None:
        self.kind = kind
        self.shape = shape
        self.disk = Disk() if kind in {"async", "sync"} else None
        self.shared = MemoryStore() if kind == "fake_shared" else None
        self.is_shared = kind == "fake_shared"
        self.model = ModelOfVersions({1}, 1, is_shared=self.is_shared)
        self.rng = np.random.default_rng(3)
        self.requests = 0
        self.stack = AsyncExitStack()

    # --------------------------------------------------------------------------------------------------- the server

    async def begin(self, versions: set[int]) -> None:
        own = {f"plain@{version}": PROGRAMS[version] for version in versions}
        options: dict[str, Any] = {}
        if self.disk is not None:
            options = {"store": self.disk.store, "clock": self.disk.clock}
        elif self.shared is not None:
            options = {"store": RemoteStore(self.shared)}
        server = serving(
            own,
            resident_rows=self.shape.resident_rows,
            threads=self.shape.threads,
            migrations={"to_wide": to_wide, "to_plain": to_plain},
            **options,
        )
        self.at: Harness = await self.stack.enter_async_context(server)
        self.fix_costs()

    def fix_costs(self) -> None:
        for model in self.at.internals.models:
            model.cost = FixedCost(1.0 if self.shape.threads else 0.0, 2)

    async def again(self, number: int) -> None:
        """Start a server on what the last one left, now and then without one of the versions."""
        loaded = set(self.model.loaded)
        missing = sorted(loaded)[number % len(loaded)] if number % 3 == 0 and len(loaded) > 1 else 0
        await self.begin(loaded - {missing})
        self.model.restart(loaded - {missing})
        await self.check()
        if missing:
            for name in self.model.sessions:
                await self.step([name])
            await self.load(missing)

    async def kill(self, number: int) -> None:
        assert self.disk is not None
        old = self.disk.store
        self.disk.kill()
        self.at.hooks.open_gate()
        old.release()
        await self.stack.aclose()
        old.store.close()
        await self.again(number)

    async def end(self) -> None:
        await self.check()
        await self.stack.aclose()
        if self.disk is not None:
            self.disk.close()

    # -------------------------------------------------------------------------------------------------- what is done

    async def do(self, do: Do) -> None:
        model, name = self.model, do.names[0]
        session = model.sessions.get(name)
        match do.kind:
            case "step":
                await self.step(do.names, select=["ALL", "ALL", "LAST", "NONE"][do.number % 4], bare=do.flag)
            case "reset" if session is not None:
                await self.change(name, self.said("reset", 0, 0))
            case "again" if session is not None and session.last is not None:
                await self.repeat(name, session)
            case "open" if session is None:
                await self.open(name, do)
            case "fork" if len(do.names) > 1 and session is not None and do.names[1] not in model.sessions:
                if session.version in model.loaded:
                    await self.at.engine.fork(name, new_session_id=do.names[1])
                    model.fork(name, do.names[1])
            case "move away" if len(do.names) > 1 and session is not None:
                await self.export_and_import(name, do.names[1])
            case "close" if session is not None:
                await self.at.engine.close_session(name)
                model.close(name)
            case "read":
                await self.check()
            case "load":
                await self.load(do.version)
            case "default":
                await self.set_default(do)
            case "default under way":
                await self.set_default_under_way(do)
            case "label":
                await self.label(do)
            case "unload" | "force":
                await self.unload(do)
            case "restart" if self.kind != "memory" and model.loaded:
                await self.stack.aclose()
                await self.again(do.number)
            case "kill" if self.disk is not None and model.loaded:
                await self.kill(do.number)
            case "cut" if self.disk is not None and model.loaded:
                await self.cut(do)
            case "forget":
                await self.at.internals.forget_unused("plain")

    def said(
        self, kind: str, rows: int, steps: int, select: str = "ALL", *, bare: bool = False
    ) -> SentChange:
        """A change; `bare`: without a request id."""
        self.requests += 1
        x = self.rng.standard_normal((rows, max(steps, 1), 2)).astype(np.float32)
        return SentChange(kind, x, select, steps > 0, 0 if bare else self.requests)

    def submit(self, name: str, said: SentChange, **fields: Any) -> Any:
        session = self.model.sessions[name]
        if said.kind == "reset":
            fields["reset"] = True
            return self.at.submit(name, request_ids=said.request, sizes=[session.batch_size], **fields)
        x = said.x if said.timed else said.x[:, 0]
        select = Select[said.select]
        return self.at.submit(
            name, x, sizes=[session.batch_size], request_ids=said.request, select=select, **fields
        )

    def why_not(self, session: OneSession) -> str:
        """The error of whoever uses a session; empty: none."""
        if session.version in self.model.loaded:
            return ""
        if self.is_shared:
            return "VersionElsewhere"
        return "VersionNotFound" if self.model.loaded else "ModelNotFound"

    @property
    def no_model(self) -> str:
        """The error of whoever changes a model of which nothing is loaded."""
        return "VersionElsewhere" if self.is_shared else "ModelNotFound"

    async def change(self, name: str, said: SentChange) -> None:
        session = self.model.sessions[name]
        (answer,) = await self.submit(name, said, expected=session.revision).all()
        self.settle(session, said, answer)

    def settle(self, session: OneSession, said: SentChange, answer: Answer | ServerError) -> None:
        """A change was answered that is alone."""
        if isinstance(answer, ServerError):
            assert type(answer).__name__ == self.why_not(session), answer
            return
        assert not self.why_not(session)
        session.apply(said)
        self.agree(session, answer)

    def agree(self, session: OneSession, answer: Answer) -> None:
        assert (answer.revision, answer.position) == (session.revision, session.position)
        assert answer.version == session.version
        assert not answer.replayed
        session.see(answer.outputs)

    async def step(self, names: Sequence[str], select: str = "ALL", *, bare: bool = False) -> None:
        """Steps of sessions, as frames of those of one version."""
        model, steps = self.model, int(self.rng.integers(0, 4))
        frames: dict[int, list[str]] = {}
        for name in names:
            if name in model.sessions:
                frames.setdefault(model.sessions[name].version, []).append(name)
        for members in frames.values():
            own = [model.sessions[name] for name in members]
            if sum(session.batch_size for session in own) > self.shape.resident_rows:
                continue
            said = [self.said("step", session.batch_size, steps, select, bare=bare) for session in own]
            x = np.concatenate([each.x if each.timed else each.x[:, 0] for each in said])
            answers = self.at.submit(
                members,
                x,
                sizes=[session.batch_size for session in own],
                expected=[session.revision for session in own],
                request_ids=[each.request for each in said],
                select=Select[select],
            )
            for session, each, answer in zip(own, said, await answers.all(), strict=True):
                self.settle(session, each, answer)

    async def repeat(self, name: str, session: OneSession) -> None:
        """Send the last change once more."""
        said = session.last
        assert said is not None
        (answer,) = await self.submit(name, said, expected=session.revision - 1).all()
        if isinstance(answer, ServerError):
            assert type(answer).__name__ == self.why_not(session), answer
            return
        assert answer.replayed
        assert answer.revision == session.revision
        session.see(answer.outputs, again=True)

    async def open(self, name: str, do: Do) -> None:
        size = 1 + do.number % 2
        if self.model.version_of(do.ref) is None:
            with pytest.raises(ServerError):
                await self.at.engine.open_session(do.ref, session_id=name, batch_size=size)
            return
        opened = await self.at.engine.open_session(do.ref, session_id=name, batch_size=size)
        session = self.model.open(name, do.ref, size)
        assert not opened.resumed
        assert (opened.session.version, opened.session.is_pinned) == (session.version, session.is_pinned)

    async def export_and_import(self, name: str, new: str) -> None:
        model, session = self.model, self.model.sessions[name]
        if session.version not in model.loaded:
            return
        (record,) = await self.at.engine.export_sessions([name], deadline=float("inf"))
        assert not isinstance(record, ServerError), record
        arriving = SessionRecord(new, name, bytes(record))
        (result,) = await self.at.engine.import_sessions([arriving], ExistingPolicy.REPLACE)
        assert isinstance(result, ImportOutcome), result
        twin = session.copy()
        # it goes to the version with its weights, of which there may be two
        equal = [v for v in model.loaded if PROGRAMS[v] is PROGRAMS[session.version]]
        twin.version = model.default if model.default in equal else min(equal)
        twin.is_anew = False
        model.sessions[new] = twin
        model.first.pop(new, None)

    async def load(self, version: int) -> None:
        if version in self.model.loaded:
            await self.refused(
                self.at.engine.load_version("plain", version, PROGRAMS[version]), "VersionExists"
            )
            return
        await self.at.engine.load_version("plain", version, PROGRAMS[version], source=f"{version}.keras")
        self.fix_costs()
        self.model.load(version)

    async def refused(self, call: Any, why: str) -> None:
        with pytest.raises(ServerError) as error:
            await call
        assert type(error.value).__name__ == why, error.value

    def moving(self, do: Do) -> Any:
        migration = ("to_wide" if is_wide(do.version) else "to_plain") if do.how == "migrate" else ""
        return self.at.engine.set_default("plain", do.version, SessionPolicy(do.how), migration)

    async def set_default(self, do: Do) -> None:
        model = self.model
        if not model.loaded:
            await self.refused(self.moving(do), self.no_model)
            return
        why = model.why_not_default(do.version, do.how)
        if why:
            await self.refused(self.moving(do), why)
            return
        previous, movers = model.previous, model.movers()
        moved = await self.moving(do)
        assert moved.previous == previous
        assert moved.sessions <= len(movers)
        model.set_default(do.version, do.how)

    async def set_default_under_way(self, do: Do) -> None:
        """Steps are under way, and others wait, when the default moves."""
        model = self.model
        if not model.loaded or model.why_not_default(do.version, do.how) or model.previous == do.version:
            return
        names = [n for n in do.names[:2] if n in model.sessions and not self.why_not(model.sessions[n])]
        sent: dict[str, list[tuple[SentChange, Any]]] = {name: [] for name in names}
        if self.shape.threads and names:
            self.at.hooks.close_gate()
        for _ in range(2):
            for name in names:
                sent[name].append(self.send(name, 3))
        task = await start_task(self.moving(do))
        for name in names:
            sent[name].append(self.send(name, 1))
        others = [name for name in NAMES if name not in names]
        born = next((name for name in others if name not in model.sessions), "") if do.number % 2 else ""
        if not model.version_of("plain"):
            born = ""
        dies = next((name for name in others if name in model.sessions), "") if do.number % 3 else ""
        opening = await start_task(self.at.engine.open_session("plain", session_id=born)) if born else None
        closing = await start_task(self.at.engine.close_session(dies)) if dies else None
        if do.flag:  # it is not known to have happened until the gate opens
            await asyncio.sleep(0)
        self.at.hooks.open_gate()
        for name in names:
            for _, answers in sent[name]:
                await answers.all()
        await asyncio.wait_for(task, WAIT_S)
        if closing is not None:
            await asyncio.wait_for(closing, WAIT_S)
            model.close(dies)
        if opening is not None:
            try:
                await asyncio.wait_for(opening, WAIT_S)
            except Overloaded:
                assert self.shape.resident_rows < _MANY
                born = ""
            else:
                await self.born(born, do)
        movers = model.movers()
        for name in names:
            self.follow(model.sessions[name], sent[name], do, moves=name in movers)
        model.set_default(do.version, do.how, but=[*names, born])

    async def born(self, name: str, do: Do) -> None:
        """A session was opened while the default moved: before that, and moved, or after it."""
        model = self.model
        was, is_kept = model.default, do.how == "keep"
        ways = []
        for version in (was, do.version):
            session = OneSession(1, version, False, [initial(version, 1)])
            if version == model.previous and not is_kept:
                session.move(do.how, do.version)
            ways.append(session)
        info = await self.at.engine.session_info(name)
        ways = [way for way in ways if way.version == info.version]
        assert ways, f"opened on {info.version}"
        session = ways[0]
        session.states = [state for way in ways for state in way.states]
        session.is_anew = any(way.is_anew for way in ways)
        session.revision = model.first.pop(name, 0)
        model.sessions[name] = session

    def send(self, name: str, steps: int) -> tuple[SentChange, Any]:
        said = self.said("step", self.model.sessions[name].batch_size, steps)
        return said, self.submit(name, said)

    def follow(
        self, session: OneSession, sent: Sequence[tuple[SentChange, Any]], do: Do, *, moves: bool
    ) -> None:
        """Hold against the model what was answered around a move: each step ran on the version that it says."""
        moves = moves and do.how != "keep"
        has_moved = not moves
        for said, answers in sent:
            (answer,) = answers.by_member.values()
            if isinstance(answer, Unavailable) and moves and do.how != "keep":
                why = (
                    "moved to version",
                    "is moving to version",
                    "moved to another version",
                    "belongs to version",
                )
                assert any(one in str(answer) for one in why), answer
                continue
            assert isinstance(answer, Answer), answer
            if not has_moved and answer.version == do.version:
                session.move(do.how, do.version)
                has_moved = True
            session.apply(said)
            self.agree(session, answer)
        if not has_moved:
            session.move(do.how, do.version)

    async def label(self, do: Do) -> None:
        version = 0 if do.flag and do.number == 0 else do.version
        call = self.at.engine.set_label("plain", "canary", version)
        if not self.model.loaded:
            await self.refused(call, self.no_model)
        elif version and version in self.model.loaded:
            await call
            self.model.labels["canary"] = version
        elif not version and "canary" in self.model.labels:
            await call
            del self.model.labels["canary"]
        else:
            await self.refused(call, "VersionNotFound")

    async def unload(self, do: Do) -> None:
        model, force = self.model, do.kind == "force"
        call = self.at.engine.unload_version("plain", do.version, force=force)
        if not model.loaded:
            await self.refused(call, self.no_model)
            return
        why = model.why_not_unload(do.version)
        if why == "VersionNotFound" or (why and not force):
            await self.refused(call, why)
            return
        await call
        model.unload(do.version)

    async def cut(self, do: Do) -> None:
        """The server is killed while the default moves, with steps before and behind it."""
        assert self.disk is not None
        model, store = self.model, self.disk.store
        if model.why_not_default(do.version, do.how) or model.previous == do.version:
            return
        names = [n for n in do.names[:3] if n in model.sessions and not self.why_not(model.sessions[n])]
        sent: dict[str, list[tuple[SentChange, Any]]] = {name: [] for name in names}
        store.stall(kept=do.flag)
        for name in names[:2]:
            sent[name].append(self.send(name, 2))
        task = await start_task(self.moving(do))
        for name in names[1:]:
            sent[name].append(self.send(name, 1))
        await stalled(store)
        acked = {n: sum(bool(answers.by_member) for _, answers in sent[n]) for n in names}
        previous, movers = model.previous, model.movers()
        assert not task.done()
        before = {name: session.copy() for name, session in model.sessions.items()}
        self.disk.kill()
        self.at.hooks.open_gate()
        store.release()
        await asyncio.gather(task, return_exceptions=True)
        for name in names:
            for _, answers in sent[name]:
                await answers.all()
        await self.stack.aclose()
        store.store.close()
        await self.begin(set(model.loaded))
        own = self.at.engine.catalogue()["plain"]
        now = own.wanted or own.default
        has_moved = now != previous
        assert now in {previous, do.version}
        model.restart(set(model.loaded))
        if has_moved:
            model.set_default(do.version, do.how)
        for name in names:
            info = await self.at.engine.session_info(name)
            done = info.revision - before[name].revision
            assert acked[name] <= done <= len(sent[name]), "a step is lost, or was made twice"
            moves = has_moved and name in movers and do.how != "keep"
            model.sessions[name] = self.found(
                before[name], [said for said, _ in sent[name][:done]], do, moves
            )
        await self.check()

    @staticmethod
    def found(before: OneSession, said: Sequence[SentChange], do: Do, moves: bool) -> OneSession:
        """What a session may be that made these steps, and moved somewhere between them if it did."""
        ways: list[OneSession] = []
        for at in range(len(said) + 1) if moves else [len(said)]:
            session = before.copy()
            for each in said[:at]:
                session.apply(each)
            if moves:
                session.move(do.how, do.version)
            for each in said[at:]:
                session.apply(each)
            ways.append(session)
        # they differ in what states and outputs may be, and where they restart
        one = ways[-1]
        one.states = [state for way in ways for state in way.states]
        one.outputs = [outputs for way in ways for outputs in way.outputs]
        one.is_anew = any(way.is_anew for way in ways)
        one.positions = {way.position for way in ways}
        return one

    # ---------------------------------------------------------------------------------------------------- what it is

    async def check(self) -> None:
        """Look at everything."""
        at, model = self.at, self.model
        await at.settled()
        own = at.engine.catalogue()["plain"]
        assert (set(own.loaded), own.default, own.wanted) == (model.loaded, model.default, model.wanted)
        assert own.labels == model.labels
        assert await at.internals.sessions_by_version("plain") == model.count()
        for name, session in model.sessions.items():
            if why := self.why_not(session):
                await self.refused(at.engine.get_state(name), why)
                continue
            info = await at.engine.session_info(name)
            assert (info.version, info.is_pinned) == (session.version, session.is_pinned), name
            assert (info.revision, info.batch_size) == (session.revision, session.batch_size)
            assert info.position in (session.positions or {session.position})
            session.position, session.positions = info.position, set()
            state = await at.state(name)
            kept = "wide" if is_wide(session.version) else "sum"
            assert any(same({kept: one}, state) for one in session.states), (name, state, session.states)


@pytest.fixture(
    params=[
        "memory",
        pytest.param("async", marks=pytest.mark.slow),
        pytest.param("sync", marks=pytest.mark.slow),
        "fake_shared",
    ]
)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    kind: str = request.param
    monkeypatch.setattr(changes, "MAX_KNOWN_VERSIONS", _MAX_KNOWN)
    yield kind
    STORES.kind = "memory"


async def play(kind: str, shape: Shape, program: Sequence[Do]) -> None:
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        STORES.kind, STORES.folder = kind, Path(folder)
        play = Play(kind, shape)
        async with play.stack:
            await play.begin({1})
            for action in program:
                await play.do(action)
            await play.end()


@SETTINGS
@given(shape=shapes, program=programs)
def test_versions_are_added_and_removed(kind: str, shape: Shape, program: list[Do]) -> None:
    asyncio.run(play(kind, shape, program))
