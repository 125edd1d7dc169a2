"""Loads and unloads versions while the server runs, and moves the default with the sessions that follow it.

A change is one document, committed to the store before anyone else can see it. Memory is then updated between two
iterations of the event loop. So every session is entirely before or entirely after the change, even if the process
is killed. If another server was faster, the change is judged again by the new document.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from stepwell_server.core.model_names import LABEL_RULE, MAX_VERSION, is_label, is_name, is_version
from stepwell_server.engine.api import DefaultChange, DefaultMove, SessionPolicy, VersionInfo
from stepwell_server.engine.catalog.documents import Documents, Proposal
from stepwell_server.engine.catalog.runtimes import Runtimes
from stepwell_server.engine.catalog.session_moves import SessionMoves
from stepwell_server.engine.sessions.directory import Context
from stepwell_server.engine.state.fields import mark_of
from stepwell_server.engine.state.layout import Layout
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.versions import document
from stepwell_server.engine.versions.compatibility import as_served, refusal
from stepwell_server.engine.versions.history import MoveKind
from stepwell_server.engine.versions.record_upgrade import RecordUpgrader
from stepwell_server.engine.versions.registry import KnownVersion, Models, Versions
from stepwell_server.errors import (
    InvalidInput,
    MigrationFailed,
    ModelInUse,
    ServerError,
    SessionGone,
    SpecsDiffer,
    Unavailable,
    VersionElsewhere,
    VersionExists,
    VersionNotFound,
)
from stepwell_server.program import FINGERPRINT_DIGITS, Program
from stepwell_server.store.base import Store
from stepwell_server.store.record import header_or_none

#: Sessions on whose states a migration is tested before anything changes.
_TRIAL_SESSIONS = 1024
#: Sessions that are evicted or counted in one batch; other work runs between batches.
_BATCH_SIZE = 250
#: An unload forgets unneeded versions if there are more than this.
MAX_KNOWN_VERSIONS = 64


class Changes:
    """Loads, unloads and selects versions. Lives on the event loop; one change of a name at a time."""

    def __init__(
        self,
        context: Context,
        models: Models,
        serving: Runtimes,
        switching: SessionMoves,
        documents: Documents,
        forwarding: RecordUpgrader,
        store: Store,
    ) -> None:
        self._context = context
        self._table = context.table
        self._models = models
        self._serving = serving
        self._forwarding = forwarding
        self._store = store
        self._switching = switching
        self._documents = documents

    def begin_with(self, name: str, version: int, program: Program) -> None:
        """Add a version to serve once `restore` has read the store. The highest version of a name is its default.

        Raises:
            MemoryError: its rows do not fit into memory.
        """
        own = self._models.versions(name)
        program = as_served(own, version, program)
        known = KnownVersion.of(version, program, "", self._context.clock.now())
        model = self._serving.make(name, version, program, self._sibling(own, program))
        self._models.add(model, known)
        own.default = max(own.loaded)
        self._serving.observer.model_served(name, program)

    async def restore(self) -> None:
        """Read the store's versions, and publish the loaded ones, before anything is served.

        Raises:
            DocumentError: a document cannot be read, or other servers know a version by another file.
            Unavailable: the store cannot be asked.
        """
        for name, stored in (await self._documents.read()).items():
            own = self._models.versions(name)
            await self._restore_names(own, stored)
            if own.elsewhere:
                _require_same(own, stored)
                own.take(stored)
            else:
                own.replace_files(stored)
            self._switching.mark(own, own.loaded.values())
        for own in self._models.served():
            if own.elsewhere:
                await self._publish(own)

    async def _restore_names(self, own: Versions, stored: Versions) -> None:
        """Keep the tensor names that versions had before, since their sessions' records use them."""
        for version, model in list(own.loaded.items()):
            program = as_served(stored, version, model.program)
            if program.names == model.program.names:
                continue
            self._models.retire(model)
            self._models.forget(model)
            await self._serving.end(model)
            again = self._serving.make(own.name, version, program, self._sibling(own, program))
            self._models.add(again, KnownVersion.of(version, program, "", self._context.clock.now()))
        own.default = max(own.loaded, default=0)

    async def _publish(self, own: Versions) -> None:
        """Publish the versions that this server starts with; the first server to do so sets the default."""

        async def attempt() -> Proposal:
            stored = self._documents.last_read(own.name)
            if stored is not None:
                _require_same(own, stored)
            known = {} if stored is None else stored.known
            if all(version in known and known[version].is_wanted for version in own.loaded):
                return None
            wanted = {v: dataclasses.replace(own.known[v], is_wanted=True) for v in own.loaded}
            after = own.changed(known={**own.known, **wanted})

            def published() -> None:
                own.known = after.known

            return after, published

        async with self._documents.lock(own.name):
            await self._documents.propose(own, attempt, even_if_unchanged=True)

    async def load(
        self,
        name: str,
        version: int,
        program: Program,
        *,
        source: str = "",
        tenant: str = "",
        rows: int = 0,
        labels: Sequence[str] = (),
        becomes: DefaultChange | None = None,
        begin: Callable[[], None] = lambda: None,
    ) -> DefaultMove:
        """Load a version with its labels, and make it the default if requested: everything or nothing.

        The first version of a name becomes its default.

        Args:
            name: The model's name.
            version: The version's number.
            program: The program to run.
            source: The file it came from.
            tenant: The tenant whose admin loads it.
            rows: Rows that its sessions keep in memory; 0: the engine's setting.
            labels: Labels to put on it.
            becomes: How it becomes the default; None: it does not.
            begin: Called when the version is ready, before anything changes. If it raises, the load fails.

        Returns:
            The previous default, if it moved, and how many sessions in memory moved with it; otherwise zeros.

        Raises:
            InvalidInput: name or number break a rule.
            VersionExists: a version of that number exists.
            SpecsDiffer, MigrationFailed: sessions cannot move to it.
            MemoryError: its rows do not fit into memory.
            Unavailable: the store did not keep the change.
        """
        _require_name(name)
        if not is_version(version):
            raise InvalidInput(f"version must be 1 to {MAX_VERSION}; got {version}")
        async with self._documents.lock(name):
            own = self._models.versions(name)
            program = as_served(own, version, program)
            here = KnownVersion.of(version, program, source, self._context.clock.now(), tenant)
            self._require_new(own, here)
            model = self._serving.make(name, version, program, self._sibling(own, program), rows)
            moved = DefaultMove(0, 0)

            async def attempt() -> Proposal:
                self._require_new(own, here)
                known = _loaded_again(own, here)
                after = own.changed(
                    known={**own.known, version: known},
                    highest=max(own.highest, version),
                    labels={**own.labels, **dict.fromkeys(labels, version)},
                )
                previous, how = 0, None
                if not own.default:
                    after.default = version
                    after.wanted = own.wanted if own.wanted != version else 0
                elif becomes is not None:
                    previous, how = await self._choose(own, after, program, becomes)

                def serve() -> None:
                    nonlocal moved
                    self._models.add(model, known)
                    self._switching.mark(own, [model])
                    own.labels = after.labels
                    self._serving.observer.model_served(name, program)
                    if previous:
                        moved = DefaultMove(previous, self._switching.move_default(own, after, how))

                return after, serve

            try:
                await self._serving.warm_up(model)
                begin()
                await self._documents.propose(own, attempt)
            except ServerError:
                await self._serving.end(model)
                model.sharing.discard(model.index)
                raise
            return moved

    async def unload(
        self,
        name: str,
        version: int,
        *,
        force: bool = False,
    ) -> None:
        """Unload a version once its active work has ended.

        Its sessions stay in the store, if it keeps them, and fail until the version is loaded again.

        Args:
            name: The model's name.
            version: The version to unload.
            force: Unload it even if it has sessions, or is the default while others are loaded.

        Raises:
            ModelNotFound, VersionNotFound: it is not loaded.
            ModelInUse: it has sessions, or is the default while others are loaded, and `force` is False.
            Unavailable: the store did not keep the change; it is served as before.
        """
        async with self._documents.lock(name):
            own = self._models.named(name)
            model = own.require(version)

            async def attempt() -> Proposal:
                used = None if force else await self._require_unused(own, version)
                left = dataclasses.replace(own.known[version], is_wanted=False, is_leaving=False)
                after, is_default = own.changed(known={**own.known, version: left}), own.default == version
                moves = (
                    is_default and not own.wanted
                )  # otherwise it substitutes for the default, which stays what it is
                if not own.elsewhere:  # no server has it loaded any more
                    after.labels = {label: at for label, at in own.labels.items() if at != version}
                    if moves:
                        after.wanted = max(own.loaded.keys() - {version}, default=0)
                if is_default:
                    # sessions still moving to another version must not act as early for the name
                    await self._switching.wait_until_moved()

                if used is not None and len(after.known) > MAX_KNOWN_VERSIONS:
                    after.forget_unused(used)

                def unloaded() -> None:
                    own.known, own.history, own.labels = after.known, after.history, after.labels
                    self._models.retire(model)
                    if moves:
                        own.wanted = 0 if after.wanted else version
                    if is_default and own.loaded:
                        self._switching.mark(own, [own.loaded[own.default]])

                return after, unloaded

            await self._documents.propose(own, attempt)
            await self._evict_all(model)
            self._models.forget(model)
            await self._serving.end(model)

    async def _require_unused(self, own: Versions, version: int) -> Collection[int]:
        """Refuse to unload a version in use; return the versions with sessions or records of sessions."""
        found = await self._count(own)
        if own.default == version and len(own.loaded) > 1:
            raise ModelInUse(
                f"version to unload must not be the default of model {own.name!r}; got {version}: make another one"
                " the default, or force it (--force, force=True)",
                model=own.name,
            )
        if sessions := found[version]:
            raise ModelInUse(
                f"version {version} of model {own.name!r} must have no sessions to be unloaded; it has {sessions}:"
                " close them, move them, or force it (--force, force=True)",
                model=own.name,
            )
        return found.keys()

    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        leaves: bool | None = None,
    ) -> DefaultMove:
        """Make another version the default, and move the sessions that follow it as the policy says.

        With `leaves`, the previous default is marked as draining; None: as `KEEP` does.

        Raises:
            ModelNotFound, VersionNotFound: it is not loaded.
            SpecsDiffer: sessions are to be carried, but states or outputs differ.
            MigrationFailed: the function does not exist, or failed on existing states.
            Unavailable: the store did not keep the change; nothing changed.
        """
        async with self._documents.lock(name):
            own = self._models.named(name)
            target = own.require(version)
            change, moved = DefaultChange(version, policy, migration, leaves), DefaultMove(version, 0)

            async def attempt() -> Proposal:
                nonlocal moved
                after = own.changed()
                previous, how = await self._choose(own, after, target.program, change)
                moved = DefaultMove(previous or version, 0)

                def switch() -> None:
                    nonlocal moved
                    moved = DefaultMove(previous, self._switching.move_default(own, after, how))

                return (after, switch) if previous else None

            await self._documents.propose(own, attempt)
            return moved

    async def _choose(
        self, own: Versions, after: Versions, program: Program, change: DefaultChange
    ) -> tuple[int, MoveKind | None]:
        """Set another default in `after`, which has this program.

        Returns:
            The previous default (0: unchanged), and what happens to the sessions that follow it; None: they stay.
        """
        previous, version = own.chosen, change.version
        if previous == version:
            return 0, None
        how = None if change.policy is SessionPolicy.KEEP else MoveKind(change.policy.value)
        function = await self._require_possible(own, previous, version, program, how, change.migration)
        leaves = how is None if change.leaves is None else change.leaves
        after.default, after.wanted = version, 0
        after.known = after.known_after(previous, version, leaves=leaves)
        # sessions still moving for the last change must not act as early for this one
        await self._switching.wait_until_moved()
        self._switching.mark(own, own.loaded.values())
        if how is not None:
            after.history = own.history.with_move(previous, version, how, function)
        return previous, how

    async def set_label(self, name: str, label: str, version: int) -> None:
        """Put a label on a loaded version, or remove it with version 0.

        Raises:
            InvalidInput: the label breaks the rule.
            ModelNotFound, VersionNotFound: the version, or the label to remove, does not exist.
            Unavailable: the store did not keep the change; nothing changed.
        """
        if not is_label(label):
            raise InvalidInput(f"label must be {LABEL_RULE}; got {label!r}")
        async with self._documents.lock(name):
            own = self._models.named(name)

            async def attempt() -> Proposal:
                labels = dict(own.labels)
                if version:
                    own.require(version)
                    labels[label] = version
                elif labels.pop(label, None) is None:
                    raise VersionNotFound(
                        f"label to remove must be one of model {name!r}, {sorted(own.labels)}; got {label!r}",
                        model=name,
                    )

                def change() -> None:
                    own.labels = labels

                return own.changed(labels=labels), change

            await self._documents.propose(own, attempt)

    def next_version(self, name: str) -> int:
        """One more than the highest version number that a name ever had."""
        _require_name(name)
        return self._models.versions(name).highest + 1

    def defaults_elsewhere(self) -> dict[str, int]:
        """Default versions that are not loaded here but may be on other servers of the store, by name."""
        return {own.name: own.meant for own in self._models.all() if own.meant not in {0, *own.loaded}}

    def catalogue(self) -> Mapping[str, Versions]:
        """All known names with their versions, loaded or not."""
        return {own.name: own for own in self._models.all() if own.known}

    def describe(self, own: Versions) -> list[VersionInfo]:
        """The loaded versions of a model."""
        found: list[VersionInfo] = []
        for version, model in sorted(own.loaded.items()):
            known, sessions = own.known[version], self._table.count(model.index)
            labels = sorted(label for label, at in own.labels.items() if at == version)
            is_default = version == own.meant
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
        """The number of sessions on each version of a name, in memory or only in the store."""
        found = await self._count(self._models.versions(name))
        return {version: count for version, count in found.items() if version > 0}

    async def _count(self, own: Versions) -> Counter[int]:
        """The sessions of each version; negative numbers stand for replaced files with records."""
        for model in list(own.loaded.values()):
            await self._context.directory.look(
                self._ids(model), reread=True
            )  # other servers may have changed them
        found = Counter(
            {v: count for v, model in own.loaded.items() if (count := self._table.count(model.index))}
        )
        after = ""
        while len(heads := await self._store.heads(after=after, limit=_BATCH_SIZE)):
            ids = [str(key, "utf-8", "replace") for key in heads.keys]
            after = ids[-1]
            ids = [
                i
                for i, model in zip(ids, heads.model.tolist(), strict=True)
                if heads.models[model] == own.name
            ]
            for session_id, each in zip(ids, await self._store.fetch(ids), strict=True):
                header = None if each.record is None else header_or_none(session_id, each.record)
                if header is None or header.model != own.name:
                    continue
                trace = own.trace(mark_of(header.fields), header.fingerprint)
                if trace is None:
                    continue
                if trace.version < 0:
                    found[trace.version] += 1
                if trace.now != trace.version or trace.now > 0:
                    found[trace.now] += session_id not in self._table
            await asyncio.sleep(0)
        return +found

    # ------------------------------------------------------------------------------------------------ what is possible

    def _require_new(self, own: Versions, known: KnownVersion) -> None:
        version, before = known.version, own.known.get(known.version)
        if version in own.loaded:
            raise VersionExists(
                f"version of model {own.name!r} must be new; {version} is loaded: load it as {own.highest + 1}",
                model=own.name,
            )
        if before is None:
            return
        if before.fingerprint != known.fingerprint and own.elsewhere:
            raise VersionExists(
                f"version of model {own.name!r} must be new, or that of the same file; {version} is another file on the"
                f" servers that share the store: load it as {own.highest + 1}",
                model=own.name,
            )
        if before.fingerprint != known.fingerprint and version in own.history.versions():
            raise VersionExists(
                f"version of model {own.name!r} must be new; {version} had other weights, which sessions may still have:"
                f" load it as {own.highest + 1}",
                model=own.name,
            )
        if before.fingerprint == known.fingerprint and before.names != known.names:
            raise Unavailable(
                f"version {version} of model {own.name!r} was loaded on another server at this moment, with other names"
                " of its tensors: load it again"
            )

    async def require_possible(
        self, name: str, version: int, program: Program, policy: SessionPolicy, migration: str = ""
    ) -> None:
        """Check whether a version that is not loaded yet could become the default: see `set_default`.

        Raises:
            SpecsDiffer, MigrationFailed: sessions cannot continue with it.
        """
        own = self._models.versions(name)
        if own.loaded and policy is not SessionPolicy.KEEP:
            program = as_served(own, version, program)
            previous = own.chosen
            await self._require_possible(own, previous, version, program, MoveKind(policy.value), migration)

    async def _require_possible(
        self,
        own: Versions,
        previous: int,
        version: int,
        program: Program,
        how: MoveKind | None,
        migration: str,
    ) -> str:
        """Check whether sessions can move to a version; return the name of the migration function."""
        if how is None or previous not in own.known:
            return ""
        if how is MoveKind.CARRY and (problem := refusal(own, previous, version, program)):
            raise SpecsDiffer(problem, model=own.name)
        if how is not MoveKind.MIGRATE:
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
            await self._try_migration(migration, source, program)
        return migration

    async def _try_migration(self, function: str, source: Model, target: Program) -> None:
        table = self._table
        on_it = np.flatnonzero(table.model[: table.end] == source.index)
        free = on_it[(table.row[on_it] >= 0) & ~table.claimed[on_it] & ~table.pinned[on_it]][:_TRIAL_SESSIONS]
        arrays = [np.asarray(value)[None] for value in source.program.initial]
        if len(free):
            arrays = list(source.arena.read(table.rows_of(free)))
        named = {spec.name: array for spec, array in zip(source.program.state, arrays, strict=True)}
        rows = len(arrays[0]) if arrays else 0
        await asyncio.to_thread(self._forwarding.migrated, function, named, target.state, rows)

    # ---------------------------------------------------------------------------------------------------- making it so

    def _sibling(self, own: Versions, program: Program) -> Model | None:
        """A loaded version whose rows have the layout of a program's rows."""
        layout = Layout.of(program)
        return next(
            (model for version, model in own.loaded.items() if own.known[version].layout == layout), None
        )

    async def _evict_all(self, model: Model) -> None:
        """Remove the sessions of an unloaded version from the table."""
        await self._serving.idle(model)
        while ids := self._ids(model)[:_BATCH_SIZE]:
            for session_id in ids:
                await self._evict(session_id, model)
            await asyncio.sleep(0)

    async def _evict(self, session_id: str, model: Model) -> None:
        """Page a session out, and remove it from the table."""
        handle = self._table.find(session_id)
        if handle is None or self._table.model[handle] != model.index:
            return
        try:
            await self._context.queues.hold(handle, float("inf"), rows=False)
        except (SessionGone, VersionElsewhere):
            return
        if self._table.row[handle] >= 0:
            self._context.pager.page_out(np.array([handle]))
        self._context.queues.forget(handle, self._switching.not_loaded(handle, model.name, model.version))

    def _ids(self, model: Model) -> list[str]:
        """Ids of a version's sessions in the table."""
        table = self._table
        return [
            table.session_id(handle)
            for handle in np.flatnonzero(table.model[: table.end] == model.index).tolist()
        ]


