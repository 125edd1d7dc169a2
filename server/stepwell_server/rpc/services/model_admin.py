"""The calls of ModelAdminService. `access` decides who may call; every call has a line in the audit log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from stepwell.v1 import models_pb2 as pb
from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest
from stepwell_server.engine.api import SessionPolicy
from stepwell_server.errors import InvalidInput, PermissionDenied, ServerError
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.boundary import parse

if TYPE_CHECKING:
    from stepwell_server.rpc.audit import Auditor
    from stepwell_server.rpc.fronts.base import Call
    from stepwell_server.rpc.services.models import ModelServicer

_POLICIES: dict[int, SessionPolicy] = {
    pb.SESSION_POLICY_UNSPECIFIED: SessionPolicy.KEEP,
    pb.SESSION_POLICY_KEEP: SessionPolicy.KEEP,
    pb.SESSION_POLICY_CARRY: SessionPolicy.CARRY,
    pb.SESSION_POLICY_MIGRATE: SessionPolicy.MIGRATE,
    pb.SESSION_POLICY_RESET: SessionPolicy.RESET,
}


class ModelAdminServicer:
    """The calls of ModelAdminService, each by its name in snake case. Lives on the event loop."""

    def __init__(
        self, control: Catalog, models: ModelServicer, auditor: Auditor | None, refusal: str = ""
    ) -> None:
        """Create the servicer.

        Args:
            control: Loads and unloads models.
            models: Describes models.
            auditor: Audits the streaming calls. The boundary audits the unary ones.
            refusal: Reason why nobody may call; empty: callers with the role may.
        """
        self._control = control
        self._models = models
        self._auditor = auditor
        self._refusal = refusal

    async def load_model(self, call: Call) -> None:
        """Load a version, and report its stages."""
        request = parse(pb.LoadModelRequest, await call.read() or b"")
        await self._audited("LoadModel", call, request, lambda: self._load(request, call))

    async def _load(self, request: pb.LoadModelRequest, call: Call) -> pb.LoadModelResponse:
        self._require_allowed("LoadModel")
        wanted = LoadRequest(
            name=request.name,
            version=request.version,
            path=request.path,
            upload=request.upload,
            is_temporary=request.is_temporary,
            keep_default=request.keep_default,
            policy=_policy(request.sessions),
            migration=request.migration,
            labels=list(request.labels),
            unload_previous=request.unload_previous,
            tenant=tenancy.single_tenant(call.who),
        )
        stages: asyncio.Queue[str] = asyncio.Queue()
        loading = asyncio.create_task(self._control.load(wanted, stages.put_nowait))
        try:
            while not (loading.done() and stages.empty()):
                stage = asyncio.create_task(stages.get())
                try:
                    await asyncio.wait((loading, stage), return_when=asyncio.FIRST_COMPLETED)
                    if stage.done():
                        await call.write(pb.LoadModelResponse(stage=stage.result()).SerializeToString())
                finally:
                    stage.cancel()
            loaded = loading.result()
        except BaseException:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            raise
        reply = pb.LoadModelResponse(
            model=await self._models.described(f"{request.name}@{loaded.version}", call),
            version=loaded.version,
            moved_sessions=loaded.sessions,
        )
        await call.write(reply.SerializeToString())
        return reply

    async def upload_model(self, call: Call) -> None:
        """Receive a file in pieces."""
        first = parse(pb.UploadModelRequest, await call.read() or b"")
        audited = pb.UploadModelRequest(filename=first.filename)
        await self._audited("UploadModel", call, audited, lambda: self._upload(first, call))

    async def _upload(self, first: pb.UploadModelRequest, call: Call) -> pb.UploadModelResponse:
        self._require_allowed("UploadModel")
        upload = await self._control.begin_upload(first.filename, tenancy.single_tenant(call.who))
        piece = first
        try:
            while True:
                await upload.write(piece.content)
                raw = await call.read()
                if raw is None:
                    break
                piece = parse(pb.UploadModelRequest, raw)
                if piece.filename:
                    raise InvalidInput("filename must be only in the first message; got another one")
            sent = await upload.finish()
        except BaseException:
            await asyncio.shield(upload.abort())
            raise
        reply = pb.UploadModelResponse(upload=sent.token, sha256=sent.sha256)
        await call.write(reply.SerializeToString())
        return reply

    async def unload_model(self, request: pb.UnloadModelRequest, _call: Call) -> pb.UnloadModelResponse:
        """Unload a version."""
        self._require_allowed("UnloadModel")
        await self._control.unload(request.name, request.version, force=request.force)
        return pb.UnloadModelResponse()

    async def set_default(self, request: pb.SetDefaultRequest, call: Call) -> pb.SetDefaultResponse:
        """Make a version the default."""
        self._require_allowed("SetDefault")
        moved = await self._control.set_default(
            request.name, request.version, _policy(request.sessions), request.migration
        )
        return pb.SetDefaultResponse(
            model=await self._models.described(request.name, call),
            previous_version=moved.previous,
            moved_sessions=moved.sessions,
        )

    async def set_label(self, request: pb.SetLabelRequest, call: Call) -> pb.SetLabelResponse:
        """Assign a label to a version, or remove it."""
        self._require_allowed("SetLabel")
        await self._control.set_label(request.name, request.label, request.version)
        return pb.SetLabelResponse(model=await self._models.described(request.name, call))

    def _require_allowed(self, method: str) -> None:
        if self._refusal:
            raise PermissionDenied(f"{method}: {self._refusal}", role="")

    async def _audited(
        self, method: str, call: Call, request: Message, behaviour: Callable[[], Awaitable[Message]]
    ) -> None:
        try:
            reply = await behaviour()
        except ServerError as error:
            error.model = error.model or getattr(request, "name", "")
            if self._auditor is not None:
                self._auditor.failed(method, call, request, error)
            raise
        if self._auditor is not None:
            self._auditor.done(method, call, request, reply)


def _policy(number: int) -> SessionPolicy:
    policy = _POLICIES.get(number)
    if policy is None:
        raise InvalidInput(f"sessions must be one of stepwell.v1.SessionPolicy; got {number}")
    return policy
