"""The settings of a server: the one table of all settings, and the rules between them.

formats.py  how values are written
fields.py   what a setting is, and all its names
sources.py  reads settings from the command line, variables and the config file, and prints them
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from stepwell_server.addresses import Address, UnixAddress
from stepwell_server.compile.host.limits import Limits, default_memory_bytes
from stepwell_server.compile.keras_file.origin import folder_problem
from stepwell_server.core.front_limits import FrontLimits
from stepwell_server.core.model_names import ModelRef, parse_reference, version_of
from stepwell_server.core.version_policy import LATEST, VersionPolicy
from stepwell_server.errors import StartError
from stepwell_server.settings.fields import Names, Needs, settings_of
from stepwell_server.settings.formats import (
    ADDRESS,
    ADDRESS_OR_OFF,
    CLAIM,
    COUNT,
    DATA_FILE,
    FILE,
    FOLDER,
    FUNCTION,
    LISTEN,
    MAX_INT32,
    MODEL_NAME,
    MODELS,
    MODULE,
    ORIGIN,
    POLICY,
    SECONDS,
    SHARE,
    STORE,
    TEXT,
    URL,
    Several,
    Table,
    count,
    expanded,
    seconds,
    size,
)
from stepwell_server.store.valkey.connection.url import StoreUrl

DEFAULT_LISTEN = Address("127.0.0.1", 50051)
DEFAULT_METRICS = Address("127.0.0.1", 9464)
"""The usual port of OpenTelemetry's Prometheus exporters."""
MAX_IDLE_S = 3650 * 86_400
"""The longest limit of a record, `core.idle.MAX_IDLE_MS`, repeated so that a command's help does not load numpy."""

_NO_PROOF = ": without it, the server would accept JWTs that were issued for other services"
_NEEDS_KEYS = Needs("auth_jwks", ", the keys that sign the JWTs")
"""Without the keys, a server with an audience, an issuer or a claim would not authenticate its callers at all."""
_NEEDS_FOLDER = Needs("models_dir", ", the folder that it applies to")


