"""What is in memory when versions change: sessions go to other versions between two turns of the event loop.

It makes no difference whether this server made the change or another one on the same store.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Collection

import numpy as np

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.intake.pager import Pager
from stepwell_server.engine.intake.queues import SessionQueues
from stepwell_server.engine.state.model import Model
from stepwell_server.engine.versions.history import MoveKind
from stepwell_server.engine.versions.registry import Models, Versions
from stepwell_server.errors import ServerError, Unavailable, VersionNotFound


@dataclasses.dataclass(frozen=True, slots=True)
class _Goal:
    """Where sessions go, and how."""

    name: str
    version: int
    model: Model | None
    """None: it is not loaded here; they leave the table, and the store has them."""
    how: MoveKind


class SessionMoves:
    """Moves sessions of the table from version to version. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        queues: SessionQueues,
        pager: Pager,
        models: Models,
        drain: Callable[[], None],
    ) -> None:
        """`drain` admits the changes that wait in the inboxes."""
        self._table = table
        self._queues = queues
        self._pager = pager
        self._models = models
        self._drain = drain
        self._pending: dict[int, tuple[int, _Goal]] = {}
        """Sessions that leave for another version when their claims end: births, where they go and how."""
        self._none_late = asyncio.Event()

    @staticmethod
    def mark(own: Versions, models: Collection[Model]) -> None:
        """Mark the records of some versions from now on as those of sessions that have made all moves."""
        for model in models:
            model.epoch = own.history.epoch

    async def wait_until_moved(self) -> None:
        """Return when no session is late for a move."""
        while self._pending:
            self._none_late.clear()
            await self._none_late.wait()

    def move_default(self, own: Versions, after: Versions, how: MoveKind | None) -> int:
        """Change the default to another loaded version, and move the sessions in memory that follow it, unless `how` is None.

        `after` is the state after the change. Returns how many move.
        """
        self._drain()  # earlier changes run on the version on which they were checked
        previous = own.chosen
        own.default, own.wanted, own.history = after.default, 0, after.history
        own.known = after.known
        moved, source = 0, own.loaded.get(previous)
        if how is not None and source is not None:
            moved = self._move(source, self._followers(source), self._goal(own, after.default, how))
        self.mark(own, [each for v, each in own.loaded.items() if v != previous or not self._pending])
        return moved

    def take_over(self, own: Versions, stored: Versions) -> None:
        """Apply what another server changed. No session is late for a move.

        Running work continues where it began, and is kept only if no other server has changed its session.
        """
        self._drain()
        since = own.history.epoch
        own.take(stored)
        going = []
        for source in own.loaded.values():
            move = own.history.of(source.version, since)
            if move is not None:
                going.append((source, self._followers(source), self._goal(own, move.target, move.how)))
        late: set[int] = set()
        for (
            source,
            handles,
            goal,
        ) in going:  # all were found before the first went: it may go where others leave
            before = len(self._pending)
            self._move(source, handles, goal)
            if len(self._pending) > before:
                late.add(source.version)
        self.mark(own, [each for v, each in own.loaded.items() if v not in late])

    def follow(self, handles: Handles, source: Model, epoch: int) -> None:
        """Move sessions by the moves since an epoch, which began on a version then and are in the table only now."""
        own = self._models.versions(source.name)
        move = own.history.of(source.version, epoch)
        if move is None:
            return
        now, source.epoch = source.epoch, epoch  # records that are written here are of that time
        left = source.left_epoch
        self._move(source, handles, self._goal(own, move.target, move.how))
        source.epoch, source.left_epoch = now, left

    def _followers(self, source: Model) -> Handles:
        """The sessions in memory on a version that follow the default."""
        table = self._table
        handles = np.flatnonzero(table.model[: table.end] == source.index)
        followers: Handles = handles[~table.pinned[handles]]
        return followers

    @staticmethod
    def _goal(own: Versions, version: int, how: MoveKind) -> _Goal:
        return _Goal(own.name, version, own.loaded.get(version), how)

    def _move(self, source: Model, handles: Handles, goal: _Goal) -> int:
        """Move sessions of a version to another, now or when their running work has ended; return how many."""
        source.left_epoch = source.epoch
        table, target = self._table, goal.model
        if target is not None and goal.how is MoveKind.CARRY and source.arena is target.arena:
            # running work continues as it began: its results are states of the new version, too
            table.model[handles] = target.index
            return len(handles)
        busy = table.claimed[handles]
        self._leave(handles[~busy], goal)
        for handle in handles[busy].tolist():
            self._pending[handle] = int(table.birth[handle]), goal
        if self._pending:
            self._queues.leave_when_free = self._leave_late
        return len(handles)

    def _leave(self, handles: Handles, goal: _Goal) -> None:
        """Move sessions to a version: their states are brought to it when they are needed."""
        if goal.model is None:
            for handle in handles.tolist():
                self._queues.forget(handle, self.not_loaded(handle, goal.name, goal.version))
            return
        here = handles[self._table.row[handles] >= 0]
        if len(here):
            self._pager.page_out(here)
        self._table.model[handles] = goal.model.index
        if goal.how is MoveKind.RESET:
            self._table.position[handles] = 0

    def _leave_late(self, handles: Handles) -> None:
        """Move those of some sessions whose claims end now; changes that waited for them must be sent again."""
        for handle in handles.tolist():
            if (late := self._pending.pop(handle, None)) is None:
                continue
            birth, goal = late
            if self._table.birth[handle] != birth:
                continue
            session_id = self._table.session_id(handle)
            self._leave(np.array([handle]), goal)
            if goal.model is None:
                continue
            moved = Unavailable(
                f"session {session_id!r} went to version {goal.version} of model {goal.name!r} while this waited;"
                " it was not applied: send it again"
            )
            self._queues.close_queue(handle, moved)
        if not self._pending:
            self._queues.leave_when_free = None
            self._none_late.set()

    def not_loaded(self, handle: int, name: str, version: int) -> ServerError:
        """Why a session of the table has to leave it, whose version is not loaded."""
        session_id = self._table.session_id(handle)
        return self._models.elsewhere(name, version, session_id) or VersionNotFound(
            f"session {session_id!r} is on version {version} of model {name!r}, which was unloaded",
            model=name,
        )
