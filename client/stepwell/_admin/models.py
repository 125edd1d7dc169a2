"""Flows that load and unload versions of models, and set defaults and labels.

**Retries.** A load that reached no server is retried, like every call. A load that may have reached one is not
retried when its answer is lost: without a number, which the server then chooses, a retry would load the file a second
time. The outcome of its error is "unknown". The same call with a version is safe to repeat, because the server
rejects a version that exists. Uploads, unloads, defaults and labels are idempotent, and are retried.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

from stepwell._admin.model_files import Placed, is_name
from stepwell._base.flow import Flow
from stepwell._base.log import LOG
from stepwell._core.core import Core
from stepwell._core.tracker import is_unknown
from stepwell._core.versions import reference
from stepwell._routing.replica import Replica
from stepwell._routing.router import Router
from stepwell._state.infos import LoadedModel
from stepwell._transport.connecting import ConnectError
from stepwell._transport.retry import Deadline
from stepwell.errors import (
    InternalError,
    InvalidInputError,
    ModelInUseError,
    ModelNotFoundError,
    ModelVersionExistsError,
    StepwellError,
    UnavailableError,
)
from stepwell.v1 import models_pb2

T = TypeVar("T")
SessionPolicy: TypeAlias = Literal["keep", "carry", "migrate", "reset"]
"""What happens to the sessions that follow the default version of a model when the default moves.