def _default_folder(option: str, variable: str, fallback: str) -> Path:
    """Return the default folder.

    Raises:
        StartError: the user has no home folder.
    """
    try:
        return Path(os.environ.get(variable) or expanded(fallback)) / "stepwell"
    except LookupError:
        raise StartError(
            f"{option}: give a folder; there is no default because neither HOME nor {variable} is set"
        ) from None


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a server. Times are in seconds, sizes in bytes.

    The command line, environment variables, the config file, --show-config and the reference are all made from these fields:
    a new setting is a new field.

    Raises:
        StartError: two settings contradict each other.
    """

    models: Annotated[
        Mapping[str, Path],
        MODELS,
        "Models to serve, by NAME or NAME@VERSION.",
        Names(is_argument=True),
    ] = dataclasses.field(default_factory=dict)
    listen: Annotated[
        Address | UnixAddress,
        LISTEN,
        "Address to serve gRPC on: HOST:PORT, or unix:PATH for a socket that only the server's user can use. "
        "With port 0 the system chooses a port; the ready line on stdout shows it.",
    ] = DEFAULT_LISTEN
    http_listen: Annotated[
        Address | None,
        ADDRESS,
        "Address to serve JSON over HTTP on: HOST:PORT. See docs/guides/json.md. Default: none. Native front only.",
    ] = None
    cors_origin: Annotated[
        Sequence[str],
        Several(ORIGIN),
        "Origin of web pages that may call over HTTP, such as https://app.example.org, or * for all. Other pages are "
        "refused, except those of the server itself.",
        Needs("http_listen"),
    ] = ()
    no_console: Annotated[
        bool,
        "Do not serve the console, a page at /console of --http-listen. See docs/guides/console.md.",
        Needs("http_listen"),
    ] = False
    insecure_listen: Annotated[
        bool,
        "Allow listening beyond loopback without TLS, without authentication, and with public metrics. Use it "
        "if something else, such as a proxy, controls access.",
    ] = False
    tls_cert: Annotated[
        Path | None,
        FILE,
        "Certificate of the server in PEM, followed by the intermediate certificates. Clients must then use "
        "TLS. The server reloads the file when it changes.",
        Needs("tls_key"),
    ] = None
    tls_key: Annotated[
        Path | None, FILE, "Private key of --tls-cert in PEM, not encrypted.", Needs("tls_cert")
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        FILE,
        "Certificates of CAs in PEM. Clients must present a certificate signed by one of them.",
        Needs("tls_cert"),
    ] = None
    auth_tokens: Annotated[
        Path | None,
        FILE,
        "File of callers and their bearer tokens, as 'stepwell tokens' writes it. The server then refuses "
        "callers that it does not know. It reloads this file, and the files of the next two options, when they change.",
    ] = None
    auth_certificates: Annotated[
        Path | None,
        FILE,
        "TOML file of callers and their client certificates: tables [[caller]] with san, name, tenant and role.",
        Needs("tls_client_ca", ", which asks clients for certificates"),
    ] = None
    auth_jwks: Annotated[
        Path | None,
        FILE,
        "JWKS file of public keys. Callers may send JWTs signed by these keys as bearer tokens.",
        Needs("auth_jwt_audience", _NO_PROOF),
        Needs("auth_jwt_issuer", _NO_PROOF),
    ] = None
    auth_jwt_audience: Annotated[str | None, TEXT, "Required audience (aud) of a JWT.", _NEEDS_KEYS] = None
    auth_jwt_issuer: Annotated[str | None, TEXT, "Required issuer (iss) of a JWT.", _NEEDS_KEYS] = None
    auth_jwt_tenant_claim: Annotated[
        str, CLAIM, "Claim of a JWT that contains the caller's tenant.", _NEEDS_KEYS
    ] = "tenant"
    auth_jwt_role_claim: Annotated[
        str,
        CLAIM,
        "Claim of a JWT that contains the caller's role, alone or in a list: user, viewer or admin.",
        _NEEDS_KEYS,
    ] = "role"
    max_connection_age_s: Annotated[
        float,
        SECONDS,
        "Time, plus or minus 10%, after which a connection takes no more calls, so that its client reconnects. "
        "0 means never.",
    ] = 0.0
    max_connection_age_grace_s: Annotated[
        float, SECONDS, "Time that the calls of such a connection then have to end before it is closed."
    ] = 30.0
    front: Annotated[
        Literal["auto", "native", "python"],
        "Network front. native: in Rust. python: based on grpc.aio, and slower. auto: native if it is installed.",
    ] = "auto"
    store: Annotated[
        Literal["disk", "memory"] | StoreUrl,
        STORE,
        "Where to keep sessions. disk: under --data-dir. memory: lost when the server stops. URL: in a Valkey that "
        "several servers share, valkey://HOST[:PORT][,HOST[:PORT]...]/DB?..., or valkeys:// over TLS; see "
        "docs/operate/scale-out.md. Valkey needs the extra valkey.",
    ] = "disk"
    data_dir: Annotated[
        Path | None,
        FOLDER,
        "Folder of the store on disk, used by one server at a time. Default: stepwell in the user's data folder.",
    ] = None
    durability: Annotated[
        Literal["sync", "async"],
        "What an acknowledged change survives. sync: a power failure of the machine that stores it. async: kill -9 "
        "of this server.",
    ] = "sync"
    encryption_key_file: Annotated[
        Path | None,
        FILE,
        "File of keys that encrypt stored states, readable by its owner only. The first key encrypts; every "
        "key decrypts. 'stepwell store new-key' creates one.",
    ] = None
    max_batch_rows: Annotated[int, COUNT, "Maximum rows in one pass, over all its sessions."] = 1024
    resident_rows: Annotated[
        Mapping[str, int],
        Table(COUNT, common=True),
        "Rows of state kept in memory, for each model or for the named one. Further sessions are paged out until "
        "they are stepped. Default: 65536, or fewer if a quarter of the memory, divided equally among the models, "
        "does not hold them.",
    ] = dataclasses.field(default_factory=dict)
    max_session_idle_s: Annotated[
        float,
        SECONDS,
        "Time without use after which a session expires, even if its own limit is longer. 0 means never.",
    ] = 0.0
    unnamed_session_idle_s: Annotated[
        float,
        seconds(largest=MAX_IDLE_S),
        "Time without use after which a session expires that was opened without an ID and without its own "
        "limit. 0 means never.",
    ] = 3600.0
    quotas: Annotated[
        Path | None,
        FILE,
        "TOML file of quotas for tenants and callers, reloaded when it changes: see docs/operate/secure.md. "
        "Default: no quotas.",
    ] = None
    metrics_tenants: Annotated[
        int,
        COUNT,
        "Number of tenants with their own metrics, with --quotas. The others share the label other.",
    ] = 100
    compute_threads: Annotated[
        int, count(1, 4096), "Threads that run models, at most 4096. Default: the number of cores."
    ] = dataclasses.field(default_factory=cores)
    metrics_listen: Annotated[
        Address | Literal["off"] | None,
        ADDRESS_OR_OFF,
        f"Address to serve Prometheus metrics on, under /metrics; off for none. Default: {DEFAULT_METRICS}, or "
        "none if that is in use.",
    ] = None
    metrics_token_file: Annotated[
        Path | None,
        FILE,
        "File with the token that scrapers must send as 'Authorization: Bearer TOKEN'. Required for metrics "
        "beyond loopback.",
    ] = None
    audit_log: Annotated[
        Path | None,
        FILE,
        "File for the audit log: a line of JSON for each session that is opened, closed, reset, forked, read, "
        "exported or imported, for each list and for each refused caller. - is standard error. SIGHUP reopens "
        "the file.",
    ] = None
    audit_when_full: Annotated[
        Literal["drop", "refuse"],
        "What to do if the audit log's disk is too slow. drop: drop lines, and log their number later. refuse: "
        "refuse calls that need a line until there is room.",
    ] = "drop"
    bad_models: Annotated[
        Literal["refuse", "skip"],
        "What to do if a model cannot be loaded. refuse: the server does not start. skip: the server serves the "
        "others, and reports the failed one in the log, /readyz and metrics.",
    ] = "refuse"
    models_dir: Annotated[
        Path | None,
        FOLDER,
        "Folder of models: NAME/VERSION.keras, NAME/VERSION.onnx, NAME/VERSION.stepwell, or NAME/VERSION/ that contains one such file.",
        Names(alias="--models"),
    ] = None
    watch_models: Annotated[
        bool,
        "Watch the folder: load versions that appear in it and unload those that disappear.",
        _NEEDS_FOLDER,
    ] = False
    version_policy: Annotated[
        Mapping[str, VersionPolicy],
        Table(POLICY, common=True),
        "Versions in the folder to serve: 'latest N' for the N highest, 'all', or numbers such as 3,5; for all "
        "models, or for the named one. Default: latest 1.",
        _NEEDS_FOLDER,
    ] = dataclasses.field(default_factory=dict)
    sessions: Annotated[
        Literal["keep", "carry", "migrate", "reset"],
        "How to treat the sessions that follow a model's default version when the folder changes it. keep: they "
        "stay on their version until they end. carry: they continue with their states. migrate: a --migration "
        "computes their new states. reset: they restart from the initial state.",
    ] = "keep"
    migrations: Annotated[
        Mapping[str, str],
        Table(FUNCTION),
        "Function that converts states for another version of a model, under the NAME that a change of the "
        "default version refers to.",
        Names(name="migration"),
    ] = dataclasses.field(default_factory=dict)
    wait_for_models: Annotated[
        bool,
        "Whether the server is ready only when all models are loaded. With --no-wait-for-models it is ready at "
        "once and serves each model when it is loaded; a model that cannot be loaded then stops nothing. By "
        "default it waits.",
    ] = True
    allow_model_upload: Annotated[
        bool,
        "Let admins upload model files (stepwell models load --upload). Without it, they can only load files on "
        "the server's disk.",
    ] = False
    trace_endpoint: Annotated[
        str | None,
        URL,
        "Collector for traces over OTLP: http://HOST:4317 for gRPC, http://HOST:4318 for HTTP, https for TLS. "
        "Default: OTEL_EXPORTER_OTLP_ENDPOINT, or no traces. Needs the extra otel.",
    ] = None
    trace_sample: Annotated[
        float,
        SHARE,
        "Share of calls to trace, from 0 to 1. A call that its caller traces is always traced.",
    ] = 0.01
    imports: Annotated[
        Sequence[str],
        Several(MODULE),
        "Module to import before models are loaded, for their custom layers and functions.",
        Names(name="import"),
    ] = ()
    probe_steps: Annotated[
        Mapping[str, int],
        Table(count(1, 100000)),
        "Time steps over which a model is compared with Keras when it is compiled. It only raises the default, "
        "which is 512 or twice the reach of the layers, whichever is larger.",
    ] = dataclasses.field(default_factory=dict)
    trust_causality: Annotated[
        Sequence[str],
        Several(MODEL_NAME),
        "Model to serve even if its graph does not prove that it can be stepped. It is still compared with "
        "Keras.",
    ] = ()
    trust_rows: Annotated[
        Sequence[str],
        Several(MODEL_NAME),
        "Step function (.onnx) whose rows are batched even if its graph does not prove that they stay apart. Without it, "
        "each row of such a model is run alone.",
    ] = ()
    check_with: Annotated[
        Mapping[str, Path],
        Table(DATA_FILE),
        "Your own sequences, (batch, T, features), or an .npz with one array per input. The server does not start "
        "if stepping the model through them differs from Keras.",
    ] = dataclasses.field(default_factory=dict)
    cache_dir: Annotated[
        Path, FOLDER, "Folder for compiled models. Default: stepwell in the user's cache folder."
    ] = dataclasses.field(
        default_factory=lambda: _default_folder("--cache-dir", "XDG_CACHE_HOME", "~/.cache")
    )
    max_model_bytes: Annotated[
        int, size(), "Maximum unpacked size of a model file. Larger files are refused."
    ] = Limits.model_bytes
    max_compile_memory_bytes: Annotated[
        int,
        size(),
        "Maximum memory for compiling a model. Default: three quarters of the machine's memory. Linux only.",
    ] = dataclasses.field(default_factory=default_memory_bytes)
    compile_timeout_s: Annotated[float, SECONDS, "Maximum time for compiling a model. 0 means no limit."] = (
        Limits.timeout_s
    )
    max_message_bytes: Annotated[int, size(1024, MAX_INT32), "Maximum size of a request or reply."] = (
        64 * 1024 * 1024
    )
    max_connections: Annotated[
        int | None,
        COUNT,
        "Maximum connections. Further connections displace idle ones. Default: 16384, or fewer if the limit of "
        "open files is lower. Native front only.",
    ] = None
    max_connections_per_address: Annotated[
        int,
        count(0, MAX_INT32),
        "Maximum connections from one IP address. 0 means no limit. All callers behind a proxy share its "
        "address. Native front only.",
    ] = 0
    max_calls_per_connection: Annotated[
        int, count(1, MAX_INT32), "Maximum running calls of one connection. Further calls wait in the client."
    ] = FrontLimits.streams
    max_held_bytes: Annotated[
        int | None,
        size(1024),
        "Maximum bytes of requests and replies in memory, over all calls. Further calls are refused, to be retried "
        "later. Default: 256 MiB, or four times --max-message-bytes if that is more. Native front only.",
    ] = None
    drain_timeout_s: Annotated[
        float, SECONDS, "Time that queued work has to finish when the server stops."
    ] = 30.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        "Least severe level to log. debug logs every request, info every session.",
    ] = "info"
    log_format: Annotated[Literal["text", "json"], "Lines of key=value, or one JSON object per line."] = (
        "text"
    )

    def __post_init__(self) -> None:
        if self.store == "disk" and self.data_dir is None:
            data_dir = _default_folder("--data-dir", "XDG_DATA_HOME", "~/.local/share")
            object.__setattr__(self, "data_dir", data_dir)
        if self.store == "memory" and self.encryption_key_file is not None:
            raise StartError(
                "--encryption-key-file: must be left out with --store memory, which stores nothing"
            )
        if self.shared_store is not None and self.data_dir is not None:
            raise StartError("--data-dir: must be left out with --store URL, which keeps the sessions there")
        versions = self.versions  # raises
        for option, names in (
            ("--probe-steps", self.probe_steps),
            ("--trust-causality", self.trust_causality),
            ("--trust-rows", self.trust_rows),
            ("--check-with", self.check_with),
            ("--resident-rows", self.resident_rows.keys() - {""}),
        ):
            for name in names:
                if (
                    name not in self.versions and self.models_dir is None
                ):  # the models in a folder are not known yet
                    known = ", ".join(versions)
                    raise StartError(f"{option}: there is no model {name!r}; the models are {known}")
        for each in settings_of(type(self)):
            each.check_needs(self)
        if self.sessions == "migrate" and not self.migrations:
            raise StartError("--sessions: migrate needs a function, given by --migration; got none")
        held, message = self.max_held_bytes, self.max_message_bytes
        if held is not None and held < message:
            raise StartError(
                f"--max-held-bytes must be at least --max-message-bytes, which is {message}; got {held}"
            )

    @property
    def shared_store(self) -> StoreUrl | None:
        """URL of the store that several servers share; None: the store belongs to this server alone."""
        return self.store if isinstance(self.store, StoreUrl) else None

    @property
    def store_kind(self) -> Literal["disk", "memory", "valkey"]:
        """Kind of the store."""
        return "valkey" if isinstance(self.store, StoreUrl) else self.store

    @functools.cached_property
    def versions(self) -> Mapping[str, Mapping[int, Path]]:
        """The files in `models`, by name and version."""
        return _versions_of(self.models)

    @property
    def compile_limits(self) -> Limits:
        """Resource limits for compiling one model."""
        return Limits(self.max_model_bytes, self.max_compile_memory_bytes, self.compile_timeout_s)

    def policy_of(self, name: str) -> VersionPolicy:
        """Return the policy that selects the served versions of a model in the folder."""
        return self.version_policy.get(name) or self.version_policy.get("", LATEST)

    @property
    def asks_callers(self) -> bool:
        """Whether the server authenticates its callers, and refuses unknown ones."""
        return any((self.auth_tokens, self.auth_certificates, self.auth_jwks))

    def require_models(self) -> None:
        """Check that there is a model to serve.

        Raises:
            StartError: no model is given, or a model's file or the folder of models does not exist.
        """
        if not self.models and self.models_dir is None:
            raise StartError(
                "models: give at least one as NAME=PATH, such as forecast=model.keras, or in STEPWELL_MODELS; or give a folder "
                "of models with --models"
            )
        for name, path in self.models.items():
            if not path.is_file():
                what = folder_problem(path) if path.is_dir() else "does not exist"
                raise StartError(
                    f"model {name}: PATH must be a .keras, .onnx or .stepwell file; {path} {what}"
                )
        if self.models_dir is not None and not self.models_dir.is_dir():
            what = "is a file" if self.models_dir.exists() else "does not exist"
            raise StartError(f"--models: must be a folder; {self.models_dir} {what}")


def _versions_of(models: Mapping[str, Path]) -> dict[str, dict[int, Path]]:
    """Return the files by name and version.

    Raises:
        StartError: a version is given twice.
    """
    found: dict[str, dict[int, Path]] = {}
    texts: dict[tuple[str, int], str] = {}
    for text, path in models.items():
        ref = parse_reference(text)
        version = ref.version or _version_in(ref, path)
        before = texts.setdefault((ref.name, version), text)
        if before is not text:
            raise StartError(
                f"models: each version must be given once; {ref.name}@{version} is given as {before}={models[before]} and as "
                f"{text}={path}"
            )
        found.setdefault(ref.name, {})[version] = path
    return found


def _version_in(ref: ModelRef, path: Path) -> int:
    """Return the version in a path such as DIR/NAME/VERSION.keras or DIR/NAME/VERSION/*.keras; 1 for other paths."""
    parent = path.parent
    for name, text in ((parent.name, path.stem), (parent.parent.name, parent.name)):
        if name == ref.name and (version := version_of(text)) is not None:
            return version
    return 1
