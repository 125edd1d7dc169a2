"""How the servers are that keep a store: whether they do what was promised, and what will go wrong some day."""

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
_REPLICA_TELLS_S = 1.2
"""After so long at the latest a replica has said what it has on its disk: it does each second, beside when it is asked."""


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """What was found, each in words for people."""

    unfit: Sequence[str] = ()
    """Why the store cannot keep what is promised, until somebody changes its settings."""
    problems: Sequence[str] = ()
    """Why it cannot be used for now."""
    warnings: Sequence[str] = ()
    """What it does not keep, or will not one day."""

    def joined(self, other: Findings) -> Findings:
        """Those of both."""
        return Findings(
            [*self.unfit, *other.unfit],
            [*self.problems, *other.problems],
            [*self.warnings, *other.warnings],
        )


async def examine(
    topology: Topology, url: StoreUrl, durability: Literal["sync", "async"], limit_s: float
) -> Findings:
    """Look at every server that has a part of the store.

    Raises:
        AccessDenied, ConnectionLost: it is not known which these are.
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
        return Findings(warnings=[f"how {shown(node.address)} is cannot be seen: {info}"])
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
        # Also everysec. Valkey 8.1.1, and servers of 7.4 until redis/redis#13793, answer WAITAOF up to two seconds before
        # they have flushed; and with others each change would wait for up to a second.
        unfit.append(f"durability sync needs appendfsync always; it is {flush}")
    elif not flush:
        warnings.append("appendfsync cannot be seen (CONFIG GET); durability sync needs always")
    if replicas and timeout_s * WAIT_SHARE < _REPLICA_TELLS_S:
        least_ms = math.ceil(_REPLICA_TELLS_S / WAIT_SHARE * 1000)
        warnings.append(
            f"a replica may say only a second later what it has on its disk: with replicas={replicas} timeout_ms must be at"
            f" least {least_ms}; got {timeout_s * 1000:.0f}: changes that are kept will be OUTCOME_UNKNOWN"
        )
    connected = int(facts.get("connected_slaves", "0"))
    if connected < replicas:
        problems.append(f"replicas={replicas} of the URL must be connected; {connected} are")
    return Findings(unfit, problems, warnings)


def _async(facts: Mapping[str, str], settings: Mapping[str, str]) -> Findings:
    if facts.get("aof_enabled") != "0":
        return Findings()
    if settings.get("save"):
        return Findings(warnings=["appendonly is no: when it ends, changes since its last snapshot are lost"])
    return Findings(
        warnings=["it keeps nothing on disk (appendonly no): when it ends, all sessions are lost"]
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
            f"maxmemory-policy must be noeviction; with {policy} it deletes what it has no memory for"
        )
    used, most = int(facts.get("used_memory", "0")), int(facts.get("maxmemory", "0"))
    if most and used > most * _FULL:
        warnings.append(f"{used / most:.0%} of its memory is used, {used} of {most} bytes")
    return Findings((), problems, warnings)


def _facts(info: Reply) -> Mapping[str, str]:
    """What INFO says, by name."""
    text = str(info, "utf-8", "replace")
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def _settings(config: Reply) -> Mapping[str, str]:
    """What CONFIG GET says; nothing where we may not ask."""
    if isinstance(config, ErrorReply):
        return {}
    words = [str(word, "utf-8", "replace") for word in config]
    return dict(zip(words[::2], words[1::2], strict=True))
