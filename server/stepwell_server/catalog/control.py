"""What callers of the catalog ask for, what they get, and what is refused to them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence

from stepwell_server.core.model_names import (
    LABEL_RULE,
    MAX_VERSION,
    NAME_RULE,
    is_label,
    is_name,
    is_version,
)
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import InvalidInput, VersionNotFound

Progress = Callable[[str], None]
"""Called on the event loop with each stage as it begins: `waiting`, those of compiling, `warm up`, `switch`."""
_MAX_LABELS = 16
WAITING, WARM_UP, SWITCH = "waiting", "warm up", "switch"


class VersionState(enum.Enum):
    """The state of a version."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """It is served to the sessions that it has, and unloaded when they have ended."""
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version as it is now, served or not."""

    version: int
    state: VersionState
    reason: str = ""
    """The stage of a load, why one failed, or a remark on a served version; empty in the common case."""
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
    """A call asks for it. Else the server itself does: no quota counts, and the path is used as it is."""
    is_before_start: bool = False
    """The engine is not started yet: it reads what the store has of the version when it starts."""
    is_fatal: bool = False
    """A failure ends the start, whose one line says why: it is not logged."""
    fingerprint: str = ""
    """The server loads again what it had: from the path as it is, if that has the weights still."""

    def require_valid(self) -> None:
        """Raises `InvalidInput` if an argument breaks its rule."""
        if not is_name(self.name):
            raise InvalidInput(f"name must be {NAME_RULE}; got {self.name[:160]!r}")
        if self.version and not is_version(self.version):
            raise InvalidInput(f"version must be 0, for the next one, to {MAX_VERSION}; got {self.version}")
        if bool(self.path) is bool(self.upload):
            raise InvalidInput("path or upload must be given; got " + ("both" if self.path else "neither"))
        if self.keep_default and self.unload_previous:
            raise InvalidInput(
                "unload_previous must be left out with keep_default: the default does not move"
            )
        if self.migration and self.policy is not SessionPolicy.MIGRATE:
            raise InvalidInput(
                f"migration must be left out unless sessions is migrate; got {self.migration[:160]!r}"
            )
        if len(self.labels) > _MAX_LABELS:
            raise InvalidInput(f"labels must be at most {_MAX_LABELS}; got {len(self.labels)}")
        for label in self.labels:
            require_label(label)


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedVersion:
    """What came of a load."""

    version: int
    previous: int
    """The default before, if it moved; else 0."""
    sessions: int
    """Sessions in memory that were moved to it, or will be when they are next used."""


@dataclasses.dataclass(frozen=True, slots=True)
class VersionCounts:
    """What metrics say of the versions of a name."""

    by_state: Mapping[VersionState, int]
    default: int
    """0: none is served."""


def counts_of(statuses: Mapping[str, Sequence[VersionStatus]]) -> dict[str, VersionCounts]:
    """Count the versions of each name by their states."""
    return {
        name: VersionCounts(
            {state: sum(one.state is state for one in versions) for state in VersionState},
            next((one.version for one in versions if one.is_default), 0),
        )
        for name, versions in statuses.items()
    }


def require_label(label: str) -> None:
    """Refuse what cannot be a label.

    Raises:
        InvalidInput: it cannot.
    """
    if not is_label(label):
        raise InvalidInput(f"label must be {LABEL_RULE}; got {label[:160]!r}")


def no_version(name: str, version: int, known: Mapping[int, object]) -> VersionNotFound:
    """A version is not loaded; `known` are."""
    return VersionNotFound(
        f"version of model {name!r} must be one that is loaded, {sorted(known)}; got {version}",
        model=name,
        version=str(version),
    )
