"""The examination of `stepwell doctor`: facts about this machine that matter to a server, and problems.

It changes nothing: it tests a disk with a file that has no name. It does not disturb a running server.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from stepwell_server import program_file
from stepwell_server.addresses import Address, UnixAddress, bind_problem
from stepwell_server.catalog.files.folder import LAYOUT, ModelFolder
from stepwell_server.catalog.files.programs import require_frameworks
from stepwell_server.clock import Clock
from stepwell_server.compile import cache
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host import sandbox, source
from stepwell_server.compile.keras_file import origin
from stepwell_server.compile.onnx import declaration
from stepwell_server.errors import StartError
from stepwell_server.exposure import require_closed
from stepwell_server.files import private_files
from stepwell_server.process.memory import cgroup_values, memory_limit_bytes
from stepwell_server.process.open_files import RESERVE
from stepwell_server.program import Declaration
from stepwell_server.rpc.fronts import unix_socket
from stepwell_server.rpc.fronts.choice import HOW, Choice, choose
from stepwell_server.settings import Settings, cores

if TYPE_CHECKING:
    from stepwell_server.store.base import Holder
    from stepwell_server.store.valkey.connection.url import StoreUrl

Facts = dict[str, object]
PACKAGES = {
    "stepwell": "stepwell",
    "native_front": "stepwell-front",
    "tensorflow": "tensorflow",
    "keras": "keras",
    "litert": "ai-edge-litert",
    "onnxruntime": "onnxruntime",
    "grpcio": "grpcio",
    "protobuf": "protobuf",
    "numpy": "numpy",
}
"""Distributions by their common names."""
_REMOTE = {"9p", "afs", "ceph", "cifs", "fuse.sshfs", "glusterfs", "nfs", "nfs4", "smb3", "smbfs"}
_MIN_FREE_BYTES = 64 << 20
_MIN_FREE_SHARE = 0.05
_MIN_OPEN_FILES = 4096
_WRITES = 21
_SLOW_MS = 20.0
_EARLIEST = dt.datetime(2025, 1, 1, tzinfo=dt.UTC).timestamp()
_AHEAD_S = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """A problem or a possible improvement."""

    what: str
    fix: str
    is_wrong: bool = True
    """False: a server would start and keep its guarantees anyway."""

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


class Examination:
    """Facts in sections, and findings, about one machine and the settings of one server.

    Args:
        settings: The server's settings.
        clock: The time.
        serves: Whether the packages of a server are installed. If not, only facts about clients are examined.
        listening: Returns the process that listens on a TCP port, if it can be determined.
    """

    def __init__(
        self, settings: Settings, clock: Clock, *, serves: bool, listening: Callable[[int], int | None]
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._listening = listening
        self.facts: dict[str, Facts] = {}
        self.findings: list[Finding] = []
        self._server: Holder | None = None
        self._serves = serves

    def examine(self) -> None:
        """Collect all facts and findings. Root examines as the owner of the data folder."""
        owner = os.geteuid()
        if owner == 0 and self._settings.data_dir is not None:
            with contextlib.suppress(OSError):
                owner = self._settings.data_dir.stat().st_uid
        with private_files.as_user(owner):
            self._examine()

    def _examine(self) -> None:
        data_dir = self._settings.data_dir
        self.facts["versions"] = self._versions()
        self.facts["limits"] = self._limits()
        if self._serves and data_dir is not None:
            from stepwell_server.store.disk.lock import holder_of  # needs packages of the server

            self._server = holder_of(data_dir)
            self.facts["data-dir"] = self._folder("--data-dir", data_dir)
            self.facts["data-dir"]["user"] = private_files.user_text(private_files.server_user())
            self.facts["data-dir"]["used_by"] = self._server and str(self._server)
            self.facts["disk"] = self._disk(data_dir)
        if self._serves:
            self._store_and_keys(data_dir)
        if self._serves:
            url = self._settings.shared_store
            self.facts["store"] = {"kind": self._settings.store_kind}
            if url is not None:
                self.facts["store"] |= self._shared_store(url)
            self.facts["cache-dir"] = self._folder("--cache-dir", self._settings.cache_dir)
            self.facts["ports"] = self._ports()
            choice = self._front_choice()
            self.facts["front"] = {"serves": choice.name, "reason": choice.problem or None}
            self._reach(choice)
            self.facts["compiling"] = self._compiling()
            self._files_of_settings()
        self.facts["clock"] = self._time()

    def wrong(self, what: str, fix: str) -> None:
        """Report a problem: a server would not start, or would break its guarantees."""
        self.findings.append(Finding(what, fix))

    def advise(self, what: str, fix: str) -> None:
        """Report a possible improvement: a server would work, but not well."""
        self.findings.append(Finding(what, fix, is_wrong=False))

    def _versions(self) -> Facts:
        facts: Facts = {"python": platform.python_version(), "system": platform.platform()}
        facts |= {name: _version(package) for name, package in PACKAGES.items()}
        return facts

    def _front_choice(self) -> Choice:
        """The front that a server would use. Advise the native one if it cannot be used."""
        try:
            choice = choose(self._settings.front)
        except StartError as error:
            self.wrong(str(error), "or omit --front")
            return Choice(None)
        if choice.problem:
            self.advise(
                f"{choice.problem}: the Python front, which a server would use, is slower and serves only this machine",
                HOW,
            )
        return choice

    def _limits(self) -> Facts:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        file_bytes, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        quota = _cgroup_cpus()
        memory = psutil.virtual_memory()
        if hard != resource.RLIM_INFINITY and hard < _MIN_OPEN_FILES:
            self.advise(
                f"the limit of {hard} open files allows only {max(1, hard - RESERVE)} connections",
                "raise the hard limit (ulimit -Hn, LimitNOFILE of systemd)",
            )
        if file_bytes != resource.RLIM_INFINITY:
            self.wrong(
                f"files are limited to {file_bytes} bytes, but those of the store grow larger",
                "remove the limit (ulimit -f, LimitFSIZE of systemd)",
            )
        if quota is not None and self._settings.compute_threads > max(1.0, quota):
            self.advise(
                f"{self._settings.compute_threads} compute threads share {quota:g} processors, and the cgroup pauses all "
                "of them when that quota is used up",
                f"use --compute-threads {max(1, int(quota))}",
            )
        return {
            "open_files": None if soft == resource.RLIM_INFINITY else soft,
            "open_files_hard": None if hard == resource.RLIM_INFINITY else hard,
            "cpus": cores(),
            "cgroup_cpus": quota,
            "memory_bytes": memory.total,
            "available_memory_bytes": memory.available,
            "cgroup_memory_bytes": memory_limit_bytes(),
        }

    def _folder(self, option: str, path: Path) -> Facts:
        there = _existing(path)
        try:
            with tempfile.TemporaryFile(dir=there):
                problem = "" if there.is_dir() else "not a folder"
        except OSError as error:
            problem = error.strerror or str(error)
        holds = cache.HOLDS if option == "--cache-dir" else private_files.OF_DATA
        if there.is_dir() and (shared := private_files.folder_problem(path, holds)):
            self.wrong(f"{option}: {shared}", "use a folder that only the server's user can write to")
        if problem:
            self.wrong(
                f"{option}: {there} is not writable: {problem}",
                f"use another folder, or give the user {psutil.Process().username()} the right to write",
            )
        usage = shutil.disk_usage(there)
        if usage.free < _MIN_FREE_BYTES:
            self.wrong(
                f"{option}: the disk of {path} is full; {usage.free} bytes are free",
                "free some space, or use another folder",
            )
        elif usage.free < usage.total * _MIN_FREE_SHARE:
            self.advise(
                f"{option}: only {usage.free / usage.total:.1%} of the disk of {path} is free",
                "free some space in time",
            )
        kind = _file_system(there)
        return {
            "path": str(path),
            "exists": path.exists(),
            "writable": not problem,
            "used_bytes": sum(file.st_blocks * 512 for file in _files(path)),  # the store's files are sparse
            "free_bytes": usage.free,
            "total_bytes": usage.total,
            "file_system": kind,
        }

    def _disk(self, data_dir: Path) -> Facts:
        there = _existing(data_dir)
        kind = _file_system(there)
        if kind in _REMOTE:
            self.wrong(
                f"--data-dir: {data_dir} is on {kind}, a network file system",
                "use a folder on a local disk: the store maps its file into memory and relies on the kernel's locks",
            )
        elif kind in {"tmpfs", "ramfs"}:
            self.advise(
                f"--data-dir: {data_dir} is in memory ({kind})",
                "use a folder on a disk, to survive a reboot",
            )
        try:
            times = sorted(_flush_times_ms(there))
        except OSError:
            return {"flush_ms": None, "slowest_flush_ms": None}  # already reported for the folder
        median = statistics.median(times)
        if median > _SLOW_MS and self._settings.durability == "sync":
            self.advise(
                f"--data-dir: a flush to the disk takes {median:.1f} ms, and every acknowledged change waits for one",
                "use a faster disk, or --durability async, which survives kill -9 but not a power failure",
            )
        return {"flush_ms": round(median, 3), "slowest_flush_ms": round(times[-1], 3)}

    def _store_and_keys(self, data_dir: Path | None) -> None:
        """Check that a server could open the store on disk: its version, its log, and the keys of its records."""
        from stepwell_server.store.base import KeyFileError, StoreError, require_no_keys
        from stepwell_server.store.disk.backup import snapshot
        from stepwell_server.store.factory import read_keyring

        key_file = self._settings.encryption_key_file
        try:
            keyring = None if key_file is None else read_keyring(key_file)
            if data_dir is None or not (data_dir / snapshot.DATA).is_file():
                return
            with snapshot.opened(data_dir) as stored:
                known = stored.key_checks
            if keyring is None:
                require_no_keys(f"in {data_dir}", known)
            else:
                keyring.require(known)
        except KeyFileError as error:
            self.wrong(f"--encryption-key-file: {error}", "correct the file, or use another one")
        except StoreError as error:
            self.wrong(
                f"--data-dir: {error}", "use another folder; 'stepwell store' checks and repairs stores"
            )

    def _shared_store(self, url: StoreUrl) -> Facts:
        from stepwell_server.store.base import StoreError
        from stepwell_server.store.factory import inspect_shared_store

        facts: Facts = {
            "url": str(url),
            "servers": None,
            "exists": None,
            "partitions": None,
            "sessions": None,
        }
        try:
            found = asyncio.run(inspect_shared_store(url, self._settings.durability))
        except StoreError as error:
            self.wrong(f"--store: {error}", "docs/operate/scale-out.md says what it needs")
            return facts
        for what in (*found.findings.unfit, *found.findings.problems):
            self.wrong(f"--store: {what}", "docs/operate/scale-out.md has the settings of Valkey")
        for what in found.findings.warnings:
            self.advise(f"--store: {what}", "docs/operate/scale-out.md has the settings of Valkey")
        facts["servers"], facts["exists"] = ", ".join(found.servers), found.partitions is not None
        facts["partitions"], facts["sessions"] = found.partitions, found.sessions
        return facts

    def _ports(self) -> Facts:
        settings = self._settings
        addresses = {
            "listen": settings.listen,
            "http-listen": settings.http_listen,
            "metrics-listen": settings.metrics_listen,
        }
        return {
            name: self._port(f"--{name}", address)
            for name, address in addresses.items()
            if isinstance(address, Address | UnixAddress)
        }

    def _port(self, option: str, address: Address | UnixAddress) -> str:
        if isinstance(address, UnixAddress):
            problem, pid = _socket_problem(address.path), None
        else:
            problem, pid = bind_problem(address), self._listening(address.port)
        if problem is None:
            return f"{address} is free"
        if self._server is not None and (pid == self._server.pid or self._server.listen == str(address)):
            return f"{address} is used by the running server"
        who = f" (process {pid}, {_name(pid)})" if pid else ""
        self.wrong(
            f"{option}: a server cannot listen on {address}: {problem}{who}",
            "use another address, or stop the process that uses it",
        )
        return f"{address} is not free: {problem}{who}"

    def _reach(self, front: Choice) -> None:
        try:
            require_closed(self._settings, front_problem=front.advice)
        except (StartError, OSError) as error:
            self.wrong(str(error), "set it up as docs/operate/secure.md describes")

    def _compiling(self) -> Facts:
        """The protection of the machine from the process that compiles a model."""
        protection = sandbox.tried()
        if protection.missing:
            self.advise(
                f"this machine cannot deny the process that compiles models access to {protection.missing}",
                "use a kernel with seccomp and Landlock (docs/operate/secure.md), compile models elsewhere, or compile only your own",
            )
        return {name: by or None for name, by in dataclasses.asdict(protection).items()}

    def _files_of_settings(self) -> None:
        settings = self._settings
        try:
            if settings.models or settings.models_dir is not None:
                settings.require_models()
            for name, path in settings.models.items():
                self._model(name, path)
            if settings.models_dir is not None:
                self._models_folder(ModelFolder(settings.models_dir))
        except StartError as error:
            self.wrong(str(error), "use another file")
        from stepwell_server import start_files  # needs packages of the server

        for read in start_files.readers(settings, self._clock).values():
            try:
                read()
            except StartError as error:
                self.wrong(str(error), "correct the file, or use another one")
        for name in settings.imports:
            if PathFinder.find_spec(name.partition(".")[0], [os.getcwd(), *sys.path]) is None:
                self.wrong(f"--import: there is no module {name}", "install it, or use another one")
        audit = settings.audit_log
        if audit is not None and str(audit) != "-" and not audit.parent.is_dir():
            self.wrong(
                f"--audit-log: the folder {audit.parent} does not exist", "create it, or use another folder"
            )

    def _models_folder(self, folder: ModelFolder) -> None:
        """Examine the folder of models."""
        folder.look()
        look = folder.look()
        for path, why in sorted(look.problems.items()):
            self.advise(f"--models: {path} {why}", "correct or remove it: it is not served")
        if not look.versions:
            self.wrong(f"--models: {folder.root} contains no model", f"put one there as {LAYOUT}")
        for name, versions in sorted(look.versions.items()):
            for version in sorted(self._settings.policy_of(name).choose(versions)):
                self._model(f"{name}@{version}", Path(versions[version].path))

    def _model(self, name: str, path: Path) -> None:
        try:
            if program_file.is_program(path):
                program_file.load(path, self._settings.max_model_bytes)
                return
            declaration.of_model(path, Declaration())
            if path.suffix == declaration.SUFFIX:
                require_frameworks(path)
                return
            with source.opened(path):  # not a pipe or device, on which reading would block
                problem = origin.archive_problem(path)
            if problem:
                self.wrong(f"model {name}: {path}: {problem}", "use another file")
        except ModelError as error:
            self.wrong(f"model {name}: {error}", "use another file")
        except (program_file.ProgramFileError, OSError) as error:
            self.wrong(f"model {name}: {path}: {error}", "use another file, or compile the model again")

    def _time(self) -> Facts:
        now = self._clock.now()
        data_dir = self._settings.data_dir
        newest = max((file.st_mtime for file in _files(data_dir)), default=0.0) if data_dir else 0.0
        if now < _EARLIEST:
            self.wrong(
                f"the clock shows {_time_text(now)}",
                "set the clock: the expiry of idle sessions and TLS depend on it",
            )
        elif newest > now + _AHEAD_S:
            self.wrong(
                f"the clock shows {_time_text(now)}, but files of the store were written at {_time_text(newest)}",
                "set the clock: the expiry of idle sessions depends on it",
            )
        return {"now": _time_text(now), "newest_file_of_the_store": _time_text(newest) if newest else None}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cgroup_cpus() -> float | None:
    """Return the number of processors that the cgroup may use; None: no limit."""
    limits = [value.split() for value in cgroup_values("cpu.max")]
    return min((int(quota) / int(period) for quota, period in limits if quota != "max"), default=None)


def _existing(path: Path) -> Path:
    """Return the folder, or its nearest ancestor that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _file_system(folder: Path) -> str | None:
    mounts = {partition.mountpoint: partition.fstype for partition in psutil.disk_partitions(all=True)}
    resolved = folder.resolve()
    return next((mounts[str(at)] for at in (resolved, *resolved.parents) if str(at) in mounts), None)


def _files(folder: Path) -> Iterator[os.stat_result]:
    """Return the files under a folder, which a running server may change meanwhile."""
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield os.lstat(Path(root, name))


def _flush_times_ms(folder: Path) -> list[float]:
    flush = getattr(os, "fdatasync", os.fsync)
    times = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for number in range(_WRITES):
            os.pwrite(file.fileno(), bytes(4096), number * 4096)
            began = time.perf_counter()
            flush(file.fileno())
            times.append((time.perf_counter() - began) * 1e3)
    return times


def _socket_problem(path: str) -> str | None:
    try:
        unix_socket.is_left_behind(path)
    except OSError as error:
        return error.strerror
    return None


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "gone"


def _time_text(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
