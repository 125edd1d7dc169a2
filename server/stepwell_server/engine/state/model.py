"""A model that is served: its program, its rows and the loop that runs it."""

from __future__ import annotations

import dataclasses

from stepwell_server.core.slots import Slots
from stepwell_server.engine.passes.loop import PassLoop
from stepwell_server.engine.state.arena import Arena
from stepwell_server.engine.state.replies import Replies
from stepwell_server.program import Program
from stepwell_server.store.record import Texts


@dataclasses.dataclass(frozen=True, slots=True)
class ServedModel:
    """Everything that belongs to one model."""

    index: int
    """Its number in the session table."""
    name: str
    program: Program
    arena: Arena
    slots: Slots
    replies: Replies
    loop: PassLoop
    texts: Texts
    """Of its sessions' records."""
