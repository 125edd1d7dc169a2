"""Several servers share a store, each hears of changes of versions when it looks, and may be stopped for as long as it likes.

Each session is held against all ways that it may have gone: it makes the moves of the default in their order, as many
of them as the server that steps it knows of, and never fewer than before.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell_server.engine.api import DefaultMove, SessionPolicy
from stepwell_server.engine.catalog import changes
from stepwell_server.errors import (
    RevisionConflict,
    ServerError,
    SessionNotFound,
    SpecsDiffer,
    Unavailable,
    VersionElsewhere,
    VersionExists,
)
from stepwell_server.store.memory import MemoryStore
from support.checks.model_of_versions import (
    PROGRAMS,
    OneSession,
    SentChange,
    initial,
    is_wide,
    to_plain,
    to_wide,
)
from support.engine.harness import Answer, Answers, Harness
from support.engine.versions import serving
from support.samples import examples
from support.stores.fake_shared_store import RemoteStore

SETTINGS = settings(max_examples=examples(160))
NAMES = "abcd"
SERVERS = 3
#: So few that unused versions are forgotten all the time.
_MAX_KNOWN = 3


@dataclasses.dataclass(frozen=True)
class Do:
    """One thing that is done. What each part means is up to it."""

    kind: str
    server: int
    name: str
    version: int
    how: str


actions = st.builds(
    Do,
    st.sampled_from(
        [*["step"] * 8, "open", "open", "pinned", "close", *["default"] * 4, *["load"] * 2, "unload", "look",
         "forget", "read", "stop", "stop", "wake", "restart"]
    ),
    st.integers(0, SERVERS - 1),
    st.sampled_from(NAMES),
    st.sampled_from([1, 2, 2, 4, 5, 3]),
    st.sampled_from(["carry", "carry", "carry", "reset", "migrate", "keep"]),
)  # fmt: skip
programs = st.lists(actions, min_size=20, max_size=70)


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of the default."""

    previous: int
    version: int
    how: str


@dataclasses.dataclass
class Way:
    """What a session may be: it has made the moves among so many changes."""

    changes: int
    session: OneSession


@dataclasses.dataclass
class Stopped:
    """A server that sent a step to the store and was stopped before it came there."""

    server: int
    name: str
    said: SentChange
    answers: Answers
    expected: int


