"""Handles of sessions and groups without their calls: what both clients know of them."""

from __future__ import annotations

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
from stepwell.config import ClientConfig
from stepwell.errors import ClosedError

ALONE = 0
"""The member that a session is of the locks of a group of one."""


class HasCore(Protocol):
    """What runs the flows of a client."""

    @property
    def core(self) -> Core:
        """The operations of the client."""


D = TypeVar("D", bound=HasCore)


class BaseHandle(Generic[D]):
    """What a session and a group have in common: one change at a time of each member, and an end."""

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
            driver: Of its client.
            owned: Leaving its `with` block closes it.
            locks: Those of its members, shared with other handles of the same sessions.
            members: Which of the locks.
            parent: The group with which it is closed.
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


class ClientFacts:
    """What a client says without a call."""

    _config: ClientConfig
    _core: Core
    _driver: Any
    """A driver of the kind of the client."""

    @property
    def address(self) -> str:
        """Where the server is, as gRPC takes it: HOST:PORT or unix:PATH, without grpc:// or grpcs://.

        The addresses of several replicas stand there with commas between.
        """
        return self._config.address

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        """The replicas as this client sees them now, without asking; of a client of one server that one.

        Those of a name that was not looked up yet are not known, and it has none.

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
    """What a handle of a session says without a call."""

    _tracker: SessionTracker
    _closed: bool

    @property
    def id(self) -> str:
        """Its id on the server."""
        return self._tracker.session_id

    @property
    def model(self) -> str:
        """Name of its model."""
        return self._tracker.model

    @property
    def batch_size(self) -> int:
        """Rows, fixed when it was opened."""
        return self._tracker.batch_size

    @property
    def revision(self) -> int:
        """Changes so far, as of the last answer to this handle."""
        return self._tracker.revision

    @property
    def position(self) -> int:
        """Time steps since the last reset of the whole state, as of the last answer to this handle."""
        return self._tracker.position

    @property
    def model_version(self) -> int:
        """Version of its model that it is on, as of the last answer to this handle; 0: the server does not say."""
        return self._tracker.model_version

    @property
    def model_version_pinned(self) -> bool:
        """Whether it stays on that version, because it was opened with a version or a label.

        Else it follows the default version, as the operator decides.
        """
        return self._tracker.model_version_pinned

    @property
    def resumed(self) -> bool:
        """Whether opening it found the session there and resumed it; False for a new one and for a fork."""
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
    """What a handle of a group says without a call."""

    _group: GroupCore
    _closed: bool

    def __len__(self) -> int:
        return len(self._group.members)

    @property
    def ids(self) -> tuple[str, ...]:
        """The members' ids, in their order."""
        return self._group.members.ids

    @property
    def model(self) -> str:
        """Name of their model."""
        return self._group.tracker.model

    @property
    def batch_size(self) -> int:
        """Rows of each member."""
        return self._group.tracker.batch_size

    @property
    def revisions(self) -> Counts:
        """Changes of each member so far, (n,) uint64; a copy."""
        return self._group.tracker.revisions[self._group.members.indexes]

    @property
    def positions(self) -> Counts:
        """Time steps of each member since its last reset, (n,) uint64; a copy."""
        return self._group.tracker.positions[self._group.members.indexes]

    @property
    def resumed(self) -> npt.NDArray[np.bool_]:
        """Which members were live before, (n,) bool; a copy. See `open_sessions(resume=True)`."""
        return self._group.tracker.resumed[self._group.members.indexes]

    @property
    def model_versions(self) -> Counts:
        """Version of the model that each member is on, as of the last answers, (n,) uint64; a copy.

        0 where the server does not say.
        """
        return self._group.tracker.model_versions[self._group.members.indexes]

    @property
    def model_version_pinned(self) -> bool:
        """Whether they stay on their version; see `Session.model_version_pinned`."""
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
