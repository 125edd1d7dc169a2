"""Checks the servers of a store: whether they can keep our promises, and what will become a problem."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from stepwell_server.store.valkey.connection.client import (
    AccessDenied,
    Command,
    ConnectionLost,
    ErrorReply,
    Reply,
)
from stepwell_server.store.valkey.connection.nodes import Node, Topology
from stepwell_server.store.valkey.connection.requests import WAIT_SHARE
from stepwell_server.store.valkey.connection.url import StoreUrl, shown

_ASK: Sequence[Command] = [
    ("INFO", "everything"),
    ("CONFIG", "GET", "appendfsync", "save", "stop-writes-on-bgsave-error"),
]
_FULL = 0.9
_OLDEST_WITH_WAITAOF = (7, 2)
_REPLICA_REPORT_S = 1.2
"""A replica reports what it has on disk at least once in this time: every second, and when asked."""


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """The results of a check, as text."""

    unfit: Sequence[str] = ()
    """Settings with which the store cannot keep our promises."""
    problems: Sequence[str] = ()
    """Why it cannot be used now."""
    warnings: Sequence[str] = ()
    """What it does not keep, or will not keep in future."""

    def joined(self, other: Findings) -> Findings:
        """Return the findings of both."""
        return Findings(
            [*self.unfit, *other.unfit],
            [*self.problems, *other.problems],
            [*self.warnings, *other.warnings],
        )


async def examine(
    topology: Topology, url: StoreUrl, durability: Literal["sync", "async"], limit_s: float
) -> Findings:
    """Check every server that has a part of the store.

    Raises:
        AccessDenied, ConnectionLost: the servers cannot be found.
    """
    found = Findings()
    for node in await topology.primaries():
        found = found.joined(await _examine(node, url, durability, limit_s))
    return found


async def _examine(
    node: Node, url: StoreUrl, durability: Literal["sync", "async"], limit_s: float
) -> Findings:
    try:
        info, config = await node.ask(_ASK, limit_s)
    except AccessDenied as error:
        return Findings(unfit=[str(error)])
    except ConnectionLost as error:
        return Findings(problems=[str(error)])
    if isinstance(info, ErrorReply):
        return Findings(warnings=[f"the state of {shown(node.address)} cannot be read: {info}"])
    facts, settings = _facts(info), _settings(config)
    if durability == "sync":
        found = _sync(facts, settings, url.replicas, url.timeout_s)
    else:
        found = _async(facts, settings)
    found = found.joined(_in_general(facts, settings))
    where = shown(node.address)
    return Findings(
        [f"{where}: {each}" for each in found.unfit],
        [f"{where}: {each}" for each in found.problems],
        [f"{where}: {each}" for each in found.warnings],
    )


def _sync(facts: Mapping[str, str], settings: Mapping[str, str], replicas: int, timeout_s: float) -> Findings:
    unfit, problems, warnings = list[str](), list[str](), list[str]()
    version = facts.get("valkey_version") or facts.get("redis_version", "")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    flush = settings.get("appendfsync", "")
    if numbers and numbers < _OLDEST_WITH_WAITAOF:
        unfit.append(f"durability sync needs Valkey, or a server of version 7.2 or newer; it is {version}")
    if facts.get("aof_enabled") == "0":
        unfit.append("durability sync needs appendonly yes; it is no")
    if flush and flush != "always":
        # This includes everysec. Valkey 8.1.1, and 7.4 servers before redis/redis#13793, answer WAITAOF up to two
        # seconds before they have flushed. With other servers each change would wait for up to a second.
        unfit.append(f"durability sync needs appendfsync always; it is {flush}")
    elif not flush:
        warnings.append("appendfsync cannot be read (CONFIG GET); durability sync needs always")
    if replicas and timeout_s * WAIT_SHARE < _REPLICA_REPORT_S:
        min_ms = math.ceil(_REPLICA_REPORT_S / WAIT_SHARE * 1000)
        warnings.append(
            f"with replicas={replicas} timeout_ms must be at least {min_ms}, because a replica may report a change on its disk"
            f" a second late; got {timeout_s * 1000:.0f}: some stored changes will be answered with OUTCOME_UNKNOWN"
        )
    connected = int(facts.get("connected_slaves", "0"))
    if connected < replicas:
        problems.append(f"replicas={replicas} of the URL must be connected; {connected} are")
    return Findings(unfit, problems, warnings)


def _async(facts: Mapping[str, str], settings: Mapping[str, str]) -> Findings:
    if facts.get("aof_enabled") != "0":
        return Findings()
    if settings.get("save"):
        return Findings(
            warnings=["appendonly is no: when the server ends, changes since its last snapshot are lost"]
        )
    return Findings(
        warnings=["the server keeps nothing on disk (appendonly no): when it ends, all sessions are lost"]
    )


def _in_general(facts: Mapping[str, str], settings: Mapping[str, str]) -> Findings:
    problems, warnings = list[str](), list[str]()
    if facts.get("aof_last_write_status", "ok") != "ok":
        problems.append("its append-only file cannot be written: it refuses changes")
    stops = settings.get("save") and settings.get("stop-writes-on-bgsave-error", "yes") == "yes"
    if stops and facts.get("rdb_last_bgsave_status", "ok") != "ok":
        problems.append("its last snapshot failed: it refuses changes (stop-writes-on-bgsave-error)")
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        warnings.append(
            f"maxmemory-policy must be noeviction; with {policy} sessions are deleted when memory is full"
        )
    used, most = int(facts.get("used_memory", "0")), int(facts.get("maxmemory", "0"))
    if most and used > most * _FULL:
        warnings.append(f"{used / most:.0%} of its memory is used, {used} of {most} bytes")
    return Findings((), problems, warnings)


def _facts(info: Reply) -> Mapping[str, str]:
    """Parse the reply of INFO."""
    text = str(info, "utf-8", "replace")
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _settings(config: Reply) -> Mapping[str, str]:
    """Parse the reply of CONFIG GET; empty if it is not allowed."""
    if isinstance(config, ErrorReply):
        return {}
    words = [str(word, "utf-8", "replace") for word in config]
    return dict(zip(words[::2], words[1::2], strict=True))
