"""Stepwell serves recurrent models to many live users and keeps a separate state for each.

::

    import stepwell

    with stepwell.connect("127.0.0.1:50051") as client:
        with client.open_session("forecast") as session:
            y = session.step(x)

In a notebook or a script, `stepwell.local("forecast.keras")` also starts the server. `stepwell.aio` is the async
client. `stepwell.testing.LocalServer` is a server for tests.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepwell import aio, config, errors, events, plot
    from stepwell._admin.admin import ExportReport, ImportReport
    from stepwell._admin.session_list import SessionList
    from stepwell._local import LocalClient, local
    from stepwell._routing.replica import ReplicaInfo
    from stepwell._state.infos import (
        LayerInfo,
        LoadedModel,
        ModelInfo,
        ModelVersionInfo,
        ProofInfo,
        ProvenanceInfo,
        ServerInfo,
        SessionInfo,
        SlowSession,
        TensorInfo,
    )
    from stepwell._state.state import State
    from stepwell._state.trace import Trace
    from stepwell._tape.tape import Tape
    from stepwell._watch.events import (
        ModelActivity,
        ReplicaActivity,
        ServerActivity,
        SessionEvent,
        StageLatency,
    )
    from stepwell._watch.watch import Watch
    from stepwell.client import Client, connect
    from stepwell.config import TlsConfig
    from stepwell.errors import (
        ClosedError,
        DeadlineExceededError,
        InternalError,
        InvalidInputError,
        MigrationFailedError,
        ModelInUseError,
        ModelLoadError,
        ModelMismatchError,
        ModelNotFoundError,
        ModelVersionExistsError,
        OverloadedError,
        PermissionDeniedError,
        RefusedError,
        ReplyTooLargeError,
        RevisionConflictError,
        ServerStartError,
        SessionExistsError,
        SessionExpiredError,
        SessionGoneError,
        SessionLostError,
        SessionNotFoundError,
        StateCorruptError,
        StepwellError,
        UnauthenticatedError,
        UnavailableError,
    )
    from stepwell.group import SessionGroup
    from stepwell.session import Session

__all__ = [
    "Client",
    "ClosedError",
    "DeadlineExceededError",
    "ExportReport",
    "ImportReport",
    "InternalError",
    "InvalidInputError",
    "LayerInfo",
    "LoadedModel",
    "LocalClient",
    "MigrationFailedError",
    "ModelActivity",
    "ModelInUseError",
    "ModelInfo",
    "ModelLoadError",
    "ModelMismatchError",
    "ModelNotFoundError",
    "ModelVersionExistsError",
    "ModelVersionInfo",
    "OverloadedError",
    "PermissionDeniedError",
    "ProofInfo",
    "ProvenanceInfo",
    "RefusedError",
    "ReplicaActivity",
    "ReplicaInfo",
    "ReplyTooLargeError",
    "RevisionConflictError",
    "ServerActivity",
    "ServerInfo",
    "ServerStartError",
    "Session",
    "SessionEvent",
    "SessionExistsError",
    "SessionExpiredError",
    "SessionGoneError",
    "SessionGroup",
    "SessionInfo",
    "SessionList",
    "SessionLostError",
    "SessionNotFoundError",
    "SlowSession",
    "StageLatency",
    "State",
    "StateCorruptError",
    "StepwellError",
    "Tape",
    "TensorInfo",
    "TlsConfig",
    "Trace",
    "UnauthenticatedError",
    "UnavailableError",
    "Watch",
    "aio",
    "config",
    "connect",
    "errors",
    "events",
    "local",
    "plot",
]

_MODULES = frozenset({"aio", "config", "errors", "events", "plot"})
_HOMES = {
    "Client": "client",
    "ExportReport": "_admin.admin",
    "ImportReport": "_admin.admin",
    "LayerInfo": "_state.infos",
    "LoadedModel": "_state.infos",
    "LocalClient": "_local",
    "ModelInfo": "_state.infos",
    "ModelVersionInfo": "_state.infos",
    "ProofInfo": "_state.infos",
    "ProvenanceInfo": "_state.infos",
    "ReplicaInfo": "_routing.replica",
    "ServerInfo": "_state.infos",
    "SlowSession": "_state.infos",
    "Session": "session",
    "SessionGroup": "group",
    "SessionInfo": "_state.infos",
    "SessionList": "_admin.session_list",
    "State": "_state.state",
    "Tape": "_tape.tape",
    "TensorInfo": "_state.infos",
    "TlsConfig": "config",
    "Trace": "_state.trace",
    "ModelActivity": "_watch.events",
    "ReplicaActivity": "_watch.events",
    "ServerActivity": "_watch.events",
    "SessionEvent": "_watch.events",
    "StageLatency": "_watch.events",
    "Watch": "_watch.watch",
    "connect": "client",
    "local": "_local",
}
"""The module of each exported name that is no error."""


if not TYPE_CHECKING:  # with it, type checkers would accept any name

    def __getattr__(name: str) -> object:
        """Imports what is asked for (PEP 562): the server and `stepwell --help` need little of this package."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
