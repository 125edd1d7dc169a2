"""The part of sessions, groups and clients that makes no calls, for the sync and the async client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from stepwell._batching.frames import Counts
from stepwell._core.core import Core
from stepwell._core.group_core import GroupCore
from stepwell._core.locks import Locks, Some
from stepwell._core.tracker import SessionTracker
from stepwell._routing.replica import ReplicaInfo
from stepwell._state import display
from stepwell._state.arguments import check_count
from stepwell._state.infos import StateSelection
from stepwell._tape.recording import Recording, check_recorded
from stepwell._tape.reel import Reel, Subject
from stepwell._tape.tape import RecordedStates, Tape
from stepwell.config import ClientConfig
from stepwell.errors import ClosedError

ALONE = 0
"""The index of a session among the locks of a group of one."""


class HasCore(Protocol):
    """What runs the flows of a client."""

    @property
    def core(self) -> Core:
        """The operations of the client."""


D = TypeVar("D", bound=HasCore)
_REELS = threading.Lock()
"""Held while the reels of a handle change."""


class BaseHandle(Generic[D]):
    """The common part of a session and a group: one change of each member at a time, closing, and tapes."""

    _reels: tuple[Reel, ...] = ()
    """What its tapes record; a change of them makes a new tuple."""

    def __init__(
        self,
        driver: D,
        owned: bool,
        locks: Locks,
        members: Some = ALONE,
        parent: BaseHandle[Any] | None = None,
    ) -> None:
        """A handle.

        Args:
            driver: The driver of its client.
            owned: Whether the end of its `with` block closes it.
            locks: The locks of its members, shared with other handles of the same sessions.
            members: Which of the locks are its own.
            parent: The group that closes it.
        """
        self._driver = driver
        self._core = driver.core
        self._owned = owned
        self._closed = False
        self._locks = locks
        self._members = members
        self._parent = parent

    def _check_open(self) -> None:
        if self._closed or (self._parent is not None and self._parent._closed):
            raise ClosedError("the session must be open; it was closed by this handle")

    def _recording(
        self, states: RecordedStates, max_steps: int | None, subject: Callable[[], Subject]
    ) -> contextlib.AbstractContextManager[Tape]:
        """Checks the arguments of `record`; the result records while its block runs. `subject` describes the handle."""
        limit = None if max_steps is None else check_count("max_steps", max_steps)
        return Recording(self._recorded(check_recorded(states), limit, subject))

    @contextlib.contextmanager
    def _recorded(
        self, states: StateSelection, max_steps: int | None, subject: Callable[[], Subject]
    ) -> Iterator[Tape]:
        self._check_open()
        reel = Reel(subject(), states, max_steps)
        with _REELS:
            self._reels += (reel,)
        try:
            yield Tape(reel.content)
        finally:
            with _REELS:
                self._reels = tuple([each for each in self._reels if each is not reel])
            reel.end()


class ClientFacts:
    """The properties of a client."""

    _config: ClientConfig
    _core: Core
    _driver: Any
    """The sync or async driver of the client."""

    @property
    def address(self) -> str:
        """Address of the server, as gRPC takes it: HOST:PORT or unix:PATH, without grpc:// or grpcs://.

        The addresses of several replicas are separated by commas.
        """
        return self._config.address

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """The replicas as this client sees them now, without a call. A client of one server has one.

        It is empty if the address is a name that has not been looked up yet.

        Example:
            >>> [replica.is_up for replica in client.replicas]
            [True]
        """
        return self._core.replicas

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    def _repr_html_(self) -> str:
        return display.handle_html(type(self).__name__, self._facts(), is_closed=self._driver.is_closed)

    def _facts(self) -> dict[str, object]:
        return {
            "address": self._config.address,
            "time limit of a call": f"{self._config.timeout_s:g} s",
            "TLS": "no" if self._config.tls is None else "yes",
        }


class SessionFacts:
    """The properties of a session."""

    _tracker: SessionTracker
    _closed: bool

    def _subject(self) -> Subject:
        tracker = self._tracker
        counts = (tracker.revision, tracker.position, tracker.model_version)
        arrays = [np.array([count], np.uint64) for count in counts]
        return Subject(tracker.model, tracker.fingerprint, tracker.batch_size, False, *arrays)

    @property
    def id(self) -> str:
        """The session's id on the server."""
        return self._tracker.session_id

    @property
    def model(self) -> str:
        """Name of the session's model."""
        return self._tracker.model

    @property
    def batch_size(self) -> int:
        """Number of rows, fixed when the session was opened."""
        return self._tracker.batch_size

    @property
    def revision(self) -> int:
        """Number of changes of the session, as of the last answer to this handle."""
        return self._tracker.revision

    @property
    def position(self) -> int:
        """Time steps since the last reset of the whole state, as of the last answer to this handle."""
        return self._tracker.position

    @property
    def model_version(self) -> int:
        """Version of the model that the session uses, as of the last answer to this handle.

        It is 0 if the server does not report it.
        """
        return self._tracker.model_version

    @property
    def model_version_pinned(self) -> bool:
        """Whether the session stays on that version because it was opened with a version or a label.

        Otherwise it follows the default version, as the operator decides.
        """
        return self._tracker.model_version_pinned

    @property
    def resumed(self) -> bool:
        """Whether the call that opened this handle resumed a live session; False for a new session and for a fork."""
        return self._tracker.resumed

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.id!r}, model={self.model!r}, batch_size={self.batch_size}, "
            f"revision={self.revision}, position={self.position})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "id": self.id,
            "model": self.model,
            "batch_size": self.batch_size,
            "revision": self.revision,
            "position": self.position,
        }
        return display.handle_html(type(self).__name__, facts, is_closed=self._closed)


