"""The inside of a running engine: the sessions in its table, the holders of claims, the counts that must add up.

Tests speak to an engine's face. Where the face cannot say what a test is about, the test asks here: nowhere else in
the tests is an engine's private attribute named, so that a part may be renamed or moved by changing this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from stepwell_server.core.sessions import Handles, SessionTable
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.engine import Engine
from stepwell_server.engine.intake.queues import SessionQueues
from stepwell_server.engine.passes.runner import Runner
from stepwell_server.engine.sessions.end import Removal, Sweep, UseNotifier
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import ModelMismatch, ModelNotFound
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore
from stepwell_server.store.record import Header, decode_header


class Internals:
    """The parts of one engine that tests look at, or make do what only chance would make them do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def table(self) -> SessionTable:
        return self._engine._table

    @property
    def turns(self) -> SessionQueues:
        """Claims, and the calls that wait for them."""
        return self._engine._queues

    @property
    def commits(self) -> GroupCommit:
        return self._engine._group

    def commit_on_a_thread(self, patch: pytest.MonkeyPatch) -> None:
        """Have no commit made in place, whatever it costs; a shared store makes none."""
        if isinstance(store := self._engine._store, InProcessStore):
            patch.setattr(store._lanes, "_is_short", lambda _size: False)

    @property
    def uses(self) -> UseNotifier:
        """What notifies the store of use."""
        return self._engine._uses

    @property
    def sweep(self) -> Sweep:
        """The timer that ends sessions nobody uses, and keeps the table small."""
        return self._engine._sweep

    @property
    def removal(self) -> Removal:
        """What takes sessions out of the table, and which are in it or on their way."""
        return self._engine._removal

    @property
    def templates(self) -> Any:
        """The layouts of records that are kept; only of an engine whose store keeps all records."""
        recorder = self._engine._committer._recorder
        assert recorder is not None
        return recorder._records._templates

    @property
    def remembering_store(self) -> Any:
        """The component that explains why a session is not open."""
        return self._engine._directory.here

    @staticmethod
    def turn_of(model: Model) -> Callable[[], bool]:
        """The callback for new work of a model."""
        assert model.work._listener is not None
        return model.work._listener

    @property
    def models(self) -> Sequence[Model]:
        return list(self._engine._models)

    def model(self, name: str) -> Model:
        return self._engine._models.by_name(name)

    def runners(self) -> list[Runner]:
        return [loop.runner for loop in self._engine._loops.values()]

    def use_pool(self, pool: Any) -> None:
        """Run passes on another executor than a pool of threads."""
        self._engine._threads._pool.shutdown()
        self._engine._threads._pool = pool

    def loaded(self) -> list[str]:
        """Ids of the sessions in the table, in order."""
        return sorted(session_id for session_id, _ in self.table.items())

    def handle(self, session_id: str) -> Handles:
        """The handle of a session in the table, as an array of one."""
        return self.table.find_all([session_id])

    def are_claimed(self, *session_ids: str) -> bool:
        """Whether something is under way for any of these sessions."""
        return bool(self.table.claimed[self.table.find_all(session_ids)].any())

    def has_row(self, session_id: str) -> bool:
        """Whether a session is in the arena."""
        return bool(self.table.row[self.handle(session_id)][0] >= 0)

    def someone_waits_for_rows(self) -> bool:
        return bool(self._engine._row_queue)

    def page_out(self, *session_ids: str) -> None:
        """Let sessions leave the arena."""
        self._engine._pager.page_out(self.table.find_all(session_ids))

    def is_in_an_inbox(self) -> bool:
        """Whether a change waits to be admitted."""
        return any(inbox.waiting for inbox in self._engine._inboxes.of.values())

    def drain_inboxes(self) -> None:
        """Admit what waits in the inboxes now, as any call but a change does."""
        self._engine._drain_inboxes()

    async def expire_idle(self) -> int:
        """End the sessions that nobody has used for too long, as the timer does; how many."""
        return await self._engine._sweep.round()

    def check_books(self, store: Any) -> None:
        """Nothing is under way: then everything must add up."""
        engine, table = self._engine, self.table
        live = np.array(sorted(handle for _, handle in table.items()), np.intp)
        assert not table.claimed[live].any(), "a session is claimed though nothing is under way"
        assert not self.turns, "something waits in line"
        assert engine._inboxes.bytes == 0
        assert not engine._inboxes.waiting, "something waits in an inbox"
        for model in self.models:
            own = live[np.isin(table.model[live], list(model.sharing))]
            resident = own[table.row[own] >= 0]
            slots = model.slots
            assert slots.working == 0, f"{slots.working} working rows were not given back"
            assert slots.resident == int(table.batch_size[resident].sum())
            fresh = range(slots.touched, slots.capacity)
            assert slots._top + len(fresh) == slots.capacity - slots.resident
            rows = [*fresh, *slots._freed[: slots._top].tolist(), *table.rows_of(resident).tolist()]
            assert sorted(rows) == list(range(slots.capacity)), "a row is lost or has two owners"
            assert engine._inboxes.of[model.index].waiting == 0
            assert not engine._loops[model.index].busy
            assert set(model.replies.series) <= set(own.tolist()), "a reply outlives its session"
        away = {session_id for session_id, handle in table.items() if table.row[handle] < 0}
        if isinstance(store, MemoryStore):
            held = dict(store._records)
            unloaded = {i for i, record in held.items() if not self._is_loaded(decode_header(i, record))}
            assert held.keys() - unloaded == away - unloaded, (
                "the store holds the sessions that are paged out"
            )
        assert engine._submission.loading_rows == 0
        assert not engine._lookup._tails, "something waits for a session to be loaded"

    def _is_loaded(self, header: Header) -> bool:
        """Whether the version that a record is of now is loaded, from the same file."""
        try:
            self._engine._models.place("", header)
        except (ModelMismatch, ModelNotFound):
            return False
        return True

    async def recount(self) -> None:
        """Have the numbers of sessions be those that the store has now."""
        self._engine._counts._asked = -math.inf
        await self._engine.refresh_counts()

    async def sessions_by_version(self, model: str) -> dict[int, int]:
        """How many sessions are on each version of a model now, in memory or in the store alone."""
        return await self._engine.sessions_by_version(model)

    async def forget_unused(self, model: str) -> None:
        """Forget the versions of a model that nobody needs, as an unload does where there are many."""
        changes, own = self._engine._changes, self._engine._models.versions(model)

        async def attempt() -> Any:
            after = own.changed()
            after.forget_unused((await changes._count(own)).keys())

            def forget() -> None:
                own.history, own.known = after.history, after.known

            return after, forget

        async with changes._documents.lock(model):
            await changes._documents.propose(own, attempt)

    async def look(self) -> None:
        """Know what other servers made of versions."""
        await self._engine._watch.poll()
