"""What is refused to those who load models and choose versions, in the same words wherever it is found out."""

from __future__ import annotations

from collections.abc import Mapping

from stepwell_server.catalog.control import LoadRequest
from stepwell_server.core.model_names import (
    LABEL_RULE,
    MAX_VERSION,
    NAME_RULE,
    is_label,
    is_name,
    is_version,
)
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import InvalidInput, UploadOff, VersionNotFound

_MAX_LABELS = 16


def require_label(label: str) -> None:
    """Refuse what cannot be a label.

    Raises:
        InvalidInput: it cannot.
    """
    if not is_label(label):
        raise InvalidInput(f"label must be {LABEL_RULE}; got {label[:160]!r}")


def upload_off() -> UploadOff:
    """The server takes no files."""
    return UploadOff(
        "the server takes no files: it must be started with --allow-model-upload; or give the path of a file on its disk"
    )


def no_version(name: str, version: int, known: Mapping[int, object]) -> VersionNotFound:
    """A version is not loaded; `known` are."""
    return VersionNotFound(
        f"version of model {name!r} must be one that is loaded, {sorted(known)}; got {version}",
        model=name,
        version=str(version),
    )


def require_valid(request: LoadRequest) -> None:
    """Raises `InvalidInput` if an argument of a load breaks its rule."""
    if not is_name(request.name):
        raise InvalidInput(f"name must be {NAME_RULE}; got {request.name[:160]!r}")
    if request.version and not is_version(request.version):
        raise InvalidInput(f"version must be 0, for the next one, to {MAX_VERSION}; got {request.version}")
    if bool(request.path) is bool(request.upload):
        raise InvalidInput("path or upload must be given; got " + ("both" if request.path else "neither"))
    if request.keep_default and request.unload_previous:
        raise InvalidInput("unload_previous must be left out with keep_default: the default does not move")
    if request.migration and request.policy is not SessionPolicy.MIGRATE:
        raise InvalidInput(
            f"migration must be left out unless sessions is migrate; got {request.migration[:160]!r}"
        )
    if len(request.labels) > _MAX_LABELS:
        raise InvalidInput(f"labels must be at most {_MAX_LABELS}; got {len(request.labels)}")
    for label in request.labels:
        require_label(label)
