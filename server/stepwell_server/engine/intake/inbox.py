"""Where the changes of one model wait for its loop's next turn, in the order in which they came."""

from __future__ import annotations

from collections.abc import Hashable

from stepwell_server.engine.change import Change, joined, kind_of, may_join
from stepwell_server.engine.state.model import Model


class Inbox:
    """The changes that have come for one model. Lives on the event loop.

    A change is put here when it has been checked; its sessions may be gone by the time it is drained.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._waiting: list[Change] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, change: Change) -> None:
        """Let a change wait for the next turn."""
        self._waiting.append(change)
        self._model.in_inbox += change.row_count
        self._model.work.ring()

    def drain(self) -> list[Change]:
        """Take everything that waits."""
        waiting, self._waiting = self._waiting, []
        self._model.in_inbox = 0
        return waiting


def joined_where_alike(waiting: list[Change]) -> list[Change]:
    """The same, with steps of one row that are alike as one change. What a session was sent stays in its order."""
    if len(waiting) < 2:
        return waiting
    found: list[Change] = []
    groups: dict[Hashable, list[Change]] = {}
    kinds: dict[str, Hashable] = {}
    """The group that each session is in."""

    def end_groups() -> None:
        found.extend(joined(group) for group in groups.values())
        groups.clear()
        kinds.clear()

    for change in waiting:
        if not may_join(change):
            end_groups()
            found.append(change)
            continue
        kind, session_id = kind_of(change), change.session_ids[0]
        if kinds.get(session_id, kind) != kind:
            end_groups()  # what the session was sent before must go first, and is in another group
        kinds[session_id] = kind
        groups.setdefault(kind, []).append(change)
    end_groups()
    return found
