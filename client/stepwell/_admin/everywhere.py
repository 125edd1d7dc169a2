"""Flows that load and unload versions of models on all replicas.

A version is loaded on one replica after the other, beside what is the default, and the default moves when all have it:
until then each replica has what sessions are on. What is said of defaults and labels is said once, for they are in the
store that the replicas share. A replica that is down is passed over; sessions of what it does not have go to others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from stepwell._base.flow import Flow
from stepwell._base.log import LOG
from stepwell._routing.replica import Replica
from stepwell._routing.router import Router
from stepwell._state.infos import LoadedModel
from stepwell._transport.connecting import ConnectError
from stepwell._transport.retry import Deadline
from stepwell.errors import (
    ModelInUseError,
    ModelNotFoundError,
    ModelVersionExistsError,
    StepwellError,
    UnavailableError,
)
from stepwell.v1 import models_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from stepwell._admin.model_files import Placed
    from stepwell._admin.models import LoadProgress, ModelAdmin

T = TypeVar("T")


class Everywhere:
    """One change of the models of all replicas."""

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
        """Loads a version on each replica, then makes it the default if that is asked for, and gives it its labels.

        Raises:
            StepwellError: A replica could not; the default has not moved. A note says who has the version.
        """
        asked = self._request
        assert isinstance(asked, models_pb2.LoadModelRequest)
        request = models_pb2.LoadModelRequest(name=asked.name, version=asked.version, keep_default=True)
        if (
            not asked.keep_default
        ):  # so that a version to which sessions cannot move is refused before it is loaded
            request.sessions, request.migration = asked.sessions, asked.migration
        loaded: LoadedModel | None = None
        there: ModelVersionExistsError | None = None
        for to in self._router.replicas:
            told = self._told(progress, to)
            try:
                found = yield from self._on(to, self._admin.load_one(request, file, self._deadline, told, to))
            except ModelVersionExistsError as error:
                # of an earlier call that did not get to its end: replicas see to it that a number is one file
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
            pass  # what was never the default, or went away by itself

    def unload(self, request: models_pb2.UnloadModelRequest) -> Flow[None]:
        """Unloads a version on each replica that has it.

        Raises:
            ModelNotFoundError: None has it.
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
        """What one replica answers; None where it cannot be reached."""
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
        error.add_note(f"this is the answer of the replica {to.address}{done}.{what}")
        return error

    def _nobody(self) -> UnavailableError:
        reasons = self._router.reasons() or ", ".join(self._missed)
        return UnavailableError(f"no replica can be reached: {reasons}", outcome="not_applied")

    def _told(self, progress: LoadProgress | None, to: Replica) -> Callable[[str], object] | None:
        if progress is None:
            return None
        return lambda stage: progress(f"{to.address}: {stage}")
