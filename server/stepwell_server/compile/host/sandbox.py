"""The sandbox that a worker enters before it reads a model. No code can leave it.

A worker parses and runs uploads with C++ libraries. A model that takes over one of them has no network, cannot start
other programs, and can read only the files it needs. The kernel enforces this as far as it supports it; `Protection`
describes how far. Imports no framework.

Linux only. On other systems a worker has the limits of `limits`, and its own environment and folders.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CAPABILITY_VERSION, _CAP_DAC_READ_SEARCH = 0x20080522, 2
_MAX_OPEN_FILES = 1024
_TRY_S = 30.0

# Berkeley packet filter for seccomp: code, constant, and the numbers of instructions to skip if true and if false.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
_CLONE_THREAD = 0x10000
_OTHER_NUMBERS = 0x40000000
"""x86_64 repeats its calls from this number on (x32)."""


#: Refused system calls, by purpose.
REFUSED_CALLS = (
    # the network, and io_uring, which opens sockets without `socket`
    "socket",
    "io_uring_setup",
    # other processes and programs
    "fork",
    "vfork",
    "execve",
    "execveat",
    # memory, limits, priorities and signals of other processes
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "pidfd_getfd",
    "pidfd_send_signal",
    "tkill",
    "setpriority",
    "sched_setparam",
    "sched_setscheduler",
    "sched_setattr",
    "ioprio_set",
    "perf_event_open",
    # the kernel, and file systems that Landlock would not know
    "kexec_load",
    "bpf",
    "userfaultfd",
    "add_key",
    "request_key",
    "keyctl",
    "unshare",
    "setns",
    "mount",
    "open_tree",
    "move_mount",
    "fsopen",
    "chroot",
    "open_by_handle_at",
    # modes, owners and attributes of files, which Landlock does not see
    "chmod",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "chown",
    "fchown",
    "lchown",
    "fchownat",
    "setxattr",
    "fsetxattr",
    "lsetxattr",
    "setxattrat",
    "removexattr",
    "fremovexattr",
    "lremovexattr",
    "removexattrat",
    # memory that is not counted, or that outlives the process
    "memfd_create",
    "memfd_secret",
    "shmget",
    "semget",
    "msgget",
    "mq_open",
)
#: System calls allowed on the process itself, but not on other processes of the same user.
OWN_CALLS = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "prlimit64", "sched_setaffinity")
#: Numbers of these system calls, of clone (allowed for threads only, so that the limits of the process cover
#: everything) and
#: of clone3, from the kernel: arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h for aarch64,
#: which lacks calls that have newer replacements.
CALL_NUMBERS = {
    "x86_64": {
        "shmget": 29,
        "socket": 41,
        "clone": 56,
        "fork": 57,
        "vfork": 58,
        "execve": 59,
        "kill": 62,
        "semget": 64,
        "msgget": 68,
        "chmod": 90,
        "fchmod": 91,
        "chown": 92,
        "fchown": 93,
        "lchown": 94,
        "ptrace": 101,
        "rt_sigqueueinfo": 129,
        "setpriority": 141,
        "sched_setparam": 142,
        "sched_setscheduler": 144,
        "chroot": 161,
        "mount": 165,
        "setxattr": 188,
        "lsetxattr": 189,
        "fsetxattr": 190,
        "removexattr": 197,
        "lremovexattr": 198,
        "fremovexattr": 199,
        "tkill": 200,
        "sched_setaffinity": 203,
        "tgkill": 234,
        "mq_open": 240,
        "kexec_load": 246,
        "add_key": 248,
        "request_key": 249,
        "keyctl": 250,
        "ioprio_set": 251,
        "fchownat": 260,
        "fchmodat": 268,
        "unshare": 272,
        "rt_tgsigqueueinfo": 297,
        "perf_event_open": 298,
        "prlimit64": 302,
        "open_by_handle_at": 304,
        "setns": 308,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "sched_setattr": 314,
        "memfd_create": 319,
        "bpf": 321,
        "execveat": 322,
        "userfaultfd": 323,
        "pidfd_send_signal": 424,
        "io_uring_setup": 425,
        "open_tree": 428,
        "move_mount": 429,
        "fsopen": 430,
        "clone3": 435,
        "pidfd_getfd": 438,
        "memfd_secret": 447,
        "fchmodat2": 452,
        "setxattrat": 463,
        "removexattrat": 466,
    },
    "aarch64": {
        "setxattr": 5,
        "lsetxattr": 6,
        "fsetxattr": 7,
        "removexattr": 14,
        "lremovexattr": 15,
        "fremovexattr": 16,
        "ioprio_set": 30,
        "mount": 40,
        "chroot": 51,
        "fchmod": 52,
        "fchmodat": 53,
        "fchownat": 54,
        "fchown": 55,
        "unshare": 97,
        "kexec_load": 104,
        "ptrace": 117,
        "sched_setparam": 118,
        "sched_setscheduler": 119,
        "sched_setaffinity": 122,
        "kill": 129,
        "tkill": 130,
        "tgkill": 131,
        "rt_sigqueueinfo": 138,
        "setpriority": 140,
        "mq_open": 180,
        "msgget": 186,
        "semget": 190,
        "shmget": 194,
        "socket": 198,
        "add_key": 217,
        "request_key": 218,
        "keyctl": 219,
        "clone": 220,
        "execve": 221,
        "rt_tgsigqueueinfo": 240,
        "perf_event_open": 241,
        "prlimit64": 261,
        "open_by_handle_at": 265,
        "setns": 268,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "sched_setattr": 274,
        "memfd_create": 279,
        "bpf": 280,
        "execveat": 281,
        "userfaultfd": 282,
        "pidfd_send_signal": 424,
        "io_uring_setup": 425,
        "open_tree": 428,
        "move_mount": 429,
        "fsopen": 430,
        "clone3": 435,
        "pidfd_getfd": 438,
        "memfd_secret": 447,
        "fchmodat2": 452,
        "setxattrat": 463,
        "removexattrat": 466,
    },
}
#: The kernel's identifiers of architectures in a filter: AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64.
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Landlock: rights on files, given up everywhere except for some folders.
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_PATH_BENEATH = 1, 1
_EXECUTE, _READ_FILE, _READ_FOLDER, _WRITE_FILE, _TRUNCATE, _DEVICE = (
    1 << 0,
    1 << 2,
    1 << 3,
    1 << 1,
    1 << 14,
    1 << 15,
)
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights on files, by the first version of Landlock that has them."""
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _DEVICE
#: System files that libraries read, without the rest of /etc, homes and data.
_SYSTEM = [
    "/usr",
    "/lib",
    "/lib32",
    "/lib64",
    "/bin",
    "/sbin",
    "/opt",
    "/nix",
    "/gnu",
    "/sys/devices/system",
    "/sys/fs/cgroup",
    "/sys/kernel/mm",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
    "/dev/random",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/passwd",
    "/etc/nsswitch.conf",
    "/etc/ssl/openssl.cnf",
    "/etc/mime.types",
]
#: Files in /proc, without those of other processes, which reveal their environment and memory.
_PROCESSES = [
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/filesystems",
    "/proc/sys",
    "/proc/version",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/driver",
    "/proc/devices",
]
_WRITABLE = ("/dev/null",)


