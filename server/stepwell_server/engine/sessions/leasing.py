"""A session gets another lease, or none, in a store that others use too: by a record that says nothing else anew."""

from __future__ import annotations

import asyncio
import math

import numpy as np

from stepwell_server.core.leases import Lease, Leases
from stepwell_server.core.sessions import SessionTable
from stepwell_server.engine.durability.committer import Committer
from stepwell_server.engine.durability.records import as_it_is
from stepwell_server.engine.intake.paging import Pager
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.models import Models
from stepwell_server.engine.types import Members
from stepwell_server.errors import ServerError, SessionGone


class Leasing:
    """Has the store know whose sessions are. Lives on the event loop."""

    def __init__(
        self,
        table: SessionTable,
        models: Models,
        turns: Turns,
        pager: Pager,
        committer: Committer,
        leases: Leases,
    ) -> None:
        self._table = table
        self._models = models
        self._turns = turns
        self._pager = pager
        self._committer = committer
        self._leases = leases

    async def give(self, handle: int, lease: Lease | None) -> bool:
        """Give a session that has a lease this one; one without a lease gets none. Result and errors are those of `keep`."""
        if not await self.keep(handle, lease):
            return False
        if not self._pager.is_shared and self._table.lease[handle]:
            # the store hears of it with the next change; until then the session counts as used now
            self._table.lease[handle] = 0 if lease is None else self._leases.number(lease)
        return True

    async def keep(self, handle: int, lease: Lease | None) -> bool:
        """Let a session that has a lease have this one when its turn comes, if the store must know it for other servers.

        Returns:
            False if it has ended, or another server has changed it meanwhile: then it is to be looked for again.

        Raises:
            Overloaded, Unavailable: the store did not keep it, as far as it says.
        """
        number = int(self._table.lease[handle])
        if not self._pager.is_shared or not number or self._leases.of(number) == lease:
            return True
        try:
            await self._turns.hold(handle, math.inf)
        except SessionGone:
            return False
        table, handles = self._table, np.array([handle])
        table.lease[handle] = 0 if lease is None else self._leases.number(lease)
        kept: asyncio.Future[ServerError | bool] = asyncio.get_running_loop().create_future()

        def answer(error: ServerError | None, _places: Members | None) -> None:
            kept.set_result(True if error is None else error)

        def again(_places: Members) -> None:
            kept.set_result(False)
            self._turns.release(handles)

        self._committer.commit(as_it_is(table, self._models.by_handle(handle), handles), answer, again)
        result = await asyncio.shield(kept)
        if isinstance(result, ServerError):
            raise result
        return result