def _loaded_again(own: Versions, here: KnownVersion) -> KnownVersion:
    """The facts about a version loaded here, merged with those known before.

    Those are from before a restart or an unload, or from another server.
    """
    before = own.known.get(here.version)
    if before is None:
        return here
    here = dataclasses.replace(here, is_leaving=before.is_leaving)
    if before.fingerprint != here.fingerprint:
        return here
    return dataclasses.replace(here, source=here.source or before.source, tenant=here.tenant or before.tenant)


def _require_same(own: Versions, stored: Versions) -> None:
    """Refuse to serve a version that other servers know by another file.

    Raises:
        DocumentError: its fingerprint differs.
    """
    for version, model in own.loaded.items():
        known = stored.known.get(version)
        if known is not None and known.fingerprint != model.program.fingerprint:
            raise document.DocumentError(
                f"version {version} of model {own.name!r} must be the same file on all servers that share the store; its"
                f" fingerprint is {model.program.fingerprint[:FINGERPRINT_DIGITS]} here and"
                f" {known.fingerprint[:FINGERPRINT_DIGITS]} there. Serve another file as another version:"
                f" {own.name}@{stored.highest + 1}=PATH"
            )


def _require_name(name: str) -> None:
    if not is_name(name):
        raise InvalidInput(f"name of a model must be 1 to 128 letters, digits, _, - or .; got {name!r}")
