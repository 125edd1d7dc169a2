"""What a server is started with, and what must be true of it as a whole. `cli/serve.py` explains each setting."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.compile.host.limits import Limits, default_memory_bytes
from stepwell_server.compile.keras_file.origin import folder_problem
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.core.model_names import ModelRef, parse_reference, version_of
from stepwell_server.core.version_policy import LATEST, VersionPolicy
from stepwell_server.store.valkey.connection.url import StoreUrl

DEFAULT_LISTEN = Address("127.0.0.1", 50051)
DEFAULT_METRICS = Address("127.0.0.1", 9464)
"""The port that exporters of OpenTelemetry have, too."""


class SettingsError(Exception):
    """Settings that cannot be used together, or at all. The message is one line and names the option."""


def default_cache_dir() -> Path:
    """Return the folder for compiled models where none is given.

    Raises:
        SettingsError: there is no home.
    """
    return _default_folder("--cache-dir", "XDG_CACHE_HOME", "~/.cache")


def default_data_dir() -> Path:
    """Return the folder of the store where none is given.

    Raises:
        SettingsError: there is no home.
    """
    return _default_folder("--data-dir", "XDG_DATA_HOME", "~/.local/share")


def _default_folder(option: str, variable: str, fallback: str) -> Path:
    try:
        return Path(os.environ.get(variable) or expanded(fallback)) / "stepwell"
    except LookupError:
        raise SettingsError(
            f"{option}: give a folder; without a home (HOME) and without {variable} there is no default"
        ) from None


def expanded(text: str) -> Path:
    """The path, with ~ and ~NAME for a home as shells have them, which expand neither in `--option=~/x`.

    Raises:
        LookupError: there is no such home.
    """
    if not text.startswith("~"):
        return Path(text)
    path = os.path.expanduser(text)
    if path.startswith("~") or (text.partition("/")[0] == "~" and os.environ.get("HOME") == ""):
        raise LookupError(f"{text.partition('/')[0]} has no home here")
    return Path(path)


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with. Times in seconds, sizes in bytes; None: as the server sees fit.

    Raises:
        SettingsError: they contradict each other.
    """

    models: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """By NAME or NAME@VERSION."""
    models_dir: Path | None = None
    """Folder of models: `model_folder`."""
    watch_models: bool = False
    version_policy: Mapping[str, VersionPolicy] = dataclasses.field(default_factory=dict)
    """Of the names in the folder; that of the empty name is for all others."""
    sessions: Literal["keep", "carry", "migrate", "reset"] = "keep"
    """What becomes of those that follow the default when the folder has another one."""
    migrations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Functions, as MODULE:FUNCTION, by the names under which a change of version may ask for them."""
    wait_for_models: bool = True
    listen: Address | UnixAddress = DEFAULT_LISTEN
    insecure_listen: bool = False
    """Others than this machine may reach it without TLS, without being known, and its metrics without a token."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    auth_tokens: Path | None = None
    auth_certificates: Path | None = None
    auth_jwks: Path | None = None
    auth_jwt_audience: str | None = None
    auth_jwt_issuer: str | None = None
    auth_jwt_tenant_claim: str = "tenant"
    auth_jwt_role_claim: str = "role"
    max_connection_age_s: float = 0.0
    max_connection_age_grace_s: float = 30.0
    front: Literal["auto", "native", "python"] = "auto"
    store: Literal["disk", "memory"] | StoreUrl = "disk"
    """On this machine, or where the one is that several servers share."""
    data_dir: Path | None = None
    """Of the store on disk; None for others."""
    durability: Literal["sync", "async"] = "sync"
    encryption_key_file: Path | None = None
    max_batch_rows: int = 1024
    resident_rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """By the name of the model; the empty name: of those that are not named."""
    max_session_idle_s: float = 0.0
    unnamed_session_idle_s: float = 3600.0
    """Of sessions that are opened without an id and ask for no limit."""
    quotas: Path | None = None
    """File of the quotas of tenants and callers."""
    metrics_tenants: int = 100
    compute_threads: int = dataclasses.field(default_factory=cores)
    metrics_listen: Address | Literal["off"] | None = None
    """None: `DEFAULT_METRICS`, or nowhere if that is in use."""
    metrics_token_file: Path | None = None
    audit_log: Path | None = None
    """`-`: standard error."""
    audit_when_full: Literal["drop", "refuse"] = "drop"
    bad_models: Literal["refuse", "skip"] = "refuse"
    trace_endpoint: str | None = None
    trace_sample: float = 0.01
    allow_model_upload: bool = False
    """Admins may send files of models."""
    imports: Sequence[str] = ()
    probe_steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    trust_causality: Sequence[str] = ()
    check_with: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    cache_dir: Path = dataclasses.field(default_factory=default_cache_dir)
    max_model_bytes: int = Limits.model_bytes
    max_compile_memory_bytes: int = dataclasses.field(default_factory=default_memory_bytes)
    compile_timeout_s: float = Limits.timeout_s
    max_message_bytes: int = 64 * 1024 * 1024
    max_connections: int | None = None
    max_connections_per_address: int = 0
    max_calls_per_connection: int = FrontLimits.streams
    max_held_bytes: int | None = None
    drain_timeout_s: float = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    def __post_init__(self) -> None:
        if self.store == "disk" and self.data_dir is None:
            object.__setattr__(self, "data_dir", default_data_dir())
        if self.store == "memory" and self.encryption_key_file is not None:
            raise SettingsError(
                "--encryption-key-file: with --store memory nothing is kept on disk to encrypt"
            )
        if self.shared_store is not None and self.data_dir is not None:
            raise SettingsError(
                "--data-dir: with --store URL sessions are kept there, and nothing on disk here"
            )
        versions = self.versions  # raises
        for option, names in (
            ("--probe-steps", self.probe_steps),
            ("--trust-causality", self.trust_causality),
            ("--check-with", self.check_with),
            ("--resident-rows", self.resident_rows.keys() - {""}),
        ):
            for name in names:
                if (
                    name not in self.versions and self.models_dir is None
                ):  # what is in a folder is not known yet
                    known = ", ".join(versions)
                    raise SettingsError(f"{option}: there is no model {name!r}; the models are {known}")
        files = {
            "--tls-cert": self.tls_cert,
            "--tls-key": self.tls_key,
            "--tls-client-ca": self.tls_client_ca,
        }
        given = ", ".join(option for option, file in files.items() if file is not None)
        for option in ("--tls-cert", "--tls-key"):
            if given and files[option] is None:
                raise SettingsError(f"{option}: must be given with {given}")
        self._check_folder()
        self._check_callers()
        held, message = self.max_held_bytes, self.max_message_bytes
        if held is not None and held < message:
            raise SettingsError(
                f"--max-held-bytes must be at least --max-message-bytes, which is {message}; got {held}"
            )

    @property
    def shared_store(self) -> StoreUrl | None:
        """Where the store is that several servers share; None: it is this server's alone."""
        return self.store if isinstance(self.store, StoreUrl) else None

    @property
    def store_kind(self) -> Literal["disk", "memory", "valkey"]:
        """Which kind of store it is."""
        return "valkey" if isinstance(self.store, StoreUrl) else self.store

    @functools.cached_property
    def versions(self) -> Mapping[str, Mapping[int, Path]]:
        """What `models` says: files by name and version."""
        return _versions_of(self.models)

    def policy_of(self, name: str) -> VersionPolicy:
        """Which versions of a name in the folder of models are served."""
        return self.version_policy.get(name) or self.version_policy.get("", LATEST)

    def _check_folder(self) -> None:
        for option, value in (
            ("--watch-models", self.watch_models),
            ("--version-policy", self.version_policy),
        ):
            if value and self.models_dir is None:
                raise SettingsError(f"{option}: must be given with --models, the folder that it is about")
        if self.sessions == "migrate" and not self.migrations:
            raise SettingsError(
                "--sessions: with migrate the function must be given by --migration; there is none"
            )

    def _check_callers(self) -> None:
        if self.auth_certificates is not None and self.tls_client_ca is None:
            raise SettingsError(
                "--auth-certificates: must be given with --tls-client-ca, which asks for them"
            )
        for option, value in (
            ("--auth-jwt-audience", self.auth_jwt_audience),
            ("--auth-jwt-issuer", self.auth_jwt_issuer),
        ):
            if self.auth_jwks is not None and not value:
                raise SettingsError(
                    f"{option}: must be given with --auth-jwks: what others signed for others is no proof"
                )
            if self.auth_jwks is None and value is not None:
                raise SettingsError(f"{option}: must be given with --auth-jwks, the keys that sign")
        for option, claim, default in (
            ("--auth-jwt-tenant-claim", self.auth_jwt_tenant_claim, "tenant"),
            ("--auth-jwt-role-claim", self.auth_jwt_role_claim, "role"),
        ):
            if not claim:
                raise SettingsError(f"{option}: must be the name of a claim; it is empty")
            # Who names a claim wants callers to be known by JWTs, and would get a server that asks nobody.
            if self.auth_jwks is None and claim != default:
                raise SettingsError(
                    f"{option}: must be given with --auth-jwks, the keys that sign; got {claim!r} alone"
                )

    @property
    def asks_callers(self) -> bool:
        """Nobody is served whom the server does not know."""
        return any((self.auth_tokens, self.auth_certificates, self.auth_jwks))

    def require_models(self) -> None:
        """Find out whether there is something to serve.

        Raises:
            SettingsError: no model is given, or the file of one is none, or the folder.
        """
        if not self.models and self.models_dir is None:
            raise SettingsError(
                "models: give at least one as NAME=PATH, such as forecast=model.keras, or in STEPWELL_MODELS; or a folder of "
                "them by --models"
            )
        for name, path in self.models.items():
            if not path.is_file():
                what = folder_problem(path) if path.is_dir() else "does not exist"
                raise SettingsError(f"model {name}: PATH must be a .keras or .stepwell file; {path} {what}")
        if self.models_dir is not None and not self.models_dir.is_dir():
            what = "is a file" if self.models_dir.exists() else "does not exist"
            raise SettingsError(f"--models: must be a folder; {self.models_dir} {what}")


def _versions_of(models: Mapping[str, Path]) -> dict[str, dict[int, Path]]:
    """The files by name and version.

    Raises:
        SettingsError: a version has two.
    """
    found: dict[str, dict[int, Path]] = {}
    said: dict[tuple[str, int], str] = {}
    for text, path in models.items():
        ref = parse_reference(text)
        version = ref.version or _version_in(ref, path)
        before = said.setdefault((ref.name, version), text)
        if before is not text:
            raise SettingsError(
                f"models: each version must be given once; {ref.name}@{version} is given as {before}={models[before]} and as "
                f"{text}={path}"
            )
        found.setdefault(ref.name, {})[version] = path
    return found


def _version_in(ref: ModelRef, path: Path) -> int:
    """The version that a path of a folder of models says, which is DIR/NAME/VERSION.keras or DIR/NAME/VERSION/*.keras; else 1."""
    parent = path.parent
    for name, text in ((parent.name, path.stem), (parent.parent.name, parent.name)):
        if name == ref.name and (version := version_of(text)) is not None:
            return version
    return 1
