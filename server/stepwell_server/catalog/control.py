"""The requests and results of the catalog."""

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
"""Called on the event loop when a stage begins: `waiting`, the stages of compiling, `warm up`, `switch`."""
_MAX_LABELS = 16
WAITING, WARM_UP, SWITCH = "waiting", "warm up", "switch"


class VersionState(enum.Enum):
    """The state of a version."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """It serves its remaining sessions and is unloaded when they have ended."""
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class VersionStatus:
    """The current status of a version, served or not."""

    version: int
    state: VersionState
    reason: str = ""
    """The stage of a load, the reason of a failure, or a remark on a served version; usually empty."""
    fingerprint: str = ""
    """Empty if not known yet."""
    is_default: bool = False
    labels: Sequence[str] = ()
    sessions: int = 0
    """The number of its open sessions in memory."""
    path: str = ""
    """The file that it was loaded from."""
    loaded: float = 0.0
    """When it was loaded, in seconds since the epoch; 0: it is not loaded."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """A version to load, from a file on the server's disk or an upload."""

    name: str
    version: int = 0
    """0: one more than the highest version the name ever had."""
    path: str = ""
    upload: str = ""
    """The token of an upload, instead of a path."""
    is_temporary: bool = False
    """The file will be deleted after the load."""
    keep_default: bool = False
    """The default does not change. Otherwise, or if the name has no other version, this one becomes the default."""
    policy: SessionPolicy = SessionPolicy.KEEP
    """What happens to the sessions that follow the default. With `keep_default`, only checked for being possible."""
    migration: str = ""
    """For `MIGRATE`: the name of the function; empty: the only one."""
    labels: Sequence[str] = ()
    unload_previous: bool = False
    """Unload the previous default once it has no sessions."""
    keep_previous: bool = False
    """Keep the previous default loaded even without sessions."""
    tenant: str = ""
    """The tenant of the caller, whose quota of models is charged."""
    is_found: bool = False
    """The server itself found the path, which need not be in `--models`."""
    is_charged: bool = True
    """A call requested the load. Otherwise the server did: no quota applies, and the path is used unchanged."""
    is_before_start: bool = False
    """The engine has not started yet, and will read the stored document of the model when it does."""
    is_fatal: bool = False
    """A failure ends the start, which prints the reason: it is not logged."""
    fingerprint: str = ""
    """The expected fingerprint, when the server reloads a version: the path is used unchanged if its weights match."""

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
    """The result of a load."""

    version: int
    previous: int
    """The previous default if it changed; else 0."""
    sessions: int
    """The number of sessions in memory that were moved to it, or will be on their next use."""


@dataclasses.dataclass(frozen=True, slots=True)
class VersionCounts:
    """The versions of a name, counted for metrics."""

    by_state: Mapping[VersionState, int]
    default: int
    """0: no version is served."""


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
    """Check a label.

    Raises:
        InvalidInput: it is not a valid label.
    """
    if not is_label(label):
        raise InvalidInput(f"label must be {LABEL_RULE}; got {label[:160]!r}")


def no_version(name: str, version: int, known: Mapping[int, object]) -> VersionNotFound:
    """Return the error for a version that is not loaded; `known` are the loaded ones."""
    return VersionNotFound(
        f"version of model {name!r} must be one that is loaded, {sorted(known)}; got {version}",
        model=name,
        version=str(version),
    )