class GroupFacts:
    """The properties of a group."""

    _group: GroupCore
    _closed: bool

    def _subject(self) -> Subject:
        tracker = self._group.tracker
        counts = (self.revisions, self.positions, self.model_versions)
        return Subject(tracker.model, tracker.fingerprint, tracker.batch_size, True, *counts)

    def __len__(self) -> int:
        return len(self._group.members)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the members, in their order."""
        return self._group.members.ids

    @property
    def model(self) -> str:
        """Name of the members' model."""
        return self._group.tracker.model

    @property
    def batch_size(self) -> int:
        """Number of rows of each member."""
        return self._group.tracker.batch_size

    @property
    def revisions(self) -> Counts:
        """Number of changes of each member, as of the last answers: a copy, (n,) uint64."""
        return self._group.tracker.revisions[self._group.members.indexes]

    @property
    def positions(self) -> Counts:
        """Time steps of each member since its last reset, as of the last answers: a copy, (n,) uint64."""
        return self._group.tracker.positions[self._group.members.indexes]

    @property
    def resumed(self) -> npt.NDArray[np.bool_]:
        """Which members `open_sessions(resume=True)` resumed: a copy, (n,) bool."""
        return self._group.tracker.resumed[self._group.members.indexes]

    @property
    def model_versions(self) -> Counts:
        """Version of the model that each member uses, as of the last answers: a copy, (n,) uint64.

        It is 0 where the server does not report it.
        """
        return self._group.tracker.model_versions[self._group.members.indexes]

    @property
    def model_version_pinned(self) -> bool:
        """Whether the members stay on their version; see `Session.model_version_pinned`."""
        return self._group.tracker.is_pinned

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} sessions, model={self.model!r}, batch_size={self.batch_size})"
        )

    def _repr_html_(self) -> str:
        facts = {
            "sessions": len(self),
            "ids": display.some(self.ids),
            "model": self.model,
            "batch_size": self.batch_size,
            "revisions": display.span(self.revisions),
            "positions": display.span(self.positions),
        }
        return display.handle_html(type(self).__name__, facts, is_closed=self._closed)
