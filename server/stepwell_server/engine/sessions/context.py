"""What the parts of this room share: where the sessions of one engine are, and what a change of them goes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from stepwell_server.clock import Clock
from stepwell_server.core.idle import IdleLimits
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.api import Observer
from stepwell_server.engine.commit.group_commit import GroupCommit
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.queues import RowQueue, Turns
from stepwell_server.engine.quotas import Quotas
from stepwell_server.engine.sessions.directory import Directory
from stepwell_server.engine.sessions.end import Expiry, Removal, Uses


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """The sessions of one engine. Lives on the event loop."""

    table: SessionTable
    directory: Directory
    turns: Turns
    pager: Pager
    row_queue: RowQueue
    commits: GroupCommit
    removal: Removal
    expiry: Expiry
    uses: Uses
    limits: IdleLimits
    quotas: Quotas | None
    """None: there are no limits."""
    clock: Clock
    observer: Observer
    drain: Callable[[], None]
    """Admits the changes that wait in the inboxes: a call must not overtake them."""
    require_open: Callable[[], None]
    """Refuses a call while the server stops, or while too much waits for the store."""