@dataclasses.dataclass(frozen=True)
class Protection:
    """What the kernel protects against the process, and by which means."""

    network: str = ""
    """Means that block the network: namespace, seccomp, or both joined by a plus; empty: not blocked."""
    programs: str = ""
    """Means that block other programs; empty: not blocked."""
    files: str = ""
    """Means that restrict reading to some files and writing to its own folders, or only writing."""

    def __str__(self) -> str:
        means = {
            "no network": self.network,
            "no other programs": self.programs,
            "only its own files": self.files,
        }
        had = ", ".join(f"{what} ({by})" for what, by in means.items() if by)
        return had or "none of the kernel's"

    @property
    def missing(self) -> str:
        """What is not protected, for messages; empty: everything is."""
        means = {
            "the network": self.network,
            "other programs": self.programs,
            "files of this user": self.files,
        }
        return " and ".join(what for what, by in means.items() if not by)


def limit(file_bytes: int) -> None:
    """Limit core files (none), the size of a file, and the number of open files. The server limits the rest (`limits`)."""
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    _lower(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    os.umask(0o077)


def _lower(which: int, most: int) -> None:
    _, hard = resource.getrlimit(which)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))


def enter(readable: Iterable[Path] | None, writable: Iterable[Path]) -> Protection:
    """Give up network, other programs and files, as far as this kernel supports it. Call it with one thread only.

    Args:
        readable: files and folders to read, in addition to Python and the system; None: all files.
        writable: folders to write.
    """
    if sys.platform != "linux":
        return Protection()
    libc = ctypes.CDLL(None, use_errno=True)
    # If the fork server is killed, the worker must not continue without limits.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    namespace = _leave_network(libc)
    _drop_capabilities(libc)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return Protection("namespace" if namespace else "")
    files = _confine(libc, readable, writable)
    calls = _filter_calls(libc)
    network = "+".join(name for name, had in (("namespace", namespace), ("seccomp", calls)) if had)
    confined = "" if not files else "Landlock, for writing" if readable is None else "Landlock"
    return Protection(network, "seccomp" if calls else "", confined)


