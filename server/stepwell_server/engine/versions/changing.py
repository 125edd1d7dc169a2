"""Versions come and go while the server runs, and the default moves, with the sessions that follow it.

A change is one document in the store, kept before anybody hears of it. What is in memory then follows between two turns
of the event loop, so that every session is wholly before the change or wholly after it, whenever the process ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping

import numpy as np

from stepwell_server.clock import Clock
from stepwell_server.core.history import How
from stepwell_server.core.model_names import LABEL_RULE, MAX_VERSION, ModelRef, is_label, is_name, is_version
from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.api import Moved, SessionPolicy, VersionInfo
from stepwell_server.engine.durability.forwarding import Forwarding
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.models import Known, Models, Versions
from stepwell_server.engine.sessions.closing import Closing
from stepwell_server.engine.sessions.ending import Removal
from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.versions import document
from stepwell_server.engine.versions.needed import Seen, stored
from stepwell_server.engine.versions.serving import Serving
from stepwell_server.errors import (
    InvalidInput,
    MigrationFailed,
    ModelInUse,
    ServerError,
    SessionGone,
    SpecsDiffer,
    Unavailable,
    VersionExists,
    VersionNotFound,
)
from stepwell_server.logs import Log
from stepwell_server.program import Program
from stepwell_server.store.base import Batch, Committed, Store

_log = Log("engine.versions")
#: Sessions on whose states a migration is tried before anything changes.
_TRIED = 1024
#: With more moves or versions than this, those are looked for that no session makes or is on any more.
MANY_MOVES = 64
#: Sessions that are put away before others get a turn.
_AT_ONCE = 250


class Changing:
    """Loads, unloads and chooses versions. Lives on the event loop; one change of a name at a time."""

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        serving: Serving,
        forwarding: Forwarding,
        pager: Pager,
        turns: Turns,
        closing: Closing,
        removal: Removal,
        commits: GroupCommit,
        store: Store,
        others: Store | None,
        *,
        drain: Callable[[], None],
        clock: Clock,
    ) -> None:
        """`others` is the store if it may have sessions that are not in the table; `drain` empties the inboxes."""
        self._table = table
        self._models = models
        self._serving = serving
        self._forwarding = forwarding
        self._pager = pager
        self._turns = turns
        self._closing = closing
        self._removal = removal
        self._commits = commits
        self._store = store
        self._others = others
        self._drain = drain
        self._clock = clock
        self._locks: dict[str, asyncio.Lock] = {}
        self._late: dict[int, tuple[int, Model, How]] = {}
        """Sessions that leave for another version when their claims end: births, where they go and how."""
        self._none_late = asyncio.Event()
        self._pruning: set[asyncio.Task[None]] = set()
        self._needed: dict[str, int] = {}
        """Moves or versions, whichever were more, that were still needed when that was last looked at."""

    def begin_with(self, ref: ModelRef, program: Program) -> None:
        """Serve a version from the start, before there are sessions; the highest of a name is its default."""
        version = ref.version or 1
        own = self._models.versions(ref.name)
        known = Known(version, program.fingerprint, Layout.of(program), "", self._clock.now())
        model = self._serving.make(ref.name, version, program, self._sibling(own, program))
        self._models.add(model, known)
        own.default = max(own.loaded)
        self._mark(own)
        self._serving.observer.model_served(ref.name, program)

    async def restore(self) -> None:
        """Know what the store has of versions. Before anything is served.

        Raises:
            DocumentError: it cannot be read.
            Unavailable: the store cannot be asked.
        """
        for name, content in (await self._store.documents(document.PREFIX)).items():
            model = name.removeprefix(document.PREFIX)
            own = self._models.versions(model)
            own.go_on_from(document.decode(model, content))
            self._mark(own, own.loaded.values())

    async def load(
        self, name: str, version: int, program: Program, *, source: str = "", tenant: str = "", rows: int = 0
    ) -> None:
        """Serve a version from now on; the first of a name is its default.

        Raises:
            InvalidInput: name or number are none.
            VersionExists: there is one of that number.
            Overloaded: there is no memory for it.
            Unavailable: the store could not be told; it is not served.
        """
        _require_name(name)
        if not is_version(version):
            raise InvalidInput(f"version must be 1 to {MAX_VERSION}; got {version}")
        async with self._lock(name):
            own = self._models.versions(name)
            known = Known(version, program.fingerprint, Layout.of(program), source, self._clock.now(), tenant)
            if version in own.known:  # before a restart, or before it was unloaded
                known = dataclasses.replace(known, is_leaving=own.known[version].is_leaving)
            self._require_new(own, known)
            model = self._serving.make(name, version, program, self._sibling(own, program), rows)
            await self._serving.warm_up(model)
            after = dataclasses.replace(own, loaded=dict(own.loaded), known={**own.known, version: known})
            after.highest = max(own.highest, version)
            if not own.default:
                after.default = version
                after.wanted = own.wanted if own.wanted != version else 0

            def served() -> None:
                self._models.add(model, known)
                self._mark(own, [model])
                self._serving.observer.model_served(name, program)

            await self._keep(own, after, served)

    async def unload(self, name: str, version: int, *, force: bool = False) -> None:
        """Serve a version no longer, once what is under way on it has ended.

        Its sessions stay in the store, where there is one that keeps them, and fail until it is loaded again.

        Raises:
            ModelNotFound, VersionNotFound: it is not loaded.
            ModelInUse: it has sessions, or it is the default and others are loaded, and `force` is not said.
            Unavailable: the store could not be told; it is served as before.
        """
        async with self._lock(name):
            own = self._models.named(name)
            model = own.require(version)
            if not force:
                sessions = (await self.sessions(name)).get(version, 0)
                if own.default == version and len(own.loaded) > 1:
                    raise ModelInUse(
                        f"version to unload must not be the default of model {name!r}; got {version}: make another one"
                        " the default, or say force",
                        model=name,
                    )
                if sessions:
                    raise ModelInUse(
                        f"version {version} of model {name!r} must have no sessions to be unloaded; it has {sessions}:"
                        " close them, move them, or say force",
                        model=name,
                    )
            known = dataclasses.replace(own.known[version], is_wanted=False, is_leaving=False)
            after = dataclasses.replace(own, known={**own.known, version: known})
            after.labels = {label: at for label, at in own.labels.items() if at != version}
            is_default = own.default == version
            if is_default:
                after.wanted = max(own.loaded.keys() - {version}, default=0)
                await self._all_left()  # what is late for another version must not be early for the name

            def unknown() -> None:
                own.known[version], own.labels = known, after.labels
                self._models.retire(model)
                if is_default:
                    own.wanted = 0 if own.loaded else version
                if is_default and own.loaded:
                    self._mark(own, [own.loaded[own.default]])

            await self._keep(own, after, unknown)
            await self._empty(model)
            self._models.forget(model)
            await self._serving.end(model)

    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        leaves: bool | None = None,
    ) -> Moved:
        """Let the name stand for another version from now on, and the sessions that follow it do what the policy says.

        With `leaves` the previous one is said to drain; None: as `KEEP` does.

        Raises:
            ModelNotFound, VersionNotFound: it is not loaded.
            SpecsDiffer: its states or outputs are others, and sessions are to be carried.
            MigrationFailed: there is no such function, or it failed on states that there are.
            Unavailable: the store could not be told; nothing changed.
        """
        async with self._lock(name):
            own = self._models.named(name)
            target = own.require(version)
            previous = own.wanted or own.default
            if previous == version:
                return Moved(previous, 0)
            how = None if policy is SessionPolicy.KEEP else How(policy.value)
            function = await self._require_possible(own, previous, target, how, migration)
            after = dataclasses.replace(own)
            after.default, after.wanted = version, 0
            after.known = own.known_after(previous, version, leaves=how is None if leaves is None else leaves)
            await self._all_left()  # what is late for the last change must not be early for this one
            self._mark(own, own.loaded.values())
            if how is not None:
                after.history = own.history.with_move(previous, version, how, function)
            moved = 0

            def switch() -> None:
                nonlocal moved
                self._drain()  # what came before this is under way on the version where it was sent
                own.default, own.wanted, own.history = after.default, 0, after.history
                own.known = after.known
                if how is not None:
                    moved = self._move(own, previous, target, how)
                self._mark(own, [each for v, each in own.loaded.items() if v != previous or not self._late])

            await self._keep(own, after, switch)
            _log.info(
                "the default of a model is another version", model=name, version=version, previous=previous
            )
            self._prune_if_due(own)
            return Moved(previous, moved)

    async def set_label(self, name: str, label: str, version: int) -> None:
        """Let a label stand for a loaded version, or, with version 0, for none.

        Raises:
            InvalidInput: the label breaks the rule.
            ModelNotFound, VersionNotFound: there is no such version, or no such label to take away.
            Unavailable: the store could not be told; nothing changed.
        """
        if not is_label(label):
            raise InvalidInput(f"label must be {LABEL_RULE}; got {label!r}")
        async with self._lock(name):
            own = self._models.named(name)
            labels = dict(own.labels)
            if version:
                own.require(version)
                labels[label] = version
            elif labels.pop(label, None) is None:
                raise VersionNotFound(
                    f"label to take away must be one of model {name!r}, {sorted(own.labels)}; got {label!r}",
                    model=name,
                )

            def change() -> None:
                own.labels = labels

            await self._keep(own, dataclasses.replace(own, labels=labels), change)

    def next_version(self, name: str) -> int:
        """One more than the highest number that a version of a name ever had."""
        _require_name(name)
        return self._models.versions(name).highest + 1

    def catalogue(self) -> Mapping[str, Versions]:
        """What is known of all names, loaded or not."""
        return {own.name: own for own in self._models.all() if own.known}

    def describe(self, own: Versions) -> list[VersionInfo]:
        """The versions of a model that are loaded."""
        found: list[VersionInfo] = []
        for version, model in sorted(own.loaded.items()):
            known, sessions = own.known[version], self._table.count(model.index)
            labels = sorted(label for label, at in own.labels.items() if at == version)
            is_default = version == own.default
            found.append(
                VersionInfo(
                    version,
                    known.fingerprint,
                    is_default,
                    labels,
                    sessions,
                    known.source,
                    known.loaded,
                    is_draining=known.is_leaving and not is_default and not labels,
                )
            )
        return found

    async def sessions(self, name: str) -> dict[int, int]:
        """How many sessions are on each version of a name now, in memory or in the store alone."""
        own, found = self._models.versions(name), Counter[int]()
        for version, model in own.loaded.items():
            found[version] += self._table.count(model.index)
        async for version, epoch, is_pinned in self._stored(own):
            found[version if is_pinned else own.history.way(version, epoch)[0]] += 1
        return {version: count for version, count in found.items() if count}

    async def close(self) -> None:
        """Stop looking for moves that nobody makes."""
        for task in self._pruning:
            task.cancel()
        await asyncio.gather(*self._pruning, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------ what is possible

    @staticmethod
    def _require_new(own: Versions, known: Known) -> None:
        version, before = known.version, own.known.get(known.version)
        if version in own.loaded:
            raise VersionExists(
                f"version of model {own.name!r} must be new; {version} is loaded: load it as {own.highest + 1}",
                model=own.name,
            )
        if (
            before is not None
            and before.fingerprint != known.fingerprint
            and version in own.history.versions()
        ):
            raise VersionExists(
                f"version of model {own.name!r} must be new; {version} had other weights, which sessions may still have:"
                f" load it as {own.highest + 1}",
                model=own.name,
            )

    async def _require_possible(
        self, own: Versions, previous: int, target: Model, how: How | None, migration: str
    ) -> str:
        """Find out before anything changes whether sessions can go to a version; returns what migrates them."""
        known = own.known.get(previous)
        if how is None or known is None:
            return ""
        if how is How.CARRY:
            differences = known.layout.differences(Layout.of(target.program))
            if differences:
                raise SpecsDiffer(
                    f"sessions can be carried from version {previous} of model {own.name!r} to {target.version} only if"
                    f" states and outputs are equal; {'; '.join(differences)}. Say sessions=migrate, reset or keep",
                    model=own.name,
                )
        if how is not How.MIGRATE:
            return ""
        names = sorted(self._forwarding.migrations)
        if not migration and len(names) == 1:
            (migration,) = names
        if migration not in names:
            raise MigrationFailed(
                f"migration must be one that the server was started with (--migration), {names}; got {migration!r}",
                model=own.name,
            )
        source = own.loaded.get(previous)
        if source is not None:
            await self._try_migration(migration, source, target)
        return migration

    async def _try_migration(self, function: str, source: Model, target: Model) -> None:
        table = self._table
        on_it = np.flatnonzero(table.model[: table.end] == source.index)
        free = on_it[(table.row[on_it] >= 0) & ~table.claimed[on_it] & ~table.pinned[on_it]][:_TRIED]
        arrays = [np.asarray(value)[None] for value in source.program.initial]
        if len(free):
            arrays = list(source.arena.read(table.rows_of(free)))
        named = {spec.name: array for spec, array in zip(source.program.state, arrays, strict=True)}
        rows = len(arrays[0]) if arrays else 0
        await asyncio.to_thread(self._forwarding.migrated, function, named, target.program.state, rows)

    # ---------------------------------------------------------------------------------------------------- making it so

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _keep(self, before: Versions, after: Versions, then: Callable[[], None]) -> None:
        """Have the store keep what is to be; `then` makes it so, also if the caller is cancelled meanwhile."""
        content = document.encode(after)
        if content == document.encode(before):
            then()
            return
        kept: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()
        batch = Batch(documents=[(document.name_of(before.name), content)])

        def done(committed: Committed | ServerError) -> None:
            error = committed if isinstance(committed, ServerError) else None
            if error is None:
                then()
            kept.set_result(error)

        self._commits.submit(lambda: batch, 1, done)
        error = await asyncio.shield(kept)
        if error is not None:
            raise error

    def _sibling(self, own: Versions, program: Program) -> Model | None:
        """A version that is loaded whose rows are rows of a program too."""
        layout = Layout.of(program)
        return next(
            (model for version, model in own.loaded.items() if own.known[version].layout == layout), None
        )

    @staticmethod
    def _mark(own: Versions, models: Collection[Model] = ()) -> None:
        """Let records say that their sessions have made all moves: those of some versions."""
        for model in models:
            model.epoch = own.history.epoch
        for version, model in own.loaded.items():
            model.is_plain = own.version_with(model.program.fingerprint) == version

    def _move(self, own: Versions, previous: int, target: Model, how: How) -> int:
        """Let the sessions in memory that follow the default go to another version; how many they are."""
        source, table = own.loaded.get(previous), self._table
        if source is None:
            return 0
        source.left_epoch = source.epoch
        handles = np.flatnonzero(table.model[: table.end] == source.index)
        handles = handles[~table.pinned[handles]]
        if how is How.CARRY and source.arena is target.arena:
            # what is under way goes on as it began, and what it makes is a state of the new version too
            table.model[handles] = target.index
            return len(handles)
        busy = table.claimed[handles]
        self._leave(handles[~busy], target, how)
        for handle in handles[busy].tolist():
            self._late[handle] = int(table.birth[handle]), target, how
        if self._late:
            self._turns.leave_when_free = self._leave_late
        return len(handles)

    def follow(self, handles: Handles, source: Model, epoch: int) -> None:
        """Let sessions make the moves since an epoch, which began on a version then and are in the table only now."""
        own = self._models.versions(source.name)
        version, way = own.history.way(source.version, epoch)
        target = own.loaded.get(version)
        if not way or target is None:
            return
        hows = {move.how for move in way}
        if hows == {How.CARRY} and source.arena is target.arena:
            self._table.model[handles] = target.index
            return
        now, source.epoch = source.epoch, epoch  # records that are written here are of that time
        self._leave(handles, target, How.RESET if How.RESET in hows else How.MIGRATE)
        source.epoch = now

    async def _all_left(self) -> None:
        while self._late:
            self._none_late.clear()
            await self._none_late.wait()

    def _leave(self, handles: Handles, target: Model, how: How) -> None:
        """Let sessions go to a version: when their states are needed they come as its own."""
        here = handles[self._table.row[handles] >= 0]
        if len(here):
            self._pager.page_out(here)
        self._table.model[handles] = target.index
        if how is How.RESET:
            self._table.position[handles] = 0

    def _leave_late(self, handles: Handles) -> None:
        """Let those of some sessions go whose claims end now; what waited for them is to be sent again."""
        for handle in handles.tolist():
            if (late := self._late.pop(handle, None)) is None:
                continue
            birth, target, how = late
            if self._table.birth[handle] != birth:
                continue
            self._leave(np.array([handle]), target, how)
            session_id = self._table.session_id(handle)
            moved = Unavailable(
                f"session {session_id!r} went to version {target.version} of model {target.name!r} while this waited;"
                " it was not applied: send it again"
            )
            self._turns.close_line(handle, moved)
        if not self._late:
            self._turns.leave_when_free = None
            self._none_late.set()

    async def _empty(self, model: Model) -> None:
        """Have no session in the table on a version that is served no longer."""
        await self._serving.idle(model)
        table = self._table
        while len(handles := np.flatnonzero(table.model[: table.end] == model.index)):
            ids = [table.session_id(handle) for handle in handles[:_AT_ONCE].tolist()]
            if self._others is None:
                await self._closing.close_many(ids)  # nothing but the table has them
            else:
                for session_id in ids:
                    await self._put_away(session_id, model)
            await asyncio.sleep(0)

    async def _put_away(self, session_id: str, model: Model) -> None:
        """Let the store alone have a session."""
        handle = self._table.find(session_id)
        if handle is None or self._table.model[handle] != model.index:
            return
        try:
            await self._turns.hold(handle, float("inf"), rows=False)
        except SessionGone:
            return
        gone = VersionNotFound(
            f"session {session_id!r} is on version {model.version} of model {model.name!r}, which was unloaded",
            model=model.name,
        )
        self._removal.forget(handle, gone)

    # ------------------------------------------------------------------------------------------------------ old moves

    def _prune_if_due(self, own: Versions) -> None:
        many = max(MANY_MOVES, 2 * self._needed.get(own.name, 0))
        if max(len(own.history.moves), len(own.known)) > many and not self._pruning:
            task = asyncio.create_task(self.prune(own.name))
            self._pruning.add(task)
            task.add_done_callback(self._pruning.discard)

    async def prune(self, name: str) -> None:
        """Forget the moves that no session makes any more, and the versions that only they tell of."""
        own = self._models.versions(name)
        epoch = own.history.epoch
        seen = Seen({(version, at) for version in own.loaded for at in (0, epoch - 1, epoch)})
        try:
            async for version, of_epoch, is_pinned in self._stored(own, all_of_them=True):
                seen.add(version, of_epoch, is_pinned=is_pinned)
            async with self._lock(name):
                # what was under way while the records were read may say any of these
                seen.moving |= {(version, at) for version in own.loaded for at in (0, epoch - 1, epoch)}
                after = dataclasses.replace(own, **seen.needed(own, epoch))
                self._needed[name] = max(len(after.history.moves), len(after.known))

                def forget() -> None:
                    own.history, own.known = after.history, after.known

                await self._keep(own, after, forget)
        except ServerError as error:
            _log.warning("old moves of a model's sessions could not be looked for", model=name, error=error)

    async def _stored(
        self, own: Versions, *, all_of_them: bool = False
    ) -> AsyncIterator[tuple[int, int, bool]]:
        """Versions, epochs and whether they are pinned, of records whose sessions are not in the table; or of all."""
        if self._others is None:
            return
        async for session_id, version, mark in stored(self._others, own):
            if all_of_them or session_id not in self._table:
                yield version, 0 if mark is None else mark.epoch, mark is not None and mark.is_pinned


def _require_name(name: str) -> None:
    if not is_name(name):
        raise InvalidInput(f"name of a model must be 1 to 128 letters, digits, _, - or .; got {name!r}")
