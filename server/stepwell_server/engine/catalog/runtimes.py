"""Creates and ends the rows, executors and loop that serve a version of a model."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

from stepwell_server.core.cost import Cost
from stepwell_server.core.scheduler import Scheduler, Share, Shares
from stepwell_server.core.slots import Slots
from stepwell_server.engine.commit.committer import Committer
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.executors.base import Executor
from stepwell_server.engine.intake.admission import Admission
from stepwell_server.engine.intake.queues import Inbox, Inboxes
from stepwell_server.engine.passes.batch import Lane
from stepwell_server.engine.passes.compiled import CompiledSteps
from stepwell_server.engine.passes.completion import Completion
from stepwell_server.engine.passes.direct import Direct
from stepwell_server.engine.passes.loop import PassLoop
from stepwell_server.engine.passes.runner import Runner, warm_up
from stepwell_server.engine.sessions.directory import Context
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.state.replies import ReplyMemory
from stepwell_server.engine.state.resident import ResidentRows
from stepwell_server.engine.threads import Threads
from stepwell_server.engine.versions.registry import Models
from stepwell_server.program import Program
from stepwell_server.store.record import Texts

#: How often to check whether queued work has ended, in seconds.
_LOOK_S = 0.005
#: More than a pass on the event loop may take.
_ON_THREADS_S = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """The resources that all versions share, and each version's part of them."""

    shares: Shares
    threads: Threads
    compute_threads: int
    """Concurrent passes of a version."""
    executor: Callable[[Program], Executor]
    """Makes the executor of a program."""
    max_batch_rows: int
    """The most rows of a pass, unless a single change has more."""
    resident_rows: ResidentRows


class Runtimes:
    """The loops and inboxes of the versions that are loaded. Lives on the event loop."""

    def __init__(
        self,
        context: Context,
        commits: GroupCommit,
        models: Models,
        inboxes: Inboxes,
        admission: Admission,
        committer: Committer,
        capacity: Capacity,
        watched: Callable[[Model, Sequence[tuple[int, Sequence[bytes]]]], None],
    ) -> None:
        """For `watched` see `CompiledSteps`."""
        self._context = context
        self._commits = commits
        self._models = models
        self._admission = admission
        self._committer = committer
        self._capacity = capacity
        self._watched = watched
        self._clock = context.clock
        self.observer = context.observer
        self.loops: dict[int, PassLoop] = {}
        """By the version's number in the table, like the inboxes."""
        self._inboxes = inboxes

    def make(
        self, name: str, version: int, program: Program, sibling: Model | None = None, rows: int = 0
    ) -> Model:
        """Create what serves a version that is not in the registry yet.

        The version shares the rows of `sibling`, another version of the name. Without one, `rows` is the number of
        rows that its sessions keep; 0: the default of the settings.

        Raises:
            MemoryError: the rows do not fit into memory.
        """
        index = self._models.new_index()
        if sibling is None:
            arena, slots = self._arena(name, program, rows)
            replies, sharing = ReplyMemory(program, self._context.table, arena), {index}
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
            max_batch_rows=self._capacity.max_batch_rows,
            ready=Scheduler(self._capacity.max_batch_rows),
            # A pass that may not end runs on threads, which passes of this duration do.
            cost=Cost(min_fixed_s=_ON_THREADS_S) if program.may_not_end else Cost(),
            work=Share(self._capacity.shares, f"{name}@{version}"),
        )
        lanes = [
            Lane(program, self._capacity.executor(program), arena)
            for _ in range(self._capacity.compute_threads)
        ]
        inbox, runner = Inbox(model, self._inboxes), Runner(model, lanes, self._capacity.threads, self._clock)
        direct = Direct(
            model,
            self._context.table,
            lanes[0],
            self._committer,
            self._commits,
            self._admission.on_conflict,
            clock=self._clock,
            observer=self.observer,
        )
        compiled = CompiledSteps(direct, model, self._context.table, lanes[0], self._committer, self._watched)
        inbox.listen_to_batches(compiled.run)
        completion = Completion(
            model,
            self._context.table,
            self._committer,
            self._admission.on_conflict,
            self._context.pager.forget_replies,
            clock=self._clock,
            observer=self.observer,
        )
        self.loops[index] = PassLoop(
            model,
            inbox,
            self._admission,
            runner,
            completion,
            direct,
            self._context.queues.release,
            self._commits,
            clock=self._clock,
            observer=self.observer,
        )
        return model

    def _arena(self, name: str, program: Program, rows: int) -> tuple[Arena, Slots]:
        rows = rows or self._capacity.resident_rows.of(name, program)
        try:
            slots = Slots(rows)
            return Arena(program, slots.capacity), slots
        except (MemoryError, ValueError) as error:  # ValueError: larger than the address space
            raise MemoryError(f"there is no room for {rows} rows of model {name}: {error}") from error

    async def warm_up(self, model: Model) -> None:
        """Run its program once at several sizes, so that the first callers need not wait."""
        runner = self.loops[model.index].runner
        await asyncio.to_thread(warm_up, runner, model.program, model.max_batch_rows)

    async def idle(self, model: Model) -> None:
        """Return when a version has no active work."""
        loop = self.loops[model.index]
        while loop.busy or model.waiting:
            await loop.idle()
            if model.waiting:
                await asyncio.sleep(_LOOK_S)

    async def end(self, model: Model) -> None:
        """End what served a version that was retired."""
        await self.idle(model)
        model.work.leave()
        self._capacity.threads.forget(model.work)
        del self.loops[model.index], self._inboxes.of[model.index]
