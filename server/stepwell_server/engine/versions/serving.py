"""What serves a version of a model: its rows, its executors and its loop are made here, and ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stepwell_server.clock import Clock
from stepwell_server.core.cost import Cost
from stepwell_server.core.scheduler import Scheduler
from stepwell_server.core.sessions import SessionTable
from stepwell_server.core.slots import Slots
from stepwell_server.engine.api import Observer
from stepwell_server.engine.durability.committer import Committer
from stepwell_server.engine.durability.group_commit import GroupCommit
from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.queues import Held, Inbox, Turns
from stepwell_server.engine.models import Models
from stepwell_server.engine.passes.batch import Lane
from stepwell_server.engine.passes.completion import Completion
from stepwell_server.engine.passes.loop import Inline, PassLoop
from stepwell_server.engine.passes.runner import Runner, warm_up
from stepwell_server.engine.shares import Share, Shares, Threads
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import ReplyMemory
from stepwell_server.engine.state.resident import ResidentRows
from stepwell_server.program import Program
from stepwell_server.store.record import Texts

#: How often it is looked whether what waits in lines has ended, in seconds.
_LOOK_S = 0.005


class Serving:
    """The loops and inboxes of the versions that are loaded. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        held: Held,
        admission: Admission,
        committer: Committer,
        pager: Pager,
        turns: Turns,
        commits: GroupCommit,
        *,
        shares: Shares,
        threads: Threads,
        compute_threads: int,
        executor: Callable[[Program], Executor],
        max_batch_rows: int,
        resident_rows: ResidentRows,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._table = table
        self._models = models
        self._held = held
        self._admission = admission
        self._committer = committer
        self._pager = pager
        self._turns = turns
        self._commits = commits
        self._shares = shares
        self._threads = threads
        self._compute_threads = compute_threads
        self._executor = executor
        self._max_batch_rows = max_batch_rows
        self._resident_rows = resident_rows
        self._clock = clock
        self.observer = observer
        self.loops: dict[int, PassLoop] = {}
        """By the number of the version, as the inboxes."""
        self.inboxes: dict[int, Inbox] = {}

    def make(
        self, name: str, version: int, program: Program, sibling: Model | None = None, rows: int = 0
    ) -> Model:
        """Make what serves a version. Nobody finds it yet.

        `sibling` is a version of the name whose rows are shared; `rows`, if it has none, are those that sessions keep,
        0 for as many as the engine was told.

        Raises:
            MemoryError: there is no room for so many.
        """
        index = self._models.new_index()
        if sibling is None:
            arena, slots = self._arena(name, program, rows)
            replies, sharing = ReplyMemory(program, self._table, arena), {index}
        else:
            arena, slots, replies, sharing = sibling.arena, sibling.slots, sibling.replies, sibling.sharing
            sharing.add(index)
        model = Model(
            index=index,
            name=name,
            version=version,
            program=program,
            arena=arena,
            slots=slots,
            replies=replies,
            texts=Texts(program.fingerprint, name),
            sharing=sharing,
            max_batch_rows=self._max_batch_rows,
            ready=Scheduler(self._max_batch_rows),
            cost=Cost(),
            work=Share(self._shares, f"{name}@{version}"),
        )
        lanes = [Lane(self._executor(program), arena) for _ in range(self._compute_threads)]
        inbox, runner = Inbox(model, self._held), Runner(model, lanes, self._threads, self._clock)
        inline = Inline(
            model,
            self._table,
            lanes[0].executor,
            self._committer,
            self._admission.conflicted,
            clock=self._clock,
            observer=self.observer,
        )
        completion = Completion(
            model,
            self._table,
            self._committer,
            self._admission.conflicted,
            self._pager.forget_replies,
            clock=self._clock,
            observer=self.observer,
        )
        self.loops[index] = PassLoop(
            model,
            inbox,
            self._admission,
            runner,
            completion,
            inline,
            self._turns.release,
            self._commits,
            clock=self._clock,
            observer=self.observer,
        )
        self.inboxes[index] = inbox
        return model

    def _arena(self, name: str, program: Program, rows: int) -> tuple[Arena, Slots]:
        rows = rows or self._resident_rows.of(name, program)
        try:
            slots = Slots(rows)
            return Arena(program, slots.capacity), slots
        except (MemoryError, ValueError) as error:  # ValueError: larger than any address
            raise MemoryError(f"there is no room for {rows} rows of model {name}: {error}") from error

    async def warm_up(self, model: Model) -> None:
        """Run its program once at several sizes, so that the first callers do not pay for it."""
        runner = self.loops[model.index].runner
        await asyncio.to_thread(warm_up, runner, model.program, model.max_batch_rows)

    async def idle(self, model: Model) -> None:
        """Return when nothing is under way on a version."""
        loop = self.loops[model.index]
        while loop.busy or model.waiting:
            await loop.idle()
            if model.waiting:
                await asyncio.sleep(_LOOK_S)

    async def end(self, model: Model) -> None:
        """Let go of what served a version that nobody finds any more."""
        await self.idle(model)
        model.work.leave()
        self._threads.forget(model.work)
        del self.loops[model.index], self.inboxes[model.index]
