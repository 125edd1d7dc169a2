"""What is refused to those who load models and choose versions, in the same words wherever it is found out."""

from __future__ import annotations

from collections.abc import Mapping

from stepwell_server.core.model_names import LABEL_RULE, is_label
from stepwell_server.errors import InvalidInput, UploadOff, VersionNotFound


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
