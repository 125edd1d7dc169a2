"""What a process can no longer do that has given it up: tried, by one that tries all of it."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.compile.host import sandbox
from stepwell_server.compile.host.sandbox import Protection

TRY = """
import ctypes, json, os, socket, sys, threading
from pathlib import Path
from stepwell_server.compile.host import sandbox
own, secret, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
sandbox.limit(1 << 20)
had = sandbox.enter(None if sys.argv[4] == "all" else [], [own])
libc = ctypes.CDLL(None, use_errno=True)

def attempt(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"

def call(name, *arguments):
    if libc.syscall(numbers[name], *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

def large():
    with (own / "large").open("wb") as file:
        file.write(bytes(2 << 20))

def link():
    os.symlink(secret, own / "link")
    (own / "link").read_text()

numbers = sandbox.CALL_NUMBERS[os.uname().machine]
limits = ctypes.create_string_buffer(16)
readable = open(os.__file__)
tried = {
    "connect": lambda: socket.create_connection(("127.0.0.1", port), 5),
    "local socket": lambda: socket.socket(socket.AF_UNIX),
    "ring": lambda: call("io_uring_setup", 1, ctypes.create_string_buffer(120)),
    "run": lambda: os.execv("/bin/true", ["true"]),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "fork": os.fork,
    "unshare": lambda: call("unshare", 0x10000000),
    "ptrace": lambda: call("ptrace", 16, os.getppid(), 0, 0),
    "signal": lambda: os.kill(os.getppid(), 0),
    "signal itself": lambda: os.kill(os.getpid(), 0),
    "own limits": lambda: call("prlimit64", 0, 7, 0, limits),
    "limits of others": lambda: call("prlimit64", os.getppid(), 7, 0, limits),
    "processors of others": lambda: os.sched_setaffinity(os.getppid(), {0}),
    "priority of others": lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19),
    "mode": lambda: secret.chmod(0o666),
    "mode of what is open": lambda: os.fchmod(readable.fileno(), 0o666),
    "owner": lambda: os.chown(secret, os.getuid(), os.getgid()),
    "attribute": lambda: os.setxattr(secret, "user.evil", b"1"),
    "root": lambda: os.chroot(own),
    "handle": lambda: call("open_by_handle_at", -1, None, 0),
    "memory in a file": lambda: os.memfd_create("evil"),
    "memory that stays": lambda: call("shmget", 0, 4096, 0o1600),
    "parent": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "read": secret.read_text,
    "link": link,
    "write": lambda: secret.write_text("changed"),
    "remove": secret.unlink,
    "make": (secret.parent / "new").touch,
    "own": (own / "new").touch,
    "large": large,
    "python": lambda: Path(os.__file__).read_text(),
    "null": lambda: Path("/dev/null").write_text("x"),
}
found = {name: attempt(action) for name, action in tried.items()}
thread = threading.Thread(target=lambda: found.update(thread=attempt(lambda: socket.socket())))
thread.start()
thread.join()
permitted = [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapPrm")]
beside_reading = [int(each, 16) & ~(1 << 2) for each in permitted]
print(json.dumps([had.__dict__, found, beside_reading]))
"""


def tries(folder: Path, port: int, read: str) -> tuple[Protection, dict[str, str], set[int]]:
    own, secret = folder / "own", folder / "secrets" / "secret"
    own.mkdir(exist_ok=True)
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("secret")
    run = subprocess.run(
        [sys.executable, "-c", TRY, str(own), str(secret), str(port), read],
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    had, found, rights = json.loads(run.stdout)
    assert secret.read_text() == "secret"
    assert os.listdir(secret.parent) == ["secret"]
    return Protection(**had), found, set(rights)


@pytest.mark.skipif(sys.platform != "linux", reason="it is the kernel of Linux that takes these away")
def test_what_is_given_up_is_gone(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        had, found, rights = tries(tmp_path, port, "some")
        with_imports, read, _ = tries(tmp_path, port, "all")
    refused: dict[str, Any] = {}
    if had.programs:
        calls = ["connect", "local socket", "ring", "run", "spawn", "fork", "unshare", "ptrace", "thread"]
        calls += ["signal", "limits of others", "processors of others", "priority of others"]
        calls += [
            "mode",
            "mode of what is open",
            "owner",
            "attribute",
            "root",
            "handle",
            "memory in a file",
            "memory that stays",
        ]
        refused |= dict.fromkeys(calls, "PermissionError")
    if had.network:
        assert found["connect"] != "done"
    if had.files:
        refused |= dict.fromkeys(("read", "link", "write", "remove", "make", "parent"), "PermissionError")
    assert {name: found[name] for name in refused} == refused
    assert (found["signal itself"], found["own limits"]) == ("done", "done")
    assert rights == {0}
    assert (found["own"], found["python"], found["null"]) == ("done", "done", "done")
    assert found["large"] == "OSError"
    assert read["read"] == "done"  # modules of the operator's read what they need, and change nothing
    if with_imports.files:
        assert {read[name] for name in ("write", "remove", "make", "parent")} == {"PermissionError"}


#: The kernel's own numbers, as its headers have them: those of x86_64 and those of architectures since, such as aarch64.
HEADERS = {
    "x86_64": ("x86_64-linux-gnu/asm/unistd_64.h", "asm/unistd_64.h"),
    "aarch64": ("asm-generic/unistd.h",),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_names_of_calls_have_the_numbers_that_the_kernel_gives_them(machine: str) -> None:
    files = [file for name in HEADERS[machine] if (file := Path("/usr/include", name)).exists()]
    if not files:
        pytest.skip("the kernel's headers are not installed")
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", files[0].read_text(), re.MULTILINE)
    known = {name: int(number) for name, number in found if name != "syscalls"}
    newest = max(known.values())
    numbers = {name: number for name, number in sandbox.CALL_NUMBERS[machine].items() if number <= newest}
    assert numbers == {name: known[name] for name in numbers}
    assert len(numbers) > 50


TRY_ALL = """
import ctypes, json, os
from stepwell_server.compile.host import sandbox
had = sandbox.enter(None, [])
libc = ctypes.CDLL(None, use_errno=True)
numbers = sandbox.CALL_NUMBERS.get(os.uname().machine, {})

def error_of(name, argument):
    ctypes.set_errno(0)
    libc.syscall(numbers[name], argument, -1, -1, -1, -1, -1)
    return ctypes.get_errno()

own = [name for name in sandbox.OWN_CALLS if name in numbers]
found = {name: error_of(name, -1) for name in sandbox.REFUSED_CALLS if name in numbers}
found |= {name: error_of(name, os.getppid()) for name in own}
allowed = {name: error_of(name, os.getpid()) for name in own}
print(json.dumps([had.programs, found, allowed]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is the kernel of Linux that takes these away")
def test_each_call_that_is_refused_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", TRY_ALL], capture_output=True, text=True, check=True, timeout=250
    )
    by, found, allowed = json.loads(run.stdout)
    if not by:
        pytest.skip("this kernel has no seccomp, or its calls are not known")
    assert {name for name, error in found.items() if error != errno.EPERM} == set()
    assert errno.EPERM not in allowed.values()


def test_it_is_said_what_there_is_and_what_there_is_not() -> None:
    assert str(Protection("namespace+seccomp", "seccomp", "Landlock")) == (
        "no network (namespace+seccomp), no other programs (seccomp), only its own files (Landlock)"
    )
    assert Protection("namespace", "seccomp", "Landlock").missing == ""
    assert str(Protection()) == "none of the kernel's"
    assert Protection(programs="seccomp").missing == "the network and files of this user"
