"""The processor time of the server, where it runs on this machine and may be looked into."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Listener:
    """The process that listens on an address, or why it is not known."""

    pid: int | None
    reason: str = ""

    def cpu_s(self) -> float | None:
        """Processor time of all its threads so far, in seconds; None where it cannot be read."""
        try:
            times = None if self.pid is None else psutil.Process(self.pid).cpu_times()
        except psutil.Error:
            return None
        return times and times.user + times.system


def find_listener(address: str) -> Listener:
    """Find the process that listens on HOST:PORT.

    Only one is looked for that this user may look into; a server of another user, on another machine or
    behind a proxy or in a container of its own is not found.
    """
    host, _, port = address.rpartition(":")
    if address.startswith("unix:") or not is_here(host.strip("[]")):
        return Listener(None, "the server is not on this machine, or not on a port of it")
    pid = listening_pid(int(port))
    return Listener(pid, "" if pid else "no process of this user listens there")


def is_here(host: str) -> bool:
    """Whether a host's name or address is one of this machine."""
    try:
        found = {str(where[0]) for *_, where in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(found & own) or any(ipaddress.ip_address(where).is_loopback for where in found)


def listening_pid(port: int) -> int | None:
    """A process of this user, or one that it may look into, that listens on a TCP port."""
    try:
        sockets = psutil.net_connections("tcp")
    except psutil.Error:  # not every system tells those of all processes
        return None
    return next(
        (
            s.pid
            for s in sockets
            if s.pid and s.status == psutil.CONN_LISTEN and s.laddr and s.laddr.port == port
        ),
        None,
    )
