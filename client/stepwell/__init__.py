"""Stepwell: recurrent models served to many live users, each with a state of their own.

    import stepwell

    with stepwell.connect("127.0.0.1:50051") as client:
        with client.open_session("forecast") as session:
            y = session.step(x)

The async client is `stepwell.aio`; a server for tests is `stepwell.testing.LocalServer`.
"""

from stepwell import aio, config, errors
from stepwell._state import State
from stepwell._types import ModelInfo, SessionInfo, TensorInfo
from stepwell.client import Client, connect
from stepwell.errors import (
    ClosedError,
    DeadlineExceededError,
    InternalError,
    InvalidInputError,
    ModelMismatchError,
    ModelNotFoundError,
    OverloadedError,
    RefusedError,
    RevisionConflictError,
    SessionExistsError,
    SessionExpiredError,
    SessionGoneError,
    SessionLostError,
    SessionNotFoundError,
    StateCorruptError,
    StepwellError,
    UnavailableError,
)
from stepwell.group import SessionGroup
from stepwell.session import Session

__all__ = [
    "Client",
    "ClosedError",
    "DeadlineExceededError",
    "InternalError",
    "InvalidInputError",
    "ModelInfo",
    "ModelMismatchError",
    "ModelNotFoundError",
    "OverloadedError",
    "RefusedError",
    "RevisionConflictError",
    "Session",
    "SessionExistsError",
    "SessionExpiredError",
    "SessionGoneError",
    "SessionGroup",
    "SessionInfo",
    "SessionLostError",
    "SessionNotFoundError",
    "State",
    "StateCorruptError",
    "StepwellError",
    "TensorInfo",
    "UnavailableError",
    "aio",
    "config",
    "connect",
    "errors",
]
