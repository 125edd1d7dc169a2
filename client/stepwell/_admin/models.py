"""Flows for those who change which models a server has: load, unload, default, labels.

**What is tried again.** A load that found no server is tried again, as every call. One that may have reached it, and whose
answer is lost, is not: without a number, which the server then chooses, it would load the file a second time. Its error
says that the outcome is "unknown". The same call with a version is safe to make again: the server refuses a version that
is there, so that it is loaded once. To send a file, to unload, to set a default or a label is the same however often it is
done, and is tried again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from stepwell._admin.everywhere import Everywhere
from stepwell._admin.model_files import Placed, is_name
from stepwell._base.flow import Flow
from stepwell._core.tracker import is_unknown
from stepwell._core.versions import reference
from stepwell._state.infos import LoadedModel
from stepwell._transport.retry import Deadline
from stepwell.errors import InternalError, InvalidInputError, StepwellError
from stepwell.v1 import models_pb2

if TYPE_CHECKING:
    from stepwell._core.core import Core
    from stepwell._routing.replica import Replica

SessionPolicy: TypeAlias = Literal["keep", "carry", "migrate", "reset"]
"""What becomes of the sessions that follow the default version of a model when it moves to another one.

"keep": they stay on their version until they end. "carry": they go on with their states under the new weights. "migrate":
a function of the operator's makes their new states of the old ones. "reset": they begin anew.
"""
LoadProgress: TypeAlias = Callable[[str], Any]
"""Called with what is done now, in a word or two, whenever that changes."""

_POLICIES: Mapping[str, models_pb2.SessionPolicy.ValueType] = {
    "keep": models_pb2.SESSION_POLICY_KEEP,
    "carry": models_pb2.SESSION_POLICY_CARRY,
    "migrate": models_pb2.SESSION_POLICY_MIGRATE,
    "reset": models_pb2.SESSION_POLICY_RESET,
}
_MAX_VERSION = 2**63 - 1
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LABEL_RULE = "1 to 64 letters, digits, _, - or ., not digits alone"
#: Of a file that is sent.
_PIECE_BYTES = 1 << 18


class ModelAdmin:
    """The flows; see `Client` for what they do. Arguments are checked before the first call."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def load_request(
        self,
        name: object,
        version: object,
        sessions: object,
        *,
        default: bool,
        migration: object,
        labels: object,
        unload_previous: bool,
    ) -> models_pb2.LoadModelRequest:
        """The request of a load, without the file.

        Raises:
            InvalidInputError: An argument breaks its rule.
        """
        request = models_pb2.LoadModelRequest(
            name=_name(name),
            version=0 if version is None else _version(version),
            keep_default=not default,
            labels=_labels(labels),
            unload_previous=unload_previous,
        )
        request.sessions, request.migration = _policy(sessions, migration)
        if not default and (sessions != "keep" or unload_previous):
            raise InvalidInputError(
                "sessions must be 'keep' and unload_previous False with default=False, for the default does not move; "
                f"got sessions={sessions!r} and unload_previous={unload_previous}"
            )
        return request

    def load(
        self,
        request: models_pb2.LoadModelRequest,
        file: Placed,
        deadline: Deadline,
        progress: LoadProgress | None,
    ) -> Flow[LoadedModel]:
        """Loads a version, sending its file before if the server cannot read it; on each replica, if there are several."""
        if progress is not None and not callable(progress):
            raise InvalidInputError(
                f"progress must be a function that takes a text, or None; got {progress!r}"
            )
        router = self._core.router
        if router is None:
            return (yield from self.load_one(request, file, deadline, progress))
        yield from router.ready()
        return (yield from Everywhere(self, router, request, deadline).load(file, progress))

    def load_one(
        self,
        request: models_pb2.LoadModelRequest,
        file: Placed,
        deadline: Deadline,
        progress: LoadProgress | None,
        to: Replica | None = None,
    ) -> Flow[LoadedModel]:
        """Loads a version on one server."""
        if file.is_sent:
            request.upload = yield from self._upload(file.path, deadline, progress, to)
        else:
            request.path, request.is_temporary = file.path, file.is_temporary
        last = models_pb2.LoadModelResponse()

        def on_reply(reply: models_pb2.LoadModelResponse) -> None:
            if reply.HasField("model"):
                last.CopyFrom(reply)
            elif progress is not None:
                progress(reply.stage)

        try:
            yield from self._core.retrier.streamed("LoadModel", request, deadline, on_reply, to=to)
        except StepwellError as error:
            raise _explained(error, request) from None
        if not last.HasField("model"):
            raise InternalError("the server ended the load of a model without an answer")
        return (yield from self.loaded(last.model, last.version, deadline, last.moved_sessions, to=to))

    def _upload(
        self, path: str, deadline: Deadline, progress: LoadProgress | None, to: Replica | None
    ) -> Flow[str]:
        """Sends a file; the result is what the server calls it."""
        size = os.stat(path).st_size
        if progress is not None:
            progress(f"upload of {size / 1e6:.1f} MB")
        digest = hashlib.sha256()

        def pieces() -> Iterator[models_pb2.UploadModelRequest]:
            nonlocal digest
            digest = hashlib.sha256()
            filename = os.path.basename(path)
            with open(path, "rb") as file:
                while (piece := file.read(_PIECE_BYTES)) or filename:
                    digest.update(piece)
                    yield models_pb2.UploadModelRequest(filename=filename, content=piece)
                    filename = ""

        with open(path, "rb"):  # what cannot be read, or is a folder, is refused by its name
            pass
        reply: models_pb2.UploadModelResponse = yield from self._core.retrier.sent(
            "UploadModel", pieces, deadline, to=to
        )
        if reply.sha256 != digest.hexdigest():
            raise InternalError(
                f"the file {path} did not arrive as it was sent: SHA-256 {digest.hexdigest()} became {reply.sha256}"
            )
        return reply.upload

    def loaded(
        self,
        model: models_pb2.Model,
        version: int,
        deadline: Deadline,
        moved: int,
        previous: int = 0,
        to: Replica | None = None,
    ) -> Flow[LoadedModel]:
        """What became of a model; described as the version that was meant."""
        if model.version != version:
            request = models_pb2.GetModelRequest(name=reference(model.name, version))
            reply: models_pb2.GetModelResponse = yield from self._core.retrier.call(
                "GetModel", request, deadline, to=to
            )
            model = reply.model
        info = LoadedModel._from_message(model)
        self._core.learn(info)
        return dataclasses.replace(info, moved_sessions=moved, previous_version=previous)

    def unload(self, name: object, version: object, force: bool, deadline: Deadline) -> Flow[None]:
        """Unloads a version, or all of them; on each replica, if there are several."""
        number = 0 if version is None else _version(version)
        request = models_pb2.UnloadModelRequest(name=_name(name), version=number, force=force)
        router = self._core.router
        if router is None:
            yield from self.unload_one(request, deadline)
        else:
            yield from router.ready()
            yield from Everywhere(self, router, request, deadline).unload(request)

    def unload_one(
        self, request: models_pb2.UnloadModelRequest, deadline: Deadline, to: Replica | None = None
    ) -> Flow[None]:
        """Unloads on one server."""
        yield from self._core.retrier.call("UnloadModel", request, deadline, changes=True, to=to)

    def set_default(
        self, name: object, version: object, sessions: object, migration: object, deadline: Deadline
    ) -> Flow[LoadedModel]:
        """Makes a version the default."""
        request = models_pb2.SetDefaultRequest(name=_name(name), version=_version(version))
        request.sessions, request.migration = _policy(sessions, migration)
        return (yield from self.move(request, deadline))

    def move(self, request: models_pb2.SetDefaultRequest, deadline: Deadline) -> Flow[LoadedModel]:
        """Makes a version the default. One replica does so for all."""
        reply: models_pb2.SetDefaultResponse = yield from self._core.retrier.call(
            "SetDefault", request, deadline, changes=True
        )
        return (
            yield from self.loaded(
                reply.model, request.version, deadline, reply.moved_sessions, reply.previous_version
            )
        )

    def set_label(
        self, name: object, label: object, version: object, deadline: Deadline
    ) -> Flow[LoadedModel]:
        """Gives a label to a version, or takes it away (None)."""
        number = 0 if version is None else _version(version)
        request = models_pb2.SetLabelRequest(name=_name(name), label=_label("label", label), version=number)
        reply: models_pb2.SetLabelResponse = yield from self._core.retrier.call(
            "SetLabel", request, deadline, changes=True
        )
        return (yield from self.loaded(reply.model, number or reply.model.version, deadline, 0))