"keep": they stay on their version until they end. "carry": they continue with their states under the new weights.
"migrate": a function of the operator converts their states. "reset": they restart from the initial state.
"""
LoadProgress: TypeAlias = Callable[[str], Any]
"""Called with the name of each stage when it starts."""

_POLICIES: Mapping[str, models_pb2.SessionPolicy.ValueType] = {
    "keep": models_pb2.SESSION_POLICY_KEEP,
    "carry": models_pb2.SESSION_POLICY_CARRY,
    "migrate": models_pb2.SESSION_POLICY_MIGRATE,
    "reset": models_pb2.SESSION_POLICY_RESET,
}
_MAX_VERSION = 2**63 - 1
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LABEL_RULE = "1 to 64 letters, digits, _, - or ., not digits alone"
#: Size of the pieces of an uploaded file.
_PIECE_BYTES = 1 << 18


class ModelAdmin:
    """The flows; `Client` documents what they do. Arguments are checked before the first call."""

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
        """Builds the request of a load, without the file.

        Raises:
            InvalidInputError: An argument breaks a rule.
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
                "sessions must be 'keep' and unload_previous False with default=False, because the default does not move; "
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
        """Loads a version, on every replica. Sends its file first if the server cannot read it."""
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
        """Sends a file. Returns the name that the server gave to the upload."""
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

        with open(path, "rb"):  # an unreadable file or a folder raises an error with its name
            pass
        reply: models_pb2.UploadModelResponse = yield from self._core.retrier.sent(
            "UploadModel", pieces, deadline, to=to
        )
        if reply.sha256 != digest.hexdigest():
            raise InternalError(
                f"the file {path} changed during the upload: SHA-256 {digest.hexdigest()} became {reply.sha256}"
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
        """Describes a model after a change, as the version that the call named."""
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
        """Unloads a version, or all versions, on every replica."""
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
        """Unloads a version on one server."""
        yield from self._core.retrier.call("UnloadModel", request, deadline, changes=True, to=to)

    def set_default(
        self, name: object, version: object, sessions: object, migration: object, deadline: Deadline
    ) -> Flow[LoadedModel]:
        """Makes a version the default."""
        request = models_pb2.SetDefaultRequest(name=_name(name), version=_version(version))
        request.sessions, request.migration = _policy(sessions, migration)
        return (yield from self.move(request, deadline))

    def move(self, request: models_pb2.SetDefaultRequest, deadline: Deadline) -> Flow[LoadedModel]:
        """Makes a version the default. One replica does so for all of them."""
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
        """Gives a label to a version, or removes it (None)."""
        number = 0 if version is None else _version(version)
        request = models_pb2.SetLabelRequest(name=_name(name), label=_label("label", label), version=number)
        reply: models_pb2.SetLabelResponse = yield from self._core.retrier.call(
            "SetLabel", request, deadline, changes=True
        )
        return (yield from self.loaded(reply.model, number or reply.model.version, deadline, 0))


class Everywhere:
    """One change of the models of all replicas.

    A version is loaded on one replica after the other, while the default stays. The default moves when all replicas
    have the version, so that each replica always has the versions of its sessions. Defaults and labels are set once,
    because they are in the store that the replicas share. A replica that is down is skipped; sessions of versions
    that it lacks move to other replicas.
    """

    def __init__(
        self,
        admin: ModelAdmin,
        router: Router,
        request: models_pb2.LoadModelRequest | models_pb2.UnloadModelRequest,
        deadline: Deadline,
    ) -> None:
        self._admin = admin
        self._router = router
        self._request = request
        self._deadline = deadline
        self._done: list[str] = []
        self._missed: list[str] = []

    def load(self, file: Placed, progress: LoadProgress | None) -> Flow[LoadedModel]:
        """Loads a version on each replica, then makes it the default if requested, and gives it its labels.

        Raises:
            StepwellError: A replica failed; the default has not moved. A note names the replicas that have the
                version.
        """
        asked = self._request
        assert isinstance(asked, models_pb2.LoadModelRequest)
        request = models_pb2.LoadModelRequest(name=asked.name, version=asked.version, keep_default=True)
        if (
            not asked.keep_default
        ):  # so that the server rejects a version to which sessions cannot move before it loads it
            request.sessions, request.migration = asked.sessions, asked.migration
        loaded: LoadedModel | None = None
        there: ModelVersionExistsError | None = None
        for to in self._router.replicas:
            report = self._reporter(progress, to)
            try:
                found = yield from self._on(
                    to, self._admin.load_one(request, file, self._deadline, report, to)
                )
            except ModelVersionExistsError as error:
                # from an earlier, incomplete call: replicas make sure that a number stands for one file
                there = error
                continue
            loaded = loaded or found
            if found is not None:
                request.version = found.version
        if loaded is None:
            raise there or self._nobody()
        if self._missed:
            LOG.warning(
                "version %d of the model %r is not loaded on %s, which could not be reached",
                loaded.version, asked.name, ", ".join(self._missed),
            )  # fmt: skip
        version = loaded.version
        if not asked.keep_default:
            move = models_pb2.SetDefaultRequest(
                name=asked.name, version=version, sessions=asked.sessions, migration=asked.migration
            )
            loaded = yield from self._admin.move(move, self._deadline)
        for label in asked.labels:
            yield from self._admin.set_label(asked.name, label, version, self._deadline)
        previous = loaded.previous_version
        if asked.unload_previous and previous not in (0, version):
            yield from self._unload_previous(asked.name, previous)
        return loaded

    def _unload_previous(self, name: str, version: int) -> Flow[None]:
        request = models_pb2.UnloadModelRequest(name=name, version=version)
        try:
            yield from self.unload(request)
        except ModelInUseError as error:
            LOG.info("version %d of the model %r stays loaded: %s", version, name, error.message)
        except ModelNotFoundError:
            pass  # it was never the default, or is already unloaded

    def unload(self, request: models_pb2.UnloadModelRequest) -> Flow[None]:
        """Unloads a version on each replica that has it.

        Raises:
            ModelNotFoundError: No replica has it.
        """
        absent: ModelNotFoundError | None = None
        is_done = False
        for to in self._router.replicas:
            try:
                is_done |= bool((yield from self._on(to, self._unload(request, to))))
            except ModelNotFoundError as error:
                absent = error
        if is_done:
            return
        raise absent or self._nobody()

    def _unload(self, request: models_pb2.UnloadModelRequest, to: Replica) -> Flow[bool]:
        yield from self._admin.unload_one(request, self._deadline, to)
        return True

    def _on(self, to: Replica, flow: Flow[T]) -> Flow[T | None]:
        """Returns the answer of one replica; None if it cannot be reached."""
        try:
            answer = yield from flow
        except ConnectError:
            self._missed.append(to.address)
            return None
        except StepwellError as error:
            raise self._noted(error, to) from None
        self._done.append(to.address)
        return answer

    def _noted(self, error: StepwellError, to: Replica) -> StepwellError:
        done = f"; it was done on {', '.join(self._done)}" if self._done else ""
        what = (
            "" if isinstance(self._request, models_pb2.UnloadModelRequest) else " The default has not moved."
        )
        error.add_note(f"this is the error of the replica {to.address}{done}.{what}")
        return error

    def _nobody(self) -> UnavailableError:
        reasons = self._router.reasons() or ", ".join(self._missed)
        return UnavailableError(f"no replica can be reached: {reasons}", outcome="not_applied")

    def _reporter(self, progress: LoadProgress | None, to: Replica) -> Callable[[str], object] | None:
        if progress is None:
            return None
        return lambda stage: progress(f"{to.address}: {stage}")


def _explained(error: StepwellError, request: models_pb2.LoadModelRequest) -> StepwellError:
    """Adds to the error of a load with unknown outcome how to find out what happened."""
    if not is_unknown(error):
        return error
    note = f"it is not known whether the model was loaded: see client.model({request.name!r}).versions"
    if request.version:
        note += f"; you may repeat the call, which fails if version {request.version} exists"
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
            f"migration must be None unless sessions is 'migrate'; got {migration!r} with sessions={sessions!r}"
        )
    return _POLICIES[sessions], migration or ""
