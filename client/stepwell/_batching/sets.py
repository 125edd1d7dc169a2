"""Sessions of groups that are often changed together, and data derived from their ids. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell.v1 import sessions_pb2


class SessionSet:
    """Sessions that are often changed together. Compared by identity."""

    __slots__ = ("_encoded", "ids", "keys", "rows", "split")

    def __init__(self, ids: Sequence[str], rows: npt.NDArray[np.intp]) -> None:
        self.ids = ids
        self.rows = rows
        """Rows of each session."""
        self.keys: Any = None
        """The keys that a router has computed from the ids; None before that."""
        self._encoded = b""
        self.split: tuple[int, Any] = (-1, None)
        """For clients of several replicas: the router's epoch, and the members of each replica at that time, as sets."""

    def encoded(self) -> bytes:
        """The ids as encoded in a frame. Encoding them each time would make large frames a third slower."""
        if not self._encoded:
            self._encoded = encoded_ids(self.ids)
        return self._encoded


def encoded_ids(ids: Sequence[str]) -> bytes:
    """The ids as encoded in a frame of either kind."""
    return sessions_pb2.StepFrame(session_ids=ids).SerializeToString()
