"""Sessions of groups: those that are changed together again and again, and what follows from their ids. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell.v1 import sessions_pb2


class SessionSet:
    """Sessions that are changed together again and again. Two of them are equal only if they are the same object."""

    __slots__ = ("_encoded", "ids", "keys", "rows", "split")

    def __init__(self, ids: Sequence[str], rows: npt.NDArray[np.intp]) -> None:
        self.ids = ids
        self.rows = rows
        """Of each session."""
        self.keys: Any = None
        """What a router has made of the ids; None before that."""
        self._encoded = b""
        self.split: tuple[int, Any] = (-1, None)
        """For clients of several replicas: the epoch of a router, and the sets of the members that each replica had then."""

    def encoded(self) -> bytes:
        """The ids as a frame has them. A frame of many takes a third longer to make if they are encoded each time."""
        if not self._encoded:
            self._encoded = sessions_pb2.StepFrame(session_ids=self.ids).SerializeToString()
        return self._encoded
