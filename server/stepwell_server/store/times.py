"""What a store on disk writes down of its own work, for metrics."""

from __future__ import annotations

from stepwell_server.series import Series


class StoreTimes:
    """Durations in seconds of what succeeded. Written by the thread that commits; others may read."""

    def __init__(self) -> None:
        self.log = Series()
        """Of a write to the log: until the disk has it, if it is waited for."""
        self.data = Series()
        """The same of a transaction of LMDB."""
        self.log_records = 0
        """How many records were written to the log: what comes together is one write."""