def _leave_network(libc: ctypes.CDLL) -> bool:
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_CLONE_NEWNET) == 0:
        return True
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    with contextlib.suppress(OSError):  # without it the user has no name in the namespace, which does no harm
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return True


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Drop the capabilities of root and of creators of user namespaces, except reading files of other owners."""
    header = struct.pack("<Ii", _CAPABILITY_VERSION, 0)
    kept = 1 << _CAP_DAC_READ_SEARCH
    sets = ctypes.create_string_buffer(struct.calcsize("<6I"))
    if libc.capget(header, sets) == 0:
        effective, permitted = struct.unpack_from("<2I", sets)
        libc.capset(header, struct.pack("<6I", effective & kept, permitted & kept, 0, 0, 0, 0))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Make the kernel refuse some system calls with EPERM, for this thread and its future threads."""
    content = _filter_of(platform.machine())
    if not content:
        return False
    code = ctypes.create_string_buffer(content)
    program = _Program(len(content) // 8, ctypes.addressof(code))
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def _filter_of(machine: str) -> bytes:
    """Return the filter for an architecture; empty if its system calls are unknown here.

    Its instructions jump to "allow", "refuse" or "unknown", or continue with the next instruction ("").
    """
    numbers = CALL_NUMBERS.get(machine)
    if numbers is None:
        return b""
    refused, own = (
        [numbers[name] for name in names if name in numbers] for names in (REFUSED_CALLS, OWN_CALLS)
    )
    steps: list[tuple[int, int, str, str]] = [
        (_LOAD, _MACHINE, "", ""),
        (_EQUAL, _MACHINES[machine], "", "refuse"),
        (_LOAD, _NUMBER, "", ""),
        (_AT_LEAST, _OTHER_NUMBERS, "refuse", ""),
        *((_EQUAL, number, "refuse", "") for number in refused),
        (
            _EQUAL,
            numbers["clone3"],
            "unknown",
            "",
        ),  # its flags cannot be checked, and the C library falls back to clone
        *((_EQUAL, number, "of itself", "") for number in own),
        (_EQUAL, numbers["clone"], "", "allow"),
        (_LOAD, _FIRST_ARGUMENT, "", ""),
        (_ANY_BIT, _CLONE_THREAD, "allow", "refuse"),
        (_LOAD, _FIRST_ARGUMENT, "", ""),
        (_EQUAL, 0, "allow", ""),
        (_EQUAL, os.getpid(), "allow", "refuse"),
    ]
    ends = {"allow": _ALLOW, "refuse": _REFUSE | errno.EPERM, "unknown": _REFUSE | errno.ENOSYS}
    places = {name: len(steps) + at for at, name in enumerate(ends)} | {"of itself": len(steps) - 3}

    def skip(at: int, place: str) -> int:
        return places[place] - at - 1 if place else 0

    packed = [
        struct.pack("<HBBI", code, skip(at, so), skip(at, not_so), constant)
        for at, (code, constant, so, not_so) in enumerate(steps)
    ]
    return b"".join([*packed, *(struct.pack("<HBBI", _RETURN, 0, 0, what) for what in ends.values())])


def _confine(libc: ctypes.CDLL, readable: Iterable[Path] | None, writable: Iterable[Path]) -> bool:
    """Give up all rights on files, except reading ``readable`` and writing ``writable``."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return False
    every = max(rights for first, rights in _FILE_RIGHTS.items() if first <= version)
    if readable is None:
        readable = [path for path in Path("/").iterdir() if path.name != "proc"]
    # Later versions also restrict the network, signals, and abstract sockets to other processes.
    attributes = struct.pack("<3Q", every, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    if rules < 0:
        return False
    try:
        own = [Path(path) for path in {sys.prefix, sys.base_prefix, sys.exec_prefix}]
        for path in (*map(Path, (*_SYSTEM, *_PROCESSES)), *own, *readable):
            _allow(libc, rules, path, every & (_READ_FILE | _READ_FOLDER))
        for path in (*writable, *map(Path, _WRITABLE)):
            _allow(libc, rules, path, every)
        return bool(libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0)
    finally:
        os.close(rules)


def _allow(libc: ctypes.CDLL, rules: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # It does not exist.
    try:
        if not path.is_dir():
            rights &= _OF_FILES
        libc.syscall(_LANDLOCK_ADD, rules, _LANDLOCK_PATH_BENEATH, struct.pack("<Qi", rights, place), 0)
    finally:
        os.close(place)


def tried() -> Protection:
    """Return the protection available here, found by a process that enters the sandbox."""
    command = [sys.executable, "-P", "-m", "stepwell_server.compile.host.sandbox"]
    package = str(Path(__file__).parents[3])
    try:
        run = subprocess.run(
            command, capture_output=True, check=True, env=os.environ | {"PYTHONPATH": package}, timeout=_TRY_S
        )
        return Protection(**json.loads(run.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return Protection()


def main() -> None:
    """Print the protection available to this process: ``python -m stepwell_server.compile.host.sandbox``."""
    sys.stdout.write(json.dumps(dataclasses.asdict(enter((), ()))))


if __name__ == "__main__":
    main()
