"""What a process can no longer do that has given it up: tried, by one that tries all of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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

def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

def large():
    with (own / "large").open("wb") as file:
        file.write(bytes(2 << 20))

def link():
    os.symlink(secret, own / "link")
    (own / "link").read_text()

x86 = os.uname().machine == "x86_64"
limits = ctypes.create_string_buffer(16)
tried = {
    "connect": lambda: socket.create_connection(("127.0.0.1", port), 5),
    "local socket": lambda: socket.socket(socket.AF_UNIX),
    "ring": lambda: call(425, 1, ctypes.create_string_buffer(120)),
    "run": lambda: os.execv("/bin/true", ["true"]),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "fork": os.fork,
    "unshare": lambda: call(272 if x86 else 97, 0x10000000),
    "ptrace": lambda: call(101 if x86 else 117, 16, os.getppid(), 0, 0),
    "signal": lambda: os.kill(os.getppid(), 0),
    "signal itself": lambda: os.kill(os.getpid(), 0),
    "own limits": lambda: call(302 if x86 else 261, 0, 7, 0, limits),
    "limits of others": lambda: call(302 if x86 else 261, os.getppid(), 7, 0, limits),
    "processors of others": lambda: os.sched_setaffinity(os.getppid(), {0}),
    "priority of others": lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19),
    "mode": lambda: secret.chmod(0o666),
    "owner": lambda: os.chown(secret, os.getuid(), os.getgid()),
    "attribute": lambda: os.setxattr(secret, "user.evil", b"1"),
    "root": lambda: os.chroot(own),
    "handle": lambda: call(304 if x86 else 265, -1, None, 0),
    "memory in a file": lambda: os.memfd_create("evil"),
    "memory that stays": lambda: call(29 if x86 else 194, 0, 4096, 0o1600),
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
        timeout=60,
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
        calls += ["mode", "owner", "attribute", "root", "handle", "memory in a file", "memory that stays"]
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


def test_it_is_said_what_there_is_and_what_there_is_not() -> None:
    assert str(Protection("namespace+seccomp", "seccomp", "Landlock")) == (
        "no network (namespace+seccomp), no other programs (seccomp), only its own files (Landlock)"
    )
    assert Protection("namespace", "seccomp", "Landlock").missing == ""
    assert str(Protection()) == "none of the kernel's"
    assert Protection(programs="seccomp").missing == "the network and files of this user"