class Play:
    """Does to the servers what a program says."""

    def __init__(self) -> None:
        self.shared = RemoteStore(MemoryStore())
        self.rng = np.random.default_rng(5)
        self.changes: list[Change] = []
        self.ways: dict[str, list[Way]] = {}
        self.first: dict[str, int] = {}
        self.files: dict[int, str] = {}
        self.servers: list[Harness] = []
        self.stacks: list[AsyncExitStack] = []
        self.loaded: list[set[int]] = [{1, 2} for _ in range(SERVERS)]
        self.knows = [0] * SERVERS
        """Of how many changes each has heard at least."""
        self.stopped: Stopped | None = None
        self.requests = 0

    @property
    def default(self) -> int:
        return self.changes[-1].version if self.changes else 1

    async def begin(self, server: int, versions: set[int]) -> None:
        store = self.shared.replica()
        store.is_told = False
        stack = AsyncExitStack()
        at = await stack.enter_async_context(
            serving(
                {f"plain@{version}": PROGRAMS[version] for version in versions},
                store=store,
                resident_rows=3,
                migrations={"to_wide": to_wide, "to_plain": to_plain},
                check=False,
            )
        )
        if server < len(self.servers):
            self.servers[server], self.stacks[server] = at, stack
        else:
            self.servers.append(at)
            self.stacks.append(stack)
        self.knows[server] = len(self.changes)

    async def all(self, program: Sequence[Do]) -> None:
        try:
            await self.begin(0, {1})  # the first to come says the default
            await self.servers[0].engine.load_version("plain", 2, PROGRAMS[2])
            for server in range(1, SERVERS):
                await self.begin(server, {1, 2})
            for do in program:
                await self.do(do)
            await self.wake()
            await self.check()
        finally:
            for at in self.servers:
                at.store.release()
            for stack in self.stacks:
                await stack.aclose()

    async def do(self, do: Do) -> None:
        if self.stopped is not None and do.server == self.stopped.server and do.kind != "wake":
            return
        at = self.servers[do.server]
        match do.kind:
            case "open" | "pinned" if do.name not in self.ways:
                await self.open(do)
            case "step" if do.name in self.ways:
                await self.step(do.server, do.name)
            case "close" if do.name in self.ways:
                try:
                    await at.engine.close_session(do.name)
                except Unavailable:  # it knew another one of the id, and does no more
                    await at.engine.close_session(do.name)
                self.first[do.name] = self.ways.pop(do.name)[0].session.revision + 1
            case "default":
                await self.move(do)
            case "load":
                await self.load(do.server, do.version)
            case "unload":
                await self.unload(do.server, do.version)
            case "look":
                await self.look(do.server)
            case "forget":
                await at.internals.forget_unused("plain")
            case "read" if do.name in self.ways:
                await self.read(do.server, do.name)
            case "stop" if do.name in self.ways and self.stopped is None:
                await self.stop(do.server, do.name)
            case "wake":
                await self.wake()
            case "restart":
                await self.stacks[do.server].aclose()
                await self.begin(do.server, self.loaded[do.server] or {self.default})
                self.loaded[do.server] = set(at_versions(self.servers[do.server]))

    async def look(self, server: int) -> None:
        await self.servers[server].internals.look()
        self.knows[server] = len(self.changes)

    # ----------------------------------------------------------------------------------------------------- sessions

    async def open(self, do: Do) -> None:
        at, ref = self.servers[do.server], "plain" if do.kind == "open" else f"plain@{do.version}"
        try:
            info = (await at.engine.open_session(ref, session_id=do.name)).session
        except VersionElsewhere:
            return
        except ServerError:
            if ref == "plain":
                raise
            return
        session = OneSession(1, info.version, do.kind == "pinned", [initial(info.version, 1)])
        session.revision = info.revision
        assert info.revision >= self.first.pop(do.name, 0)
        if do.kind == "pinned":
            assert info.version == do.version
        self.ways[do.name] = [
            Way(count, session.copy())
            for count in range(self.knows[do.server], len(self.changes) + 1)
            if do.kind == "pinned" or self.default_after(count) == info.version
        ]
        assert self.ways[do.name], "it was opened on what was never the default"

    def default_after(self, count: int) -> int:
        return self.changes[count - 1].version if count else 1

    def moved(self, way: Way, count: int) -> Way:
        """A way further, up to so many changes."""
        session = way.session.copy()
        for change in self.changes[way.changes : count]:
            if not session.is_pinned and session.version == change.previous and change.how != "keep":
                session.move(change.how, change.version)
        return Way(count, session)

    def possible(self, server: int, name: str) -> list[Way]:
        """Where a session may be when a server uses it."""
        return [
            self.moved(way, count)
            for way in self.ways[name]
            for count in range(max(way.changes, self.knows[server]), len(self.changes) + 1)
        ]

    async def step(self, server: int, name: str) -> None:
        said, expected = self.said(), self.ways[name][0].session.revision
        (answer,) = await self.submit(server, name, said, expected).all()
        if isinstance(answer, ServerError):
            # it has not heard yet, or has not what is needed; or it knew one that was closed and had the same id
            assert isinstance(answer, (VersionElsewhere, SessionNotFound)), answer
            await self.look(server)
            (answer,) = await self.submit(server, name, said, expected).all()
        self.settle(server, name, said, answer)

    def settle(self, server: int, name: str, said: SentChange, answer: Answer | ServerError) -> None:
        if isinstance(answer, ServerError):
            assert isinstance(answer, VersionElsewhere), answer
            needed = {way.session.version for way in self.possible(server, name)}
            assert not needed <= self.loaded[server], f"{answer} though {needed} are there"
            return
        self.ways[name] = self.those_that_fit(self.possible(server, name), said, answer)

    def those_that_fit(self, ways: Sequence[Way], said: SentChange, answer: Answer) -> list[Way]:
        found: dict[Any, Way] = {}
        for way in ways:
            session = way.session.copy()
            if session.version != answer.version:
                continue
            session.apply(said)
            if (answer.revision, answer.position) != (session.revision, session.position):
                continue
            try:
                session.see(answer.outputs)
            except AssertionError:
                continue
            states = tuple(sorted({state.tobytes() for state in session.states}))
            found[way.changes, session.version, session.position, states] = Way(way.changes, session)
        assert found, f"answered {answer}, may be {[(w.changes, w.session) for w in ways]}; {self.changes}"
        return list(found.values())

    def said(self) -> SentChange:
        self.requests += 1
        x = self.rng.standard_normal((1, 1, 2)).astype(np.float32)
        return SentChange("step", x, "ALL", False, self.requests)

    def submit(self, server: int, name: str, said: SentChange, expected: int) -> Answers:
        return self.servers[server].submit(name, said.x[:, 0], expected=expected, request_ids=said.request)

    async def read(self, server: int, name: str) -> None:
        """What is read is what was last answered, or what the moves since make of it."""
        ways = self.possible(server, name)
        try:
            read = await self.servers[server].engine.get_state(name)
        except VersionElsewhere:
            return
        (state,) = read.state.values()
        assert read.session.revision == self.ways[name][0].session.revision
        kept = [
            way
            for way in ways
            if way.session.version == read.session.version
            and any(np.array_equal(state, one) for one in way.session.states)
        ]
        assert kept, f"read {read}, may be {ways}"

    async def stop(self, server: int, name: str) -> None:
        """A server is stopped while the change of a session is on its way to the store."""
        store: RemoteStore = self.servers[server].store
        said, expected = self.said(), self.ways[name][0].session.revision
        count = len(store.asked("commit"))
        store.commits_held = True
        answers = self.submit(server, name, said, expected)
        asked = asyncio.ensure_future(store.until("commit", count + 1))
        ended = asyncio.ensure_future(answers.all())
        await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():  # it is refused without the store
            asked.cancel()
            store.release()
            (answer,) = ended.result()
            assert isinstance(answer, (VersionElsewhere, SessionNotFound)), answer
            return
        ended.cancel()
        self.stopped = Stopped(server, name, said, answers, expected)

    async def wake(self) -> None:
        stopped, self.stopped = self.stopped, None
        if stopped is None:
            return
        self.servers[stopped.server].store.release()
        (answer,) = await stopped.answers.all()
        await self.servers[stopped.server].settled()
        ways = self.ways.get(stopped.name)
        if isinstance(answer, ServerError):
            if ways is None or ways[0].session.revision != stopped.expected:
                assert isinstance(answer, (Unavailable, RevisionConflict, SessionNotFound)), answer
            else:
                assert isinstance(answer, Unavailable), answer
            return
        assert ways is not None, "it had ended"
        assert ways[0].session.revision == stopped.expected
        self.ways[stopped.name] = self.those_that_fit(
            self.possible(stopped.server, stopped.name), stopped.said, answer
        )

    # ----------------------------------------------------------------------------------------------------- versions

    async def load(self, server: int, version: int) -> None:
        at = self.servers[server]
        try:
            await at.engine.load_version("plain", version, PROGRAMS[version])
        except VersionExists:
            assert version in self.loaded[server]
            return
        self.loaded[server].add(version)

    async def unload(self, server: int, version: int) -> None:
        at = self.servers[server]
        if version in self.loaded[server] and len(self.loaded[server]) > 1:
            await at.engine.unload_version("plain", version, force=True)
            self.loaded[server].discard(version)

    async def move(self, do: Do) -> None:
        migration = ("to_wide" if is_wide(do.version) else "to_plain") if do.how == "migrate" else ""
        at = self.servers[do.server]
        before = self.default
        try:
            moved = await at.engine.set_default("plain", do.version, SessionPolicy(do.how), migration)
        except SpecsDiffer:
            assert do.how == "carry"
            assert is_wide(do.version) != is_wide(before)
            return
        except ServerError:
            if do.version in self.loaded[do.server]:
                raise
            return
        assert isinstance(moved, DefaultMove)
        assert moved.previous == before
        if before != do.version:
            self.changes.append(Change(before, do.version, do.how))
        self.knows[do.server] = len(self.changes)

    async def check(self) -> None:
        """When all have heard of everything they agree, and each session can be stepped where its version is."""
        for server in range(SERVERS):
            await self.look(server)
        for server, at in enumerate(self.servers):
            own = at.engine.catalogue()["plain"]
            assert (own.wanted or own.default) == self.default
            for name in self.ways:
                await self.step(server, name)


def at_versions(at: Harness) -> list[int]:
    return [model.version for model in at.internals.models]


@pytest.mark.slow
@SETTINGS
@given(program=programs)
def test_versions_over_servers(program: list[Do]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "MAX_KNOWN_VERSIONS", _MAX_KNOWN)
        asyncio.run(Play().all(program))
