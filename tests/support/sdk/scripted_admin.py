"""The scripted server with the service for admins: versions of its toy model are loaded, unloaded and chosen."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import grpc

from stepwell.v1 import models_pb2, models_pb2_grpc
from support.sdk.scripted_model import FEATURES
from support.sdk.scripted_server import MODEL, Refusal, ScriptedServer, abort, answered

STAGES = ("waiting", "convert", "warm up", "switch")


class ScriptedModels(ScriptedServer, models_pb2_grpc.ModelAdminServiceServicer):
    """A file is one number, as text: how many numbers a row of the version's outputs has."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: dict[int, str] = {}
        self.uploads: dict[str, bytes] = {}
        self.loaded: list[bytes] = []
        """What was in the files that were loaded."""
        models_pb2_grpc.add_ModelAdminServiceServicer_to_server(self, self._server)

    def LoadModel(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        fault = self.enter("LoadModel", request)
        if fault is not None and not fault.after_work:
            abort(context, fault)
        try:
            for stage in STAGES:
                yield models_pb2.LoadModelResponse(stage=stage)
            version = self.do(functools.partial(self._load, request))
        except Refusal as refusal:
            abort(context, refusal.fault)
        if fault is not None:
            abort(context, fault)
        yield models_pb2.LoadModelResponse(
            model=self._model(MODEL), version=version, moved_sessions=len(self.sessions)
        )

    def _load(self, request: Any) -> int:
        version: int = request.version or max(self.widths) + 1
        if version in self.widths:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS, "MODEL_VERSION_EXISTS", f"version {version} is there"
            )
        content = self._content(request)
        self.loaded.append(content)
        if not content.strip(b" ").isdigit():
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_LOAD_FAILED", "the file is no model")
        self.widths[version] = int(content) or FEATURES
        self.labels.update(dict.fromkeys(request.labels, version))
        if not request.keep_default:
            self.move(version)
        return version

    def _content(self, request: Any) -> bytes:
        if request.upload:
            return self.uploads.pop(request.upload)
        with open(request.path, "rb") as file:
            return file.read()

    def UploadModel(self, requests: Any, context: Any) -> Any:  # noqa: N802
        received = list(requests)
        fault = self.enter("UploadModel", received)
        if fault is not None:
            abort(context, fault)
        assert [bool(one.filename) for one in received] == [True, *[False] * (len(received) - 1)]
        content = b"".join(one.content for one in received)
        name = f"upload-{len(self.uploads)}"
        self.uploads[name] = content
        return models_pb2.UploadModelResponse(upload=name, sha256=hashlib.sha256(content).hexdigest())

    @answered
    def UnloadModel(self, request: Any) -> Any:  # noqa: N802
        if request.version == self.default and not request.force:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE", "it is the default")
        self._version(f"{request.name}@{request.version}")
        del self.widths[request.version]
        return models_pb2.UnloadModelResponse()

    @answered
    def SetDefault(self, request: Any) -> Any:  # noqa: N802
        version = self._version(f"{request.name}@{request.version}")
        if self.widths[version] != self.widths[self.default]:
            raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_SPECS_DIFFER", "output y differs")
        previous = self.default
        self.move(version)
        return models_pb2.SetDefaultResponse(
            model=self._model(MODEL), previous_version=previous, moved_sessions=len(self.sessions)
        )

    @answered
    def SetLabel(self, request: Any) -> Any:  # noqa: N802
        if request.version:
            self.labels[request.label] = self._version(f"{request.name}@{request.version}")
        else:
            del self.labels[request.label]
        return models_pb2.SetLabelResponse(model=self._model(MODEL))
