"""The engine's interface: opens, steps, reads and closes sessions, independent of the transport."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from stepwell_server.clock import Clock
from stepwell_server.core.callers import ANYBODY, Caller
from stepwell_server.core.idle import IdleLimits, IdleWatch
from stepwell_server.core.scheduler import LoopQueue, Shares, Source
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import (
    DefaultChange,
    DefaultMove,
    ModelInfo,
    ModelStats,
    Observer,
    OnFailed,
    OpenManyResult,
    OpenResult,
    PredictResult,
    SessionFilter,
    SessionInfo,
    SessionPage,
    SessionPolicy,
    StateResult,
    StatesResult,
    StepBatch,
)
from stepwell_server.engine.catalog.changes import Changes
from stepwell_server.engine.catalog.documents import Documents
from stepwell_server.engine.catalog.runtimes import Capacity, Runtimes
from stepwell_server.engine.catalog.session_moves import SessionMoves
from stepwell_server.engine.catalog.watch import Watch as VersionWatch
from stepwell_server.engine.change import Change
from stepwell_server.engine.commit.committer import Committer, Recorder
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.commit.records import Outcome, Records
from stepwell_server.engine.commit.store_policy import EveryChange, PagedOutOnly, StorePolicyFactory
from stepwell_server.engine.executors import load_executor
from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.intake.pager import Pager
from stepwell_server.engine.intake.queues import Inboxes, RowQueue, SessionQueues
from stepwell_server.engine.intake.validation import Validation, require_sessions
from stepwell_server.engine.prediction import Prediction
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.begin import SessionCreator
from stepwell_server.engine.sessions.close import Closer, Place
from stepwell_server.engine.sessions.directory import MAX_IDS_PER_CALL, Context, Directory
from stepwell_server.engine.sessions.end import MAX_PAGED_OUT, Expiry, Removal, Sweep, UseNotifier
from stepwell_server.engine.sessions.lookup import Loader, Lookup
from stepwell_server.engine.sessions.open import Forker, Opener
from stepwell_server.engine.sessions.read import NoUses, SessionCounts, SessionList, StateReader
from stepwell_server.engine.sessions.transfer import (
    ExistingPolicy,
    Exporter,
    ExportResult,
    Importer,
    ImportResult,
    SessionRecord,
)
from stepwell_server.engine.sizes import Sizes
from stepwell_server.engine.state.fields import Fields
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.resident import ResidentRows
from stepwell_server.engine.submission import Submission
from stepwell_server.engine.threads import Pieces, Threads
from stepwell_server.engine.types import U64, Mask, Members, Tensors
from stepwell_server.engine.versions.record_upgrade import Migration, RecordUpgrader
from stepwell_server.engine.versions.registry import Absence, Models, Versions
from stepwell_server.engine.watches.events import Wanted
from stepwell_server.engine.watches.watch import Watch
from stepwell_server.engine.watches.watchers import WatchCounts, Watchers
from stepwell_server.errors import InvalidInput, MessageTooLarge, ServerError
from stepwell_server.logs import Log
from stepwell_server.program import Program
from stepwell_server.store.base import Store

__all__ = ["Engine", "EveryChange", "ModelStats", "PagedOutOnly"]

_log = Log("engine")


class Engine:
    """Serves the sessions of some models. Lives on one event loop; not thread-safe."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        observer: Observer,
        max_batch_rows: int,
        resident_rows: ResidentRows,
        idle_limits: IdleLimits,
        compute_threads: int,
        executor: Callable[[Program], Executor] = load_executor,
        quotas: Quotas | None = None,
        migrations: Mapping[str, Migration] | None = None,
        policy: StorePolicyFactory = EveryChange,
        absent: Absence = lambda _ref: None,
    ) -> None:
        """Make an engine that serves no model yet.

        Args:
            store: Keeps the sessions.
            clock: The source of time.
            observer: Receives the engine's events.
            max_batch_rows: The most rows of a pass, unless a single change has more.
            resident_rows: How many rows the sessions of each model keep in memory.
            idle_limits: How long sessions may be idle.
            compute_threads: Threads that run passes.
            executor: Makes the executor of a program.
            quotas: The quotas of tenants and callers; None: none.
            migrations: Functions by name; each converts states of one version to those of another.
            policy: Which sessions the store has records of.
            absent: Returns the error to raise for a model or version that is not loaded; None: the reason is
                unknown.
        """
        self._loop_queue = LoopQueue(asyncio.get_running_loop().call_soon)
        self._shares = Shares(
            clock.monotonic,
            self._loop_queue,
            lambda model, error: _log.defect("a turn raised", error, model=model),
        )
        self._threads = Threads(compute_threads)
        self.take_turns: Callable[[], None] = self._shares.run_next
        """Process what has arrived now, instead of in the next iteration of the event loop."""
        self.add_part: Callable[[Source, Callable[[], None]], None] = self._loop_queue.add
        """Run a part of large work in an iteration of the event loop with no other part: see `LoopQueue.add`."""
        self.settle: Callable[[], None] = store.settle
        """See `Store.settle`."""
        self._table = table = SessionTable()
        self._store, self._clock = store, clock
        self._models = Models(table, store.elsewhere, absent)
        self._group = GroupCommit(store, self._models.ring)
        fields = Fields(table)
        records = Records(table, fields)
        store_policy = policy(store, table, records, clock)
        forwarding = RecordUpgrader(self._models, migrations or {})
        self._pager = pager = Pager(
            table,
            self._models,
            store,
            store_policy,
            fields,
            forwarding,
            clock=clock,
            observer=observer,
        )
        row_queue = RowQueue(table, self._models, pager)
        self._queues = SessionQueues(table, self._models, pager, row_queue, store, idle_limits, clock)
        self._row_queue = row_queue
        self._inboxes = Inboxes()
        watch = IdleWatch(table, idle_limits, -math.inf)
        self._removal = removal = Removal(
            table,
            self._models,
            self._queues,
            store,
            self._group,
            quotas=quotas,
            clock=clock,
            observer=observer,
        )
        self._expiry = Expiry(watch, removal, self._queues, store, clock=clock)
        self._uses = uses = UseNotifier(watch, store, clock)
        self._sweep = Sweep(
            watch,
            self._expiry,
            removal,
            uses,
            store,
            self._group,
            clock,
            max_paged_out=math.inf if store_policy.others is None else MAX_PAGED_OUT,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._quotas = quotas
        sizes = Sizes(table, quotas)
        recorder = None
        if store_policy.others is not None:
            recorder = Recorder(
                self._group, table, records, new_stamp=store.new_stamp, clock=clock, observer=observer
            )
        self._committer = Committer(
            sizes,
            recorder,
            clock,
            release=self._queues.release,
            drop=removal.drop,
            discard=pager.discard,
            watched=self._on_watched,
        )
        self._admission = Admission(
            table,
            self._queues,
            row_queue,
            pager,
            self._committer,
            self._inboxes,
            clock=clock,
            observer=observer,
        )
        self._drain_inboxes = self._admission.drain
        switching = SessionMoves(table, self._queues, pager, self._models, self._drain_inboxes)
        documents = Documents(store, self._group, self._models, switching)
        self._watch = VersionWatch(store, self._models, documents, switching)
        loader = Loader(table, self._models, self._expiry, fields)
        self._lookup = Lookup(
            table,
            store,
            self._expiry,
            removal,
            loader,
            Pieces(self._loop_queue),
            self._drain_inboxes,
            self._watch.catch_up,
        )
        self._directory = Directory(
            table,
            self._models,
            store,
            lookup=self._lookup,
            loader=loader,
            expiry=self._expiry,
            clock=clock,
        )
        self._counts = SessionCounts(table, self._models, store, clock)
        self._submission = Submission(
            table,
            self._directory,
            self._lookup,
            Validation(table, self._models),
            self._inboxes,
            self._group,
            sizes=sizes,
            clock=clock,
        )
        self.submit: Callable[[Change], Members] = self._submission.submit
        """Take a change. Its replies get each member's answer, some possibly before this returns.

        Returns:
            Members that were not taken, and get no answer. If the change has several messages: members of messages
            that must be
            submitted alone, in their order. If its step must continue: members that do not continue. Otherwise
            none.

        Raises:
            ServerError: the change is refused as a whole; its replies get nothing.
        """
        self.run_batch: Callable[[StepBatch, int, OnFailed], bool] = self._submission.run_batch
        """Run a batch of steps now, if all of them are valid and none must wait. False: `submit` them.

        Args: the batch, the largest number of bytes of its outputs, and what is called if it must be answered with an
        error, because the store failed."""
        self._reader = StateReader(table, self._directory, self._queues, pager, uses, clock=clock)
        quiet_reader = StateReader(table, self._directory, self._queues, pager, NoUses(), clock=clock)
        self._watchers = watchers = Watchers(table, self._directory, quiet_reader, self._drain_inboxes, clock)
        self.watch_sessions: Callable[[Sequence[str], Wanted, Hashable], Watch] = watchers.open
        """Report changes of sessions: see `Watchers.open`. Pass the watch to `end_watch`."""
        self.end_watch: Callable[[Watch], None] = watchers.close
        self.stop_watches: Callable[[ServerError], None] = watchers.stop
        """End all watches with an error."""
        self.watch_counts: Callable[[], WatchCounts] = watchers.counts
        context = Context(table, self._directory, self._queues, pager, removal, clock, observer)
        begin = SessionCreator(
            context,
            self._group,
            store_policy,
            self._expiry,
            quotas,
            row_queue,
            switching.follow,
        )
        require_open = self._submission.require_open
        self._open = Opener(table, self._directory, begin, uses, observer, require_open)
        self._fork = Forker(self._directory, begin, self._reader, self._drain_inboxes, require_open)
        self._list = SessionList(table, self._directory, self._expiry, removal, store_policy, store, clock)
        self._closing = Closer(
            self._directory,
            self._queues,
            pager,
            self._group,
            removal=removal,
            listing=self._list,
            fields=fields,
            clock=clock,
        )
        self._export = Exporter(context, self._expiry, self._list, records, store)
        self._import = Importer(context, self._group, begin, loader, self._closing, quotas)
        self._serving = Runtimes(
            context,
            self._group,
            self._models,
            self._inboxes,
            self._admission,
            self._committer,
            Capacity(self._shares, self._threads, compute_threads, executor, max_batch_rows, resident_rows),
            watchers.stepped,
        )
        self._loops = self._serving.loops
        self._changes = Changes(context, self._models, self._serving, switching, documents, forwarding, store)
        self._prediction = Prediction(
            self._models,
            self._inboxes,
            quotas,
            drain=self._drain_inboxes,
            require_accepting=self._submission.require_accepting,
            clock=clock,
            observer=observer,
        )

    def _on_watched(self, outcome: Outcome, places: Members | None) -> None:
        self._watchers.committed(outcome, places)  # made after the committer

    def begin_with(self, name: str, version: int, program: Program) -> None:
        """Serve a version from `start` on: see `Changes.begin_with`."""
        self._changes.begin_with(name, version, program)

    async def start(self) -> None:
        """Read what the store knows of versions, and run each program once so that the first callers need not wait.

        Raises:
            DocumentError, Unavailable: the store's versions cannot be read.
        """
        await self._changes.restore()
        for model in self._models:
            await self._serving.warm_up(model)
        timers = [self._sweep.run, self._watch.run, self._counts.run]
        if self._quotas is not None:
            timers.append(self._quotas.run)
        self._tasks = [asyncio.create_task(run()) for run in timers]

    def models(self) -> list[ModelInfo]:
        """The models, with their default versions, sorted by name."""
        return [self._info(own, own.loaded[own.default]) for own in self._models.served()]

    def model(self, ref: str) -> ModelInfo:
        """Describe one model: NAME, NAME@VERSION or NAME:LABEL.

        Raises:
            ModelNotFound: no model has that name, or it has no such version.
        """
        model = self._models.by_name(ref)
        return self._info(self._models.named(model.name), model)

    def version(self, ref: str) -> int:
        """The number of the version that a reference means. Reference and errors as for `model`."""
        return self._models.by_name(ref).version

    def programs(self, name: str) -> dict[int, Program]:
        """The programs of a model's loaded versions, by number, ascending.

        Raises:
            ModelNotFound: no version of that name is loaded.
        """
        loaded = self._models.named(name).loaded
        return {number: loaded[number].program for number in sorted(loaded)}

    def model_names(self) -> list[str]:
        """The models' names, sorted."""
        return self._models.names()

    async def predict(
        self,
        model: str,
        inputs: Tensors,
        state: Tensors | None = None,
        *,
        reset: Mask | None = None,
        deadline: float = math.inf,
        source: object = None,
        caller: Caller = ANYBODY,
        reply_limit: int = sys.maxsize,
        reply_bytes: int = 0,
    ) -> PredictResult:
        """Run a model without a session: see `Prediction.predict`."""
        return await self._prediction.predict(
            model,
            inputs,
            state,
            reset=reset,
            deadline=deadline,
            source=source,
            caller=caller,
            reply_limit=reply_limit,
            reply_bytes=reply_bytes,
        )

    # --------------------------------------------------------------------------------------- versions of models

    async def load_version(
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
        """Load a version of a model and serve it: see `Changes.load`."""
        return await self._changes.load(
            name,
            version,
            program,
            source=source,
            tenant=tenant,
            rows=rows,
            labels=labels,
            becomes=becomes,
            begin=begin,
        )

    async def require_possible(
        self, name: str, version: int, program: Program, policy: SessionPolicy, migration: str = ""
    ) -> None:
        """Check a change of the default before the version is loaded: see `Changes.require_possible`."""
        await self._changes.require_possible(name, version, program, policy, migration)

    async def unload_version(self, name: str, version: int, *, force: bool = False) -> None:
        """Unload a version: see `Changes.unload`."""
        await self._changes.unload(name, version, force=force)

    async def sessions_by_version(self, name: str) -> dict[int, int]:
        """The number of sessions on each version of a name: see `Changes.sessions`."""
        return await self._changes.sessions(name)

    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        leaves: bool | None = None,
    ) -> DefaultMove:
        """Make another version the default: see `Changes.set_default`."""
        return await self._changes.set_default(name, version, policy, migration, leaves=leaves)

    async def set_label(self, name: str, label: str, version: int) -> None:
        """Put a label on a version, or remove it with version 0: see `Changes.set_label`."""
        await self._changes.set_label(name, label, version)

    def next_version(self, name: str) -> int:
        """One more than the highest version number that a name ever had."""
        return self._changes.next_version(name)

    def catalogue(self) -> Mapping[str, Versions]:
        """All versions of all names, loaded or not."""
        return self._changes.catalogue()

    def defaults_elsewhere(self) -> dict[str, int]:
        """Default versions that are not loaded here but may be loaded on other servers of the store, by name."""
        return self._changes.defaults_elsewhere()

    # ------------------------------------------------------------------------------------------------ sessions

    async def open_session(
        self,
        model: str,
        *,
        session_id: str = "",
        batch_size: int = 1,
        state: Tensors | None = None,
        must_be_new: bool = False,
        request_id: int = 0,
        fingerprint: str = "",
        max_idle_ms: int | None = None,
        namespace: str = "",
        caller: Caller = ANYBODY,
    ) -> OpenResult:
        """Open a session, or resume the live session of that id: see `Opener.one`."""
        return await self._open.one(
            model,
            session_id=session_id,
            batch_size=batch_size,
            state=state,
            must_be_new=must_be_new,
            request_id=request_id,
            fingerprint=fingerprint,
            max_idle_ms=max_idle_ms,
            namespace=namespace,
            caller=caller,
        )

    async def open_sessions(
        self,
        model: str,
        *,
        count: int = 0,
        session_ids: Sequence[str] = (),
        batch_size: int = 1,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        namespace: str = "",
        caller: Caller = ANYBODY,
        resume: bool = False,
    ) -> OpenManyResult:
        """Open many sessions, all of them or none: see `Opener.many`."""
        return await self._open.many(
            model,
            count=count,
            session_ids=session_ids,
            batch_size=batch_size,
            request_id=request_id,
            max_idle_ms=max_idle_ms,
            namespace=namespace,
            caller=caller,
            resume=resume,
        )

    async def fork(
        self,
        session_id: str,
        *,
        new_session_id: str = "",
        expected: int | None = None,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        deadline: float = math.inf,
        caller: Caller = ANYBODY,
    ) -> OpenResult:
        """Open a session with the state, revision and position of another: see `Forker.one`."""
        return await self._fork.one(
            session_id,
            new_session_id=new_session_id,
            expected=expected,
            request_id=request_id,
            max_idle_ms=max_idle_ms,
            deadline=deadline,
            caller=caller,
        )

    async def fork_sessions(
        self,
        session_ids: Sequence[str],
        *,
        new_session_ids: Sequence[str] = (),
        expected: U64 | None = None,
        request_id: int = 0,
        max_idle_ms: int | None = None,
        deadline: float = math.inf,
        caller: Caller = ANYBODY,
    ) -> OpenManyResult:
        """Open sessions with the states of others, all of them or none: see `Forker.many`."""
        return await self._fork.many(
            session_ids,
            new_session_ids=new_session_ids,
            expected=expected,
            request_id=request_id,
            max_idle_ms=max_idle_ms,
            deadline=deadline,
            caller=caller,
        )

    async def import_sessions(
        self, sessions: Sequence[SessionRecord], existing: ExistingPolicy, caller: Caller = ANYBODY
    ) -> list[ImportResult]:
        """Import sessions from records, each independently: see `Importer.run`."""
        return await self._import.run(sessions, existing, caller)

    async def session_info(self, session_id: str, *, usable: bool = False) -> SessionInfo:
        """Describe a session as of its last completed change: see `Directory.describe`."""
        return await self._directory.describe(session_id, usable=usable)

    async def list_sessions(
        self, *, after: str = "", limit: int = 1000, count: bool = True, **wanted: Any
    ) -> tuple[SessionPage, int]:
        """Up to `limit` sessions, and the number of all that match: see `SessionList.ask`."""
        return await self._list.ask(after=after, limit=limit, count=count, **wanted)

    async def refresh_counts(self) -> None:
        """Update the session counts of `models`, unless the store was asked just before."""
        await self._counts.refresh()

    async def export_sessions(self, session_ids: Sequence[str], *, deadline: float) -> list[ExportResult]:
        """The records of sessions, or the errors for those without one: see `Exporter.sessions`."""
        return await self._export.sessions(session_ids, deadline=deadline)

    async def export_page(
        self, wanted: SessionFilter, *, after: str, page_bytes: int, max_bytes: int, deadline: float
    ) -> tuple[list[tuple[str, ExportResult]], str | None]:
        """The records of sessions that match a filter, page by page: see `Exporter.page`."""
        return await self._export.page(
            wanted, after=after, page_bytes=page_bytes, max_bytes=max_bytes, deadline=deadline
        )

    async def close_session(
        self, session_id: str, *, request_id: int = 0, uid: int = 0, deadline: float = float("inf")
    ) -> bool:
        """Delete a session after all changes received before; True if this request had already done so.

        With a `uid` (see `SessionInfo.uid`), another session that has the id now is kept. So is a session opened
        after this same request closed an earlier one.

        Raises:
            SessionGone, Overloaded, DeadlineExceeded, Unavailable
        """
        self._group.require_room()
        seen = await self._directory.look([session_id])
        self._drain_inboxes()
        return await self._closing.close(session_id, seen, request_id=request_id, deadline=deadline, uid=uid)

    async def close_sessions(
        self, session_ids: Sequence[str], *, request_id: int = 0, uids: U64 | None = None
    ) -> int:
        """Delete those of many sessions that exist; return how many this request deleted, now or earlier.

        Arguments and errors are those of `Closer.close_many`; at most `MAX_IDS_PER_CALL` ids.
        """
        if len(session_ids) > MAX_IDS_PER_CALL:
            raise InvalidInput(f"session_ids must be at most {MAX_IDS_PER_CALL}; got {len(session_ids)}")
        self._group.require_room()
        self._drain_inboxes()
        return await self._closing.close_many(session_ids, request_id=request_id, uids=uids)

    async def close_matching(
        self, wanted: SessionFilter, *, limit: int, place: Place | None = None, request_id: int = 0
    ) -> tuple[int, Place | None]:
        """Close sessions that match a filter, in batches: see `Closer.close_matching`."""
        return await self._closing.close_matching(wanted, limit=limit, place=place, request_id=request_id)

    async def was_closed_by(self, session_id: str, request_id: int) -> bool:
        """Whether a request closed a session of this id: see `Closer.was_closed_by`."""
        return await self._closing.was_closed_by(session_id, request_id)

    async def get_state(self, session_id: str, *, deadline: float = float("inf")) -> StateResult:
        """Read a session's state after all changes received before.

        Raises:
            SessionGone, DeadlineExceeded, Overloaded
        """
        seen = await self._directory.look([session_id], reread=True)
        self._drain_inboxes()
        return await self._reader.read(session_id, seen, deadline)

    async def get_states(
        self,
        session_ids: Sequence[str],
        *,
        with_state: bool = True,
        deadline: float = float("inf"),
        reply_limit: int = sys.maxsize,
        reply_bytes: int = 0,
    ) -> StatesResult:
        """Read the states of many sessions of one model, each after all changes received before for it.

        Each session is read on its own, as soon as it is free; paged-out sessions stay paged out. Without
        `with_state`, only revisions and positions are read.

        Raises:
            InvalidInput: the list breaks a rule, or names sessions of several models.
            MessageTooLarge: the states, with `reply_bytes` for the rest, exceed `reply_limit` bytes.
            DeadlineExceeded: the deadline has passed.
        """
        require_sessions(session_ids, limit=MAX_IDS_PER_CALL)
        seen = await self._directory.look(session_ids, reread=True)
        self._drain_inboxes()

        def admit(byte_count: int) -> None:
            size = byte_count + reply_bytes
            if size > reply_limit:
                raise MessageTooLarge(
                    f"session_ids must name sessions whose states fit into a reply of {reply_limit} bytes;"
                    f" got {len(session_ids)} sessions, which need {size} bytes: name fewer at once"
                )

        return await self._reader.read_many(session_ids, seen, deadline, admit=admit, with_state=with_state)

    def stats(self) -> list[ModelStats]:
        """Current figures of each model."""
        return [self._stats_of(own) for own in self._models.served()]

    def _stats_of(self, own: Versions) -> ModelStats:
        versions = list(own.loaded.values())
        slots = list({id(model.slots): model.slots for model in versions}.values())
        inboxes = [self._inboxes.of[model.index] for model in versions]
        return ModelStats(
            name=own.name,
            sessions=self._counts.of(own.name),
            resident_sessions=sum(self._table.count_resident(model.index) for model in versions),
            resident_rows=sum(each.resident for each in slots),
            max_resident_rows=sum(each.resident_limit for each in slots),
            queued_rows=sum(inbox.waiting for inbox in inboxes),
            max_queued_rows=max(inbox.max_waiting for inbox in inboxes),
            max_pass_rows=versions[0].max_batch_rows,
            queued_bytes=self._inboxes.bytes,
            uncommitted=self._group.waiting,
        )

    def stop_accepting(self) -> None:
        """Refuse new sessions and new changes with `Stopping` from now on."""
        self._submission.is_accepting = False

    def require_accepting(self) -> None:
        """See `Submission`. For callers that make several calls and want none of them done after a refusal."""
        self._submission.require_accepting()

    async def drain(self) -> None:
        """Return when all accepted work is finished."""
        while self._is_busy:
            for loop in list(self._loops.values()):
                await loop.idle()
            await self._group.idle()
            await self._lookup.idle()
            await self._pager.idle()
            await asyncio.sleep(0)  # changes that wait for rows are admitted by the event loop

    async def close(self, timeout_s: float = 10.0) -> bool:
        """Stop the threads. Nothing may be active.

        Returns:
            False if the store did not finish a commit in time: it must not be used any more then.
        """
        self._watch.close()
        for task in self._tasks:
            task.cancel()
        self._uses.close()
        self._threads.close()
        until = self._clock.monotonic() + timeout_s
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.drain(), timeout_s)
        return await self._store.end_commits(max(0.0, until - self._clock.monotonic()))

    @property
    def _is_busy(self) -> bool:
        return (
            bool(self._row_queue)
            or bool(self._removal.pending)
            or self._submission.is_loading
            or self._lookup.waiting > 0
            or not (self._pager.is_idle and self._group.is_idle)
            or any(loop.busy for loop in self._loops.values())
        )

    def _info(self, own: Versions, model: Model) -> ModelInfo:
        sessions, versions = self._counts.of(own.name), self._changes.describe(own)
        return ModelInfo(own.name, model.program, sessions, model.version, versions)

    @property
    def max_session_idle_s(self) -> float:
        """Seconds after which an unused session expires; 0: never."""
        max_s = self._expiry.limits.max_s
        return max_s if max_s < math.inf else 0.0
