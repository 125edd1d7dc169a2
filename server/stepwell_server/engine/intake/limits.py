"""How much may wait: rows for each model, bytes of inputs over all of them. The one count of it."""

from __future__ import annotations

from stepwell_server.engine.change import Change
from stepwell_server.engine.intake.row_queue import RowQueue
from stepwell_server.engine.intake.turns import Turns
from stepwell_server.engine.state.model import Model
from stepwell_server.errors import Overloaded

#: Rows that may wait for passes, in passes of full size.
MAX_WAITING_PASSES = 64
#: Bytes of inputs that may wait, over all models.
MAX_WAITING_BYTES = 512 << 20


class Limits:
    """Counts what waits and refuses what is too much. Lives on the event loop."""

    def __init__(self, turns: Turns, row_queue: RowQueue) -> None:
        self._turns = turns
        self._row_queue = row_queue
        self.bytes_waiting = 0

    def waiting(self, model: Model) -> int:
        """Rows and changes of a model that wait: in its inbox, for their session, for rows, for a pass."""
        in_line = self._turns.waiting(model.index) + self._row_queue.count(model.index)
        return model.in_inbox + model.ready.rows_waiting + in_line

    def require_rows(self, model: Model, count: int) -> None:
        """Refuse `count` rows if too many wait already.

        Raises:
            Overloaded: with the time after which there should be room.
        """
        limit = MAX_WAITING_PASSES * model.max_batch_rows
        waiting = self.waiting(model)
        if waiting and waiting + count > limit:
            raise Overloaded(
                f"rows waiting for model {model.name!r} must stay within {limit}; {waiting} wait and {count} came",
                retry_after_s=max(0.01, model.expected_wait_s / 2),
            )

    def require_bytes(self, model: Model, count: int) -> None:
        """Refuse `count` bytes of inputs if too many wait already.

        Raises:
            Overloaded: with the time after which there should be room.
        """
        if self.bytes_waiting and self.bytes_waiting + count > MAX_WAITING_BYTES:
            raise Overloaded(
                f"input bytes waiting must stay within {MAX_WAITING_BYTES};"
                f" {self.bytes_waiting} wait and {count} came",
                retry_after_s=max(0.01, model.expected_wait_s / 2),
            )

    def take(self, change: Change) -> None:
        """Count the bytes of a change until every member has its answer.

        Raises:
            Overloaded: too much waits already, and nothing is counted.
        """
        count = change.byte_count
        self.require_rows(change.model, change.row_count)
        self.require_bytes(change.model, count)
        self.bytes_waiting += count

        def give() -> None:
            self.bytes_waiting -= count

        change.on_end = give
