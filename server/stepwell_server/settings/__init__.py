"""What a server is started with: each setting once, and what must be true of all of them together.

formats.py  how values are written
fields.py   what a setting is, and all its names
sources.py  reads settings from the command line, variables and the config file, and shows them
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
"""The port that exporters of OpenTelemetry have, too."""
MAX_IDLE_S = 3650 * 86_400
"""The longest limit that a record takes (`core.idle.MAX_IDLE_MS`): a command must not load numpy to show its help."""

_NO_PROOF = ": what others signed for others is no proof"
_NEEDS_KEYS = Needs("auth_jwks", ", the keys that sign")
"""Without it, a server that is given the audience, the issuer or a claim would ask no callers who they are."""
_NEEDS_FOLDER = Needs("models_dir", ", the folder that it is about")


def _default_folder(option: str, variable: str, fallback: str) -> Path:
    """Return the folder where none is given.

    Raises:
        StartError: there is no home.
    """
    try:
        return Path(os.environ.get(variable) or expanded(fallback)) / "stepwell"
    except LookupError:
        raise StartError(
            f"{option}: give a folder; without a home (HOME) and without {variable} there is no default"
        ) from None


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with. Times are in seconds, sizes in bytes.

    The command line, environment variables, the config file, --show-config and docs/reference/cli.md have what stands here, and
    nothing else: a new setting is a new field.

    Raises:
        StartError: they contradict each other.
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
        "Address to serve gRPC on: HOST:PORT, or unix:PATH, a socket for users of the server's account only. "
        "With port 0 the system chooses one, and the line on stdout says which.",
    ] = DEFAULT_LISTEN
    insecure_listen: Annotated[
        bool,
        "Listen beyond loopback even without TLS, without known callers, and with metrics for everybody. Use "
        "it where something else, such as a proxy, decides who can connect.",
    ] = False
    tls_cert: Annotated[
        Path | None,
        FILE,
        "Certificate of the server in PEM, followed by those between it and its CA. Callers must then use "
        "TLS. The server reads the file again when it changes.",
        Needs("tls_key"),
    ] = None
    tls_key: Annotated[
        Path | None, FILE, "Private key of --tls-cert in PEM, not encrypted.", Needs("tls_cert")
    ] = None
    tls_client_ca: Annotated[
        Path | None,
        FILE,
        "Certificates of CAs in PEM. Callers must show a certificate that one of them has signed.",
        Needs("tls_cert"),
    ] = None
    auth_tokens: Annotated[
        Path | None,
        FILE,
        "Callers by the tokens that they send, as 'stepwell tokens' writes them. No other callers are served "
        "then. The server reads this file again when it changes, and those of the next two options.",
    ] = None
    auth_certificates: Annotated[
        Path | None,
        FILE,
        "Callers by the certificates that they show, in TOML: tables [[caller]] with san, name, tenant and role.",
        Needs("tls_client_ca", ", which asks for them"),
    ] = None
    auth_jwks: Annotated[
        Path | None,
        FILE,
        "Public keys, a JWKS, whose JWTs callers may send as tokens.",
        Needs("auth_jwt_audience", _NO_PROOF),
        Needs("auth_jwt_issuer", _NO_PROOF),
    ] = None
    auth_jwt_audience: Annotated[
        str | None, TEXT, "The audience (aud) that a JWT must be for.", _NEEDS_KEYS
    ] = None
    auth_jwt_issuer: Annotated[str | None, TEXT, "The issuer (iss) that a JWT must be from.", _NEEDS_KEYS] = (
        None
    )
    auth_jwt_tenant_claim: Annotated[
        str, CLAIM, "The claim of a JWT that names the tenant of its caller.", _NEEDS_KEYS
    ] = "tenant"
    auth_jwt_role_claim: Annotated[
        str,
        CLAIM,
        "The claim of a JWT that is the role of its caller, or a list with it: user, viewer or admin.",
        _NEEDS_KEYS,
    ] = "role"
    max_connection_age_s: Annotated[
        float,
        SECONDS,
        "Time, give or take a tenth, after which a connection takes no more calls and its client should make "
        "a new one. 0 means never.",
    ] = 0.0
    max_connection_age_grace_s: Annotated[
        float, SECONDS, "Time that calls of such a connection have to end before it is closed."
    ] = 30.0
    front: Annotated[
        Literal["auto", "native", "python"],
        "What accepts connections: native, the front in Rust; python, grpc.aio, which is slower; auto, native "
        "where it is installed.",
    ] = "auto"
    store: Annotated[
        Literal["disk", "memory"] | StoreUrl,
        STORE,
        "Where sessions are kept: on disk under --data-dir; in memory, where they end with the server; or in "
        "a Valkey that several servers share, valkey://HOST[:PORT][,HOST[:PORT]...]/DB?..., valkeys:// over "
        "TLS: see docs/operate/scale-out.md. Needs the extra valkey.",
    ] = "disk"
    data_dir: Annotated[
        Path | None,
        FOLDER,
        "Folder of the store on disk, for one server at a time. Default: stepwell in the user's data folder.",
    ] = None
    durability: Annotated[
        Literal["sync", "async"],
        "What an acknowledged change survives: sync, a power failure of the machine that keeps it; async, "
        "kill -9 of this server.",
    ] = "sync"
    encryption_key_file: Annotated[
        Path | None,
        FILE,
        "Keys that encrypt stored states. Only the file's owner may read it. The first key encrypts, all "
        "decrypt. 'stepwell store new-key' makes one.",
    ] = None
    max_batch_rows: Annotated[int, COUNT, "Most rows that run together, over all sessions of a pass."] = 1024
    resident_rows: Annotated[
        Mapping[str, int],
        Table(COUNT, common=True),
        "Rows of state kept ready to step, of each model, or of the named one. Sessions beyond are paged out "
        "until they are stepped. Default: 65536, or as many as fit in the model's part of "
        "a quarter of the memory, which the models divide equally.",
    ] = dataclasses.field(default_factory=dict)
    max_session_idle_s: Annotated[
        float,
        SECONDS,
        "Time after which an unused session expires, even if its own limit is longer. 0 means never.",
    ] = 0.0
    unnamed_session_idle_s: Annotated[
        float,
        seconds(largest=MAX_IDLE_S),
        "Time after which an unused session expires that was opened without an id and without a limit of its "
        "own. 0 means never.",
    ] = 3600.0
    quotas: Annotated[
        Path | None,
        FILE,
        "TOML file of quotas of tenants and callers, read again when it changes: see docs/operate/secure.md. "
        "Default: none.",
    ] = None
    metrics_tenants: Annotated[
        int, COUNT, "Tenants that have metrics of their own, with --quotas. The others share the label other."
    ] = 100
    compute_threads: Annotated[
        int, count(1, 4096), "Threads that run models, 4096 at most. Default: as many as there are cores."
    ] = dataclasses.field(default_factory=cores)
    metrics_listen: Annotated[
        Address | Literal["off"] | None,
        ADDRESS_OR_OFF,
        f"Address to serve Prometheus metrics on, under /metrics. off: nowhere. Default: {DEFAULT_METRICS}, or "
        "nowhere if it is in use.",
    ] = None
    metrics_token_file: Annotated[
        Path | None,
        FILE,
        "File with a token that a reader of metrics must send as 'Authorization: Bearer TOKEN'. Metrics "
        "beyond loopback need it.",
    ] = None
    audit_log: Annotated[
        Path | None,
        FILE,
        "File that gets a line of JSON for each session that is opened, closed, reset, forked, read, exported "
        "or imported, for each list and for each refused caller. - is standard error. SIGHUP opens the file "
        "again.",
    ] = None
    audit_when_full: Annotated[
        Literal["drop", "refuse"],
        "What happens when the audit log is written too slowly: drop, lines are left out and counted, and the "
        "count is written later; refuse, calls that need a line are refused until there is room.",
    ] = "drop"
    bad_models: Annotated[
        Literal["refuse", "skip"],
        "What a model that cannot be loaded does: refuse, the server does not start; skip, it serves the "
        "others, and log, /readyz and metrics say which one failed.",
    ] = "refuse"
    models_dir: Annotated[
        Path | None,
        FOLDER,
        "Folder of models: NAME/VERSION.keras, NAME/VERSION.stepwell, or NAME/VERSION/ with one such file.",
        Names(alias="--models"),
    ] = None
    watch_models: Annotated[
        bool, "Watch the folder: load versions that appear there, unload those that disappear.", _NEEDS_FOLDER
    ] = False
    version_policy: Annotated[
        Mapping[str, VersionPolicy],
        Table(POLICY, common=True),
        "Which versions in the folder are served: 'latest N', the N highest; all; or versions such as 3,5. "
        "For all names, or for one. Default: latest 1.",
        _NEEDS_FOLDER,
    ] = dataclasses.field(default_factory=dict)
    sessions: Annotated[
        Literal["keep", "carry", "migrate", "reset"],
        "What happens to sessions that follow the default version of a name when the folder gives it another "
        "one: keep, they stay on theirs until they end; carry, they continue with their states; migrate, a "
        "--migration makes their new states; reset, they start again.",
    ] = "keep"
    migrations: Annotated[
        Mapping[str, str],
        Table(FUNCTION),
        "Function that makes states for another version of a model, and the name by which a change of version "
        "asks for it.",
        Names(name="migration"),
    ] = dataclasses.field(default_factory=dict)
    wait_for_models: Annotated[
        bool,
        "Whether the server is ready when all models are; or at once, and each model as soon as it is loaded: "
        "then one that cannot be loaded stops nothing. By default it waits.",
    ] = True
    allow_model_upload: Annotated[
        bool,
        "Let admins send files of models to load them (stepwell models load --upload). Without it they name "
        "files on the server's disk.",
    ] = False
    trace_endpoint: Annotated[
        str | None,
        URL,
        "Collector that gets traces by OTLP: http://HOST:4317 by gRPC, http://HOST:4318 by HTTP, https for "
        "TLS. Default: that of OTEL_EXPORTER_OTLP_ENDPOINT, or none. Needs the extra otel.",
    ] = None
    trace_sample: Annotated[
        float,
        SHARE,
        "Share of calls to trace, from 0 to 1, where the caller does not decide: what a caller traces is "
        "traced.",
    ] = 0.01
    imports: Annotated[
        Sequence[str],
        Several(MODULE),
        "Module to import before a model is loaded, for its own layers and functions.",
        Names(name="import"),
    ] = ()
    probe_steps: Annotated[
        Mapping[str, int],
        Table(count(1, 100000)),
        "Time steps over which a model is compared with Keras when it is compiled, if more than 512 and twice "
        "what its layers reach.",
    ] = dataclasses.field(default_factory=dict)
    trust_causality: Annotated[
        Sequence[str],
        Several(MODEL_NAME),
        "Model to serve even if its graph does not prove that it may be stepped. It is still compared with "
        "Keras.",
    ] = ()
    check_with: Annotated[
        Mapping[str, Path],
        Table(DATA_FILE),
        "Sequences of your own, (batch, T, features), or an .npz of them by the names of the inputs. The "
        "server does not start if stepping the model through them differs from Keras.",
    ] = dataclasses.field(default_factory=dict)
    cache_dir: Annotated[
        Path, FOLDER, "Folder for compiled models. Default: stepwell in the user's cache folder."
    ] = dataclasses.field(
        default_factory=lambda: _default_folder("--cache-dir", "XDG_CACHE_HOME", "~/.cache")
    )
    max_model_bytes: Annotated[
        int, size(), "Largest size of a model's file when it is unpacked. A larger one is refused."
    ] = Limits.model_bytes
    max_compile_memory_bytes: Annotated[
        int,
        size(),
        "Most memory that compiling a model may take. Default: three quarters of what there is. Linux only.",
    ] = dataclasses.field(default_factory=default_memory_bytes)
    compile_timeout_s: Annotated[
        float, SECONDS, "Longest time that compiling a model may take. 0 means no limit."
    ] = Limits.timeout_s
    max_message_bytes: Annotated[int, size(1024, MAX_INT32), "Largest size of a request or reply."] = (
        64 * 1024 * 1024
    )
    max_connections: Annotated[
        int | None,
        COUNT,
        "Most connections. For more of them, idle ones are closed. Default: 16384, or as many as the limit of "
        "open files leaves room for. The native front only.",
    ] = None
    max_connections_per_address: Annotated[
        int,
        count(0, MAX_INT32),
        "Most connections from one IP address. 0 means no limit. All callers behind a proxy have one address. "
        "The native front only.",
    ] = 0
    max_calls_per_connection: Annotated[
        int, count(1, MAX_INT32), "Most calls in progress on one connection. More of them wait at the client."
    ] = FrontLimits.streams
    max_held_bytes: Annotated[
        int | None,
        size(1024),
        "Most bytes of requests and replies in memory, of all calls. Beyond, calls are refused with a delay. "
        "Default: 256 MiB, or four times --max-message-bytes if that is more. The native front only.",
    ] = None
    drain_timeout_s: Annotated[float, SECONDS, "Time that a stopping server gives to queued work."] = 30.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], "debug: every request; info: every session."
    ] = "info"
    log_format: Annotated[Literal["text", "json"], "Lines of key=value, or one JSON object per line."] = (
        "text"
    )

    def __post_init__(self) -> None:
        if self.store == "disk" and self.data_dir is None:
            data_dir = _default_folder("--data-dir", "XDG_DATA_HOME", "~/.local/share")
            object.__setattr__(self, "data_dir", data_dir)
        if self.store == "memory" and self.encryption_key_file is not None:
            raise StartError("--encryption-key-file: with --store memory nothing is kept on disk to encrypt")
        if self.shared_store is not None and self.data_dir is not None:
            raise StartError("--data-dir: with --store URL sessions are kept there, and nothing on disk here")
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
                    raise StartError(f"{option}: there is no model {name!r}; the models are {known}")
        for each in settings_of(type(self)):
            each.check_needs(self)
        if self.sessions == "migrate" and not self.migrations:
            raise StartError(
                "--sessions: with migrate the function must be given by --migration; there is none"
            )
        held, message = self.max_held_bytes, self.max_message_bytes
        if held is not None and held < message:
            raise StartError(
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

    @property
    def compile_limits(self) -> Limits:
        """What compiling one model may take."""
        return Limits(self.max_model_bytes, self.max_compile_memory_bytes, self.compile_timeout_s)

    def policy_of(self, name: str) -> VersionPolicy:
        """Which versions of a name in the folder of models are served."""
        return self.version_policy.get(name) or self.version_policy.get("", LATEST)

    @property
    def asks_callers(self) -> bool:
        """Nobody is served whom the server does not know."""
        return any((self.auth_tokens, self.auth_certificates, self.auth_jwks))

    def require_models(self) -> None:
        """Find out whether there is something to serve.

        Raises:
            StartError: no model is given, or the file of one is none, or the folder.
        """
        if not self.models and self.models_dir is None:
            raise StartError(
                "models: give at least one as NAME=PATH, such as forecast=model.keras, or in STEPWELL_MODELS; or a folder of "
                "them by --models"
            )
        for name, path in self.models.items():
            if not path.is_file():
                what = folder_problem(path) if path.is_dir() else "does not exist"
                raise StartError(f"model {name}: PATH must be a .keras or .stepwell file; {path} {what}")
        if self.models_dir is not None and not self.models_dir.is_dir():
            what = "is a file" if self.models_dir.exists() else "does not exist"
            raise StartError(f"--models: must be a folder; {self.models_dir} {what}")


def _versions_of(models: Mapping[str, Path]) -> dict[str, dict[int, Path]]:
    """The files by name and version.

    Raises:
        StartError: a version has two.
    """
    found: dict[str, dict[int, Path]] = {}
    said: dict[tuple[str, int], str] = {}
    for text, path in models.items():
        ref = parse_reference(text)
        version = ref.version or _version_in(ref, path)
        before = said.setdefault((ref.name, version), text)
        if before is not text:
            raise StartError(
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