def _explained(error: StepwellError, request: models_pb2.LoadModelRequest) -> StepwellError:
    """The error of a load; where its outcome is unknown, with the way to find out."""
    if not is_unknown(error):
        return error
    note = f"whether the model was loaded is not known: client.model({request.name!r}).versions says it"
    if request.version:
        note += f", and the same call again is refused if version {request.version} is there"
    error.add_note(note)
    return error


def _name(name: object) -> str:
    if not is_name(name):
        raise InvalidInputError(f"name must be 1 to 128 letters, digits, _, - or .; got {name!r:.150}")
    return str(name)


def _version(version: object) -> int:
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= _MAX_VERSION:
        raise InvalidInputError(
            f"version must be a whole number from 1 to {_MAX_VERSION}; got {version!r:.150}"
        )
    return version


def _label(what: str, label: object) -> str:
    if not isinstance(label, str) or not _LABEL.fullmatch(label) or label.isdecimal():
        raise InvalidInputError(f"{what} must be {_LABEL_RULE}; got {label!r:.150}")
    return label


def _labels(labels: object) -> list[str]:
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise InvalidInputError(f"labels must be a list of labels; got {labels!r:.150}")
    return [_label("a label", label) for label in labels]


def _policy(sessions: object, migration: object) -> tuple[models_pb2.SessionPolicy.ValueType, str]:
    if not isinstance(sessions, str) or sessions not in _POLICIES:
        raise InvalidInputError(f"sessions must be one of {list(_POLICIES)}; got {sessions!r:.150}")
    if migration is not None and (not isinstance(migration, str) or not migration):
        raise InvalidInputError(f"migration must be the name of a function; got {migration!r:.150}")
    if migration is not None and sessions != "migrate":
        raise InvalidInputError(
            f"migration must be given with sessions='migrate' only; got {migration!r} with sessions={sessions!r}"
        )
    return _POLICIES[sessions], migration or ""
