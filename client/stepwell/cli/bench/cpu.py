"""The processor time of the server, where it runs on this machine and Linux shows it."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
LISTEN = "0A"


@dataclass(frozen=True)
class Listener:
    """The process that listens on an address, or why it is not known."""

    pid: int | None
    reason: str = ""

    def cpu_s(self) -> float | None:
        """Processor time of all its threads so far, in seconds; None where it cannot be read."""
        if self.pid is None:
            return None
        try:
            # The command's name, in brackets, may hold spaces.
            fields = (PROC / str(self.pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def find_listener(address: str) -> Listener:
    """Find the process that listens on HOST:PORT.

    Only one is looked for that this user may look into; a server of another user, on another machine or
    behind a proxy or in a container of its own is not found.
    """
    if not (PROC / "net" / "tcp").exists():
        return Listener(None, "this system has no /proc")
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or not is_here(host.strip("[]")):
        return Listener(None, "the server is not on this machine, or not on a port of it")
    inodes = {f"socket:[{inode}]" for inode in listening_inodes(int(port))}
    pid = next(owners(inodes), None)
    if pid is None:
        return Listener(None, "no process of this user listens there")
    return Listener(pid)


def is_here(host: str) -> bool:
    """Whether a host's name or address is one of this machine."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(can_bind(family, where) for family, _, _, _, where in found)


def can_bind(family: int, where: object) -> bool:
    """Whether an address is one that a socket of this machine can have."""
    try:
        with socket.socket(family) as probe:
            probe.bind(where)  # type: ignore[arg-type]  # as getaddrinfo made it
    except OSError:
        return False
    return True


def listening_inodes(port: int) -> set[str]:
    """The sockets that listen on a port, by the number that /proc gives them."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and struct.unpack(">H", bytes.fromhex(fields[1][-4:]))[0] == port:
                    found.add(fields[9])
    return found


def owners(sockets: set[str]) -> Iterator[int]:
    """The processes that hold one of these sockets open."""
    for process in PROC.iterdir():
        if process.name.isdecimal() and sockets & set(open_files(process)):
            yield int(process.name)


def open_files(process: Path) -> Iterator[str]:
    """What a process has open, as far as it may be seen."""
    with contextlib.suppress(OSError):
        for file in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(file)
