"""Sets: the sessions of a group, named once on a stream and by a number from then on. No I/O.

`sessions.proto` says what a set is. A server from before there were sets takes no notice of a declaration, and one
that has no room declines it: then frames go on naming ids. Either shows in the answer to the frame that declares.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell._ranking import Keys, keys_of


class SessionSet:
    """Sessions that are changed together again and again. Two of them are equal only if they are the same object."""

    __slots__ = ("__weakref__", "_keys", "ids", "rows", "split")

    def __init__(self, ids: Sequence[str], rows: npt.NDArray[np.intp]) -> None:
        self.ids = ids
        self.rows = rows
        """Of each session."""
        self._keys: Keys | None = None
        self.split: tuple[int, Any] = (-1, None)
        """For clients of several replicas: the epoch of a router, and the sets of the members that each replica had then."""

    def keys(self) -> Keys:
        """The keys of the sessions: see `_ranking`."""
        if self._keys is None:
            self._keys = keys_of(self.ids)
        return self._keys


@dataclasses.dataclass(slots=True)
class Naming:
    """What a stream calls a set."""

    number: int
    is_known: bool | None = None
    """Whether the server knows it; None: no frame that declares it was answered."""

    def lost(self) -> None:
        """The server does not know it, though it did."""
        self.is_known = None

    def answered(self, declared: int) -> None:
        """A frame that declares it was answered."""
        if self.is_known is None:
            self.is_known = declared == self.number


class StreamSets:
    """What one stream calls its sets.

    A frame must be sent before `name` is called for the next one: numbers are declared in their order.
    """

    def __init__(self) -> None:
        self._named: dict[weakref.ref[SessionSet], Naming] = {}
        self._numbers = itertools.count(1)
        # Appended to by whatever thread happens to collect a set.
        self._unneeded: collections.deque[int] = collections.deque()

    def name(self, sessions: SessionSet) -> Naming:
        """What a frame that is about to be sent calls a set: declared by it unless that has been answered."""
        naming = self._named.get(weakref.ref(sessions))
        if naming is not None and naming.is_known is None:
            self._unneeded.append(naming.number)  # the server may know it; its answer was lost
            naming = None
        if naming is None:
            naming = Naming(next(self._numbers))
            self._named[weakref.ref(sessions, self._collected)] = naming
        return naming

    def _collected(self, sessions: weakref.ref[SessionSet]) -> None:
        naming = self._named.pop(sessions, None)
        if naming is not None and naming.is_known is not False:
            self._unneeded.append(naming.number)

    def unneeded(self) -> Iterator[int]:
        """Numbers that the server may forget, each once."""
        while self._unneeded:
            yield self._unneeded.popleft()
