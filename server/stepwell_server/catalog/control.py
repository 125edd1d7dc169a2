"""What those who serve admins ask of the one who loads models, and what they are told: plain values and one protocol."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from stepwell_server.catalog.files.uploads import Uploaded
from stepwell_server.engine.api import SessionPolicy

Progress = Callable[[str], None]
"""Called on the event loop with each stage as it begins: `waiting`, those of compiling, `warm up`, `switch`."""
WAITING, WARM_UP, SWITCH = "waiting", "warm up", "switch"


class VersionState(enum.Enum):
    """How a version is."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """It is served to the sessions that it has, and unloaded when they have ended."""
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version as it is now, be it served or not."""

    version: int
    state: VersionState
    reason: str = ""
    """The stage of one that is being loaded, why one failed; of one that is served what is to be known of it, mostly nothing."""
    fingerprint: str = ""
    """Empty as long as it is not known."""
    is_default: bool = False
    labels: Sequence[str] = ()
    sessions: int = 0
    """Open sessions on it, of those in memory."""
    path: str = ""
    """The file that it came from."""
    loaded: float = 0.0
    """When it was loaded, in seconds since the epoch; 0: it is not."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """A version to load, from a file on the server's disk or one that was uploaded."""

    name: str
    version: int = 0
    """0: one more than the highest that the name ever had."""
    path: str = ""
    upload: str = ""
    """In place of a path: what an upload was called."""
    is_temporary: bool = False
    """The file of the path will not be there after the load."""
    keep_default: bool = False
    """It stays beside the default. Else, and if the name is served by nothing else, it becomes the default."""
    policy: SessionPolicy = SessionPolicy.KEEP
    """What becomes of the sessions that follow the default. With `keep_default` it is only judged whether that could be."""
    migration: str = ""
    """For `MIGRATE`: the name of the function; empty: the only one there is."""
    labels: Sequence[str] = ()
    unload_previous: bool = False
    """The version that was the default is unloaded once it has no sessions."""
    keep_previous: bool = False
    """It stays loaded, also if it has no sessions."""
    tenant: str = ""
    """Whose admin asks: its quota of models is charged."""
    is_found: bool = False
    """The server itself has found the path: it need not lie in `--models`."""
    is_charged: bool = True
    """Somebody asks by a call; else the server itself does: no quota counts, and the path is where the operator said."""


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedVersion:
    """What came of a load."""

    version: int
    previous: int
    """The default before, if it moved; else 0."""
    sessions: int
    """Sessions in memory that were moved to it, or will be when they are next used."""


class ModelControl(Protocol):
    """Loads models and unloads them. Lives on the event loop."""

    async def load(self, request: LoadRequest, progress: Progress | None = None) -> LoadedVersion:
        """Load a version beside the traffic, and make it the default if that is asked for.

        If the waiting task is cancelled, the load stops, unless its switch has begun: then it is finished.

        Raises:
            InvalidInput: a value breaks a rule.
            VersionExists: there is such a version, or it is being loaded.
            QuotaExceeded: the tenant has too many versions loaded.
            ModelLoadFailed: the file cannot be served.
            SpecsDiffer, MigrationFailed: the sessions cannot be moved to it.
            Unavailable: the store did not keep it.
        """

    async def unload(self, name: str, version: int, *, force: bool) -> None:
        """Serve a version no longer (0: none of the name's), or stop loading it, or forget that it failed.

        Raises:
            ModelNotFound, VersionNotFound: there is none.
            ModelInUse: it is the default, or has sessions, and `force` is not given.
        """

    async def set_default(
        self,
        name: str,
        version: int,
        policy: SessionPolicy,
        migration: str = "",
        *,
        keep_previous: bool = False,
    ) -> LoadedVersion:
        """Make a loaded version the default. The one before is unloaded when its last session ends, if they stay on it.

        Args:
            name: of the model.
            version: that is to be the default.
            policy: what becomes of the sessions that follow the default.
            migration: see `LoadRequest`.
            keep_previous: the one before stays loaded in any case.

        Raises:
            ModelNotFound, VersionNotFound: there is none.
            SpecsDiffer, MigrationFailed: the sessions cannot be moved to it.
        """

    async def set_label(self, name: str, label: str, version: int) -> None:
        """Give a label to a loaded version; 0 takes it away.

        Raises:
            InvalidInput: it cannot be a label.
            ModelNotFound, VersionNotFound: there is no such version, or no such label to take away.
        """

    def drain(self, name: str, version: int, *, drains: bool = True) -> None:
        """Unload a version as soon as it has no sessions, no label, and is not the default; or do so no longer."""

    def default_elsewhere(self, name: str) -> int:
        """The default of a name if it is not loaded here, where other servers share the store; else 0."""

    def statuses(self) -> Mapping[str, Sequence[VersionStatus]]:
        """The versions of each name in their order, those that are being loaded or failed among them."""

    def status(self, name: str) -> Sequence[VersionStatus]:
        """The versions of one name; empty if there are none."""

    async def begin_upload(self, filename: str, tenant: str) -> Upload:
        """Begin to take a file.

        Raises:
            UploadOff: the server takes none.
            InvalidInput: it cannot be a model's name.
            Overloaded: too many are there.
        """


class Upload(Protocol):
    """A file on its way. Ends by one of `finish` and `abort`. Lives on the event loop."""

    async def write(self, content: bytes) -> None:
        """Take the next bytes.

        Raises:
            MessageTooLarge: the file is larger than a model may be.
            Unavailable: the disk does not take them.
        """

    async def finish(self) -> Uploaded:
        """It is whole.

        Raises:
            InvalidInput: it is empty.
            Unavailable: the disk does not take it.
        """

    async def abort(self) -> None:
        """Forget what has come."""


@dataclasses.dataclass(frozen=True, slots=True)
class VersionCounts:
    """What metrics say of the versions of a name."""

    by_state: Mapping[VersionState, int]
    default: int
    """0: none is served."""


def counts_of(statuses: Mapping[str, Sequence[VersionStatus]]) -> dict[str, VersionCounts]:
    """How many versions of each name are how."""
    return {
        name: VersionCounts(
            {state: sum(one.state is state for one in versions) for state in VersionState},
            next((one.version for one in versions if one.is_default), 0),
        )
        for name, versions in statuses.items()
    }
