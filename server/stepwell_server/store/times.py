"""What a store on disk writes down of its own work, for metrics."""

from __future__ import annotations

from stepwell_server.series import Series


class StoreTimes:
    """Durations in seconds, whether what took so long succeeded or not. Written by the thread that commits; others may read."""

    def __init__(self) -> None:
        self.commits = Series()
        """Of what came together."""
        self.log = Series()
        """Of a write to the log: until the disk has it, if it is waited for."""
        self.data = Series()
        """The same of a transaction of LMDB."""
        self.records = 0
        """How many were committed."""
