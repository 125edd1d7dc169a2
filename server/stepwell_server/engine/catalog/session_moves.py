"""Moves sessions in memory to other versions, between two iterations of the event loop.

It works the same whether this server or another one on the same store made the change.
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
    """A version that sessions move to, and how."""

    name: str
    version: int
    model: Model | None
    """None: it is not loaded here; the sessions leave the table, and the store has them."""
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
        """Sessions that move when their claims end: their births and goals."""
        self._none_late = asyncio.Event()

    @staticmethod
    def mark(own: Versions, models: Collection[Model]) -> None:
        """Mark records of these versions from now on as those of sessions that have made all moves."""
        for model in models:
            model.epoch = own.history.epoch

    async def wait_until_moved(self) -> None:
        """Return when no session has a move pending."""
        while self._pending:
            self._none_late.clear()
            await self._none_late.wait()

    def move_default(self, own: Versions, after: Versions, how: MoveKind | None) -> int:
        """Change the default to another loaded version; return how many sessions move.

        Sessions in memory that follow the default move, unless `how` is None. `after` is the state after the
        change.
        """
        self._drain()  # earlier changes run on the version they were checked against
        previous = own.chosen
        own.default, own.wanted, own.history = after.default, 0, after.history
        own.known = after.known
        moved, source = 0, own.loaded.get(previous)
        if how is not None and source is not None:
            moved = self._move(source, self._followers(source), self._goal(own, after.default, how))
        self.mark(own, [each for v, each in own.loaded.items() if v != previous or not self._pending])
        return moved

    def take_over(self, own: Versions, stored: Versions) -> None:
        """Apply a change that another server made. No session may have a move pending.

        Active work finishes on the version it began on, and is kept only if no other server has changed its
        session.
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
        ) in going:  # all were found before the first one moves: it may move to where others move from
            before = len(self._pending)
            self._move(source, handles, goal)
            if len(self._pending) > before:
                late.add(source.version)
        self.mark(own, [each for v, each in own.loaded.items() if v not in late])

    def follow(self, handles: Handles, source: Model, epoch: int) -> None:
        """Apply all moves since an epoch to sessions that enter the table only now.

        They began on the version `source` in that epoch.
        """
        own = self._models.versions(source.name)
        move = own.history.of(source.version, epoch)
        if move is None:
            return
        now, source.epoch = source.epoch, epoch  # records written in this block belong to that epoch
        left = source.left_epoch
        self._move(source, handles, self._goal(own, move.target, move.how))
        source.epoch, source.left_epoch = now, left

    def _followers(self, source: Model) -> Handles:
        """Sessions in memory on a version that follow the default."""
        table = self._table
        handles = np.flatnonzero(table.model[: table.end] == source.index)
        followers: Handles = handles[~table.pinned[handles]]
        return followers

    @staticmethod
    def _goal(own: Versions, version: int, how: MoveKind) -> _Goal:
        return _Goal(own.name, version, own.loaded.get(version), how)

    def _move(self, source: Model, handles: Handles, goal: _Goal) -> int:
        """Move sessions of a version to another, now or once their active work has ended; return how many."""
        source.left_epoch = source.epoch
        table, target = self._table, goal.model
        if target is not None and goal.how is MoveKind.CARRY and source.arena is target.arena:
            # active work continues as it began: its results are states of the new version, too
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
        """Assign sessions to a version; their states are converted when they are needed."""
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
        if goal.how is not MoveKind.CARRY and self._table.watched_ids:
            for handle in handles[self._table.watched[handles]].tolist():
                self._table.on_watched_doubtful(self._table.session_id(handle))

    def _leave_late(self, handles: Handles) -> None:
        """Move those of these sessions with a pending move, as their claims end. Queued changes must be sent again."""
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
                f"session {session_id!r} moved to version {goal.version} of model {goal.name!r} while the request waited;"
                " it was not applied: send it again"
            )
            self._queues.close_queue(handle, moved)
        if not self._pending:
            self._queues.leave_when_free = None
            self._none_late.set()

    def not_loaded(self, handle: int, name: str, version: int) -> ServerError:
        """The error for a session that must leave the table because its version is not loaded."""
        session_id = self._table.session_id(handle)
        return self._models.elsewhere(name, version, session_id) or VersionNotFound(
            f"session {session_id!r} is on version {version} of model {name!r}, which was unloaded",
            model=name,
        )
