"""Versions of models on the client: their names, and sessions that move to another version."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stepwell._base.flow import Flow, Notify
from stepwell._base.log import LOG
from stepwell.events import EventHooks, ModelVersionEvent

_MARK = re.compile("[@:]")


def name_of(reference: str) -> str:
    """The name in `NAME`, `NAME@VERSION` or `NAME:LABEL`."""
    return _MARK.split(reference, maxsplit=1)[0]


def is_pinned(reference: str) -> bool:
    """Whether a session that is opened by this reference stays on its version when the default moves."""
    return _MARK.search(reference) is not None


def reference(name: str, version: int) -> str:
    """Refers to one version of a model, or to the default one if the server is too old to report versions."""
    return f"{name}@{version}" if version else name


class VersionWatch:
    """Reports sessions that move to another version of their model."""

    def __init__(self, hooks: EventHooks | None, address: str) -> None:
        self._hooks = (hooks or {}).get("model_version", ())
        self._address = address

    def moved(self, model: str, session_ids: Sequence[str], previous: int, version: int) -> Flow[None]:
        """Reports that sessions have moved from one version to another."""
        LOG.info(
            "%d sessions of the model %r at %s moved from version %d to version %d",
            len(session_ids), model, self._address, previous, version,
        )  # fmt: skip
        if self._hooks:
            event = ModelVersionEvent(self._address, model, tuple(session_ids), previous, version)
            yield Notify(self._hooks, event)
