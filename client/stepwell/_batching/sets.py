"""Sessions of groups: those that are changed together again and again, and what follows from their ids. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell._routing.ranking import Keys, keys_of
from stepwell.v1 import sessions_pb2


class SessionSet:
    """Sessions that are changed together again and again. Two of them are equal only if they are the same object."""

    __slots__ = ("_encoded", "_keys", "ids", "rows", "split")

    def __init__(self, ids: Sequence[str], rows: npt.NDArray[np.intp]) -> None:
        self.ids = ids
        self.rows = rows
        """Of each session."""
        self._keys: Keys | None = None
        self._encoded = b""
        self.split: tuple[int, Any] = (-1, None)
        """For clients of several replicas: the epoch of a router, and the sets of the members that each replica had then."""

    def keys(self) -> Keys:
        """The keys of the sessions: see `_routing.ranking`."""
        if self._keys is None:
            self._keys = keys_of(self.ids)
        return self._keys

    def encoded(self) -> bytes:
        """The ids as a frame has them. A frame of many takes a third longer to make if they are encoded each time."""
        if not self._encoded:
            self._encoded = sessions_pb2.StepFrame(session_ids=self.ids).SerializeToString()
        return self._encoded
