"""The calls of the model repository. `access` decides who may load and unload."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from google.protobuf import json_format

from stepwell_server.catalog.catalog import Catalog
from stepwell_server.catalog.control import LoadRequest, VersionState, VersionStatus
from stepwell_server.core.callers import Role
from stepwell_server.core.model_names import is_version, version_of
from stepwell_server.core.version_policy import LATEST, VersionPolicy
from stepwell_server.errors import (
    InvalidInput,
    ModelNotFound,
    PermissionDenied,
    Unsupported,
    VersionNotFound,
)
from stepwell_server.rpc import tenancy
from stepwell_server.rpc.triton.inference import service_pb2 as pb

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.base import Call

KnownFiles = Callable[[str], Awaitable[Mapping[int, str]]]
"""The files that are known as versions of a name, by their numbers."""
_Parameters = Mapping[str, pb.ModelRepositoryParameter]
_STATES = {
    VersionState.LOADING: "LOADING",
    VersionState.READY: "READY",
    VersionState.DRAINING: "READY",
    VersionState.FAILED: "UNAVAILABLE",
}
_FILE = "file:"
_MAX_CONFIG = 1 << 20
"""Characters of a configuration."""
_SHOWN = 160


class Repository:
    """Lists, loads and unloads versions. Lives on the event loop."""

    def __init__(self, control: Catalog, known_files: KnownFiles, refusal: str = "") -> None:
        """`refusal`: the reason why nobody may load and unload; empty: callers with the role may."""
        self._control = control
        self._known_files = known_files
        self._refusal = refusal

    async def index(self, request: pb.RepositoryIndexRequest, call: Call) -> pb.RepositoryIndexResponse:
        """List the versions of all models."""
        _require_no_name(request.repository_name)
        response = pb.RepositoryIndexResponse()
        for name, versions in self._control.statuses().items():
            for one in versions:
                state = _STATES[one.state]
                if state == "READY" or not request.ready:
                    response.models.add(
                        name=name, version=str(one.version), state=state, reason=_reason(one, call.who.role)
                    )
        return response

    async def load(
        self, request: pb.RepositoryModelLoadRequest, call: Call
    ) -> pb.RepositoryModelLoadResponse:
        """Load versions of a model: the highest one, or those that a configuration names, or one whose file comes along.

        Raises:
            InvalidInput: a parameter cannot be.
            ModelNotFound: no file is known for what is to be loaded.
            ServerError: as of `Catalog.load`.
        """
        self._require_allowed("RepositoryModelLoad")
        _require_no_name(request.repository_name)
        name, tenant = request.model_name, tenancy.single_tenant(call.who)
        policy = _policy(name, _checked(request.parameters))
        files = [key for key in request.parameters if key.startswith(_FILE)]
        if files:
            await self._load_file(name, files, request.parameters, tenant)
        else:
            await self._load_known(name, policy or LATEST, tenant)
        return pb.RepositoryModelLoadResponse()

    async def _load_known(self, name: str, policy: VersionPolicy, tenant: str) -> None:
        files = await self._known_files(name)
        if not files:
            raise ModelNotFound(
                f"failed to load '{name[:_SHOWN]}', failed to poll from model repository: no file of it is on the"
                " command line, in --models, or was loaded before",
                model=name,
            )
        chosen = policy.choose(files)
        missing = sorted((policy.versions or frozenset()) - chosen)
        if missing:
            raise VersionNotFound(
                f"failed to load '{name}', failed to poll from model repository: no file is known of version"
                f" {missing[0]}; there are {sorted(files)}",
                model=name,
            )
        served = {one.version: one for one in self._control.status(name) if one.fingerprint}
        default = max((one.version for one in served.values() if one.is_default), default=0)
        # load the highest version first: it becomes the default if it is higher than the current one
        for version in sorted(chosen - served.keys(), reverse=True):
            await self._control.load(
                LoadRequest(
                    name=name,
                    version=version,
                    path=files[version],
                    is_found=True,
                    keep_default=version < default,
                    keep_previous=version > default and default in chosen,
                    tenant=tenant,
                )
            )
            default = max(default, version)

    async def _load_file(self, name: str, files: list[str], given: _Parameters, tenant: str) -> None:
        if len(files) > 1:
            raise InvalidInput(
                f"files must be one .keras, .onnx or .stepwell file, 'file:VERSION/NAME'; got {len(files)}"
            )
        folder, _, filename = files[0].removeprefix(_FILE).rpartition("/")
        version = version_of(folder)
        if version is None or not filename:
            raise InvalidInput(f"the file must be named 'file:VERSION/NAME'; got {files[0][:_SHOWN]!r}")
        parameter = given[files[0]]
        if parameter.WhichOneof("parameter_choice") != "bytes_param":
            raise InvalidInput(f"parameter {files[0][:_SHOWN]!r} must be a bytes_param")
        upload = await self._control.begin_upload(filename, tenant)
        try:
            await upload.write(parameter.bytes_param)
            sent = await upload.finish()
        except BaseException:
            await upload.abort()
            raise
        await self._control.load(LoadRequest(name=name, version=version, upload=sent.token, tenant=tenant))

    async def unload(
        self, request: pb.RepositoryModelUnloadRequest, _call: Call
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload all versions of a model.

        Raises:
            InvalidInput: a parameter cannot be.
            ModelNotFound, ModelInUse: as of `Catalog.unload`.
        """
        self._require_allowed("RepositoryModelUnload")
        _require_no_name(request.repository_name)
        force = False
        for key, parameter in request.parameters.items():
            if (
                key not in {"unload_dependents", "stepwell_force"}
                or parameter.WhichOneof("parameter_choice") != "bool_param"
            ):
                raise InvalidInput(
                    f"parameters must be unload_dependents and stepwell_force, as bool_param; got {key[:_SHOWN]!r}"
                )
            if key == "stepwell_force":
                force = parameter.bool_param
        await self._control.unload(request.model_name, 0, force=force)
        return pb.RepositoryModelUnloadResponse()

    def _require_allowed(self, method: str) -> None:
        if self._refusal:
            raise PermissionDenied(f"{method}: {self._refusal}", role="")


