"""The processor time of the server, if it runs on this machine and this user may see it."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

import psutil

from stepwell._base import addresses


@dataclass(frozen=True)
class Listener:
    """The processes that listen on the addresses of a server or its replicas, or why they are not known."""

    pids: tuple[int, ...]
    """All of them; empty if not all are known."""
    reason: str = ""

    @property
    def pid(self) -> int | None:
        """The process, if there is exactly one."""
        return self.pids[0] if len(self.pids) == 1 else None

    def cpu_s(self) -> float | None:
        """Processor time of all their threads so far, in seconds; None if it cannot be read."""
        try:
            times = [psutil.Process(pid).cpu_times() for pid in self.pids]
        except psutil.Error:
            return None
        return sum(each.user + each.system for each in times) if times else None


def find_listener(address: str) -> Listener:
    """Find the processes that listen on HOST:PORT, or on each of several separated by commas.

    It finds only processes that this user may see; a server of another user, on another machine, behind a proxy or in
    a container is not found.
    """
    pids, several = [], addresses.split(address)
    for each in several:
        host, _, port = each.rpartition(":")
        which = f"the server at {each}" if len(several) > 1 else "the server"
        if each.startswith(("unix:", "dns:")) or not is_here(host.strip("[]")):
            return Listener((), f"{which} is not on this machine, or not on a port of it")
        pid = listening_pid(int(port))
        if pid is None:
            where = f"at {each}" if len(several) > 1 else "there"
            return Listener((), f"no process of this user listens {where}")
        pids.append(pid)
    return Listener(tuple(pids))


def is_here(host: str) -> bool:
    """Whether a host's name or address belongs to this machine."""
    try:
        found = {str(where[0]) for *_, where in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(found & own) or any(ipaddress.ip_address(where).is_loopback for where in found)


def listening_pid(port: int) -> int | None:
    """The process that listens on a TCP port, if this user may see it."""
    try:
        sockets = psutil.net_connections("tcp")
    except psutil.Error:  # not every system reports the connections of all processes
        return None
    return next(
        (
            s.pid
            for s in sockets
            if s.pid and s.status == psutil.CONN_LISTEN and s.laddr and s.laddr.port == port
        ),
        None,
    )