def _reason(status: VersionStatus, role: Role) -> str:
    if status.state is VersionState.DRAINING:
        return "it is unloaded when its last session has ended"
    if status.state is VersionState.FAILED and role is not Role.ADMIN:
        return "the version could not be loaded"  # the reason names its file
    return status.reason


def _require_no_name(repository_name: str) -> None:
    if repository_name:
        raise Unsupported("'repository_name' specification is not supported")


def _checked(given: _Parameters) -> str | None:
    """The configuration that came along, as text."""
    for key in given:
        if key != "config" and not key.startswith(_FILE):
            raise InvalidInput(f"parameters must be config and file:VERSION/NAME; got {key[:_SHOWN]!r}")
    if "config" not in given:
        return None
    if given["config"].WhichOneof("parameter_choice") != "string_param":
        raise InvalidInput("parameter 'config' must be a string_param")
    return given["config"].string_param


def _policy(name: str, config: str | None) -> VersionPolicy | None:
    """The version policy of a configuration, if it has one. All else in it is the model's to say.

    Raises:
        InvalidInput: it is no JSON object, is of another model, or its policy cannot be.
    """
    if config is None:
        return None
    if len(config) > _MAX_CONFIG:
        raise InvalidInput(f"config must have at most {_MAX_CONFIG} characters; got {len(config)}")
    try:
        read = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"config must be a model configuration as JSON; got {config[:_SHOWN]!r}"
        ) from error
    if not isinstance(read, dict):
        raise InvalidInput(f"config must be a JSON object; got {config[:_SHOWN]!r}")
    if read.get("name", name) != name:
        raise InvalidInput(
            f"name in config must be that of the model, {name!r}; got {str(read['name'])[:_SHOWN]!r}"
        )
    policy = read.get("version_policy", read.get("versionPolicy"))
    if policy is None:
        return None
    if policy == {"all": {}}:
        return VersionPolicy()
    parsed = pb.ModelConfig()
    parsed.version_policy.latest.num_versions = 1  # where it says no number
    try:
        json_format.ParseDict({"version_policy": policy}, parsed)
    except json_format.ParseError:
        parsed.Clear()
    latest, versions = parsed.version_policy.latest.num_versions, parsed.version_policy.specific.versions
    if isinstance(policy, dict) and all(map(is_version, versions or [latest])):
        return VersionPolicy(latest=latest) if latest else VersionPolicy(versions=frozenset(versions))
    raise InvalidInput(
        'version_policy in config must be {"latest": {"num_versions": N}}, {"all": {}} or {"specific": {"versions":'
        f" [N, ...]}}}}, with numbers from 1 on; got {json.dumps(policy)[:_SHOWN]}"
    )
