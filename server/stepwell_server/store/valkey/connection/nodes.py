"""Connection pools to nodes, and the topology: which node is the primary of which partition."""

from __future__ import annotations

import abc
import asyncio
import bisect
import contextlib
from collections.abc import Awaitable, Callable, Collection, Sequence

from typing_extensions import override

from stepwell_server.store.valkey import scripts
from stepwell_server.store.valkey.connection.client import (
    Access,
    AccessDenied,
    Command,
    ConnectionLost,
    ErrorReply,
    Link,
    Reply,
    context_of,
    slot_of,
)
from stepwell_server.store.valkey.connection.url import Address, StoreUrl, shown
from stepwell_server.store.valkey.keys import META

MAX_LINKS = 24
"""Maximum of connections to one node: 8 commits, 4 reads, and other requests at the same time."""
_DOWN_S = 0.1
"""Pause after a failed connection to a node, before the next attempt."""
_REFRESH_S = 0.05
"""Minimum time between two queries of the slot map."""

_FIRST: Sequence[Command] = [
    ("ROLE",),
    *((b"SCRIPT", b"LOAD", script.source.encode()) for script in scripts.ALL),
]
_FIRST_S = 60.0
Open = Callable[[Address], Awaitable[Link]]


async def open_link(address: Address, access: Access, *, to_primary: bool) -> Link:
    """Connect to a server and load the scripts.

    Raises:
        AccessDenied, ConnectionLost: as `Link.open`; also if the server is a replica, but must be a primary.
    """
    link = await Link.open(address, access)
    try:
        # the caller limits the total time
        role, *loaded = await link.ask(_FIRST, _FIRST_S)
        if to_primary and isinstance(role, list) and role[0] != b"master":
            raise ConnectionLost(f"{shown(address)} is a replica, the primary is another", sent=False)
        for reply in loaded:
            if isinstance(reply, ErrorReply):
                _require_ready(address, reply)
                raise AccessDenied(f"{shown(address)} must allow scripts (SCRIPT LOAD, EVALSHA): {reply}")
    except ConnectionLost as error:
        link.close()
        error.sent = False
        raise
    except BaseException:
        link.close()
        raise
    return link


def _require_ready(address: Address, reply: ErrorReply) -> None:
    if reply.code in {"LOADING", "BUSY", "MASTERDOWN", "CLUSTERDOWN"}:
        raise ConnectionLost(f"{shown(address)} is not ready: {reply}", sent=False)


class Node:
    """One server and its connections, each for one exchange at a time. Lives on the event loop."""

    def __init__(self, address: Address, opens: Open) -> None:
        self.address = address
        self._opens = opens
        self._idle: list[Link] = []
        self._free_links = asyncio.Semaphore(MAX_LINKS)
        self._age = 0
        """Incremented to invalidate all existing connections."""
        self._down_until = 0.0
        self._why_down = ""
        self._is_closed = False

    async def ask(self, commands: Sequence[Command], limit_s: float) -> list[Reply]:
        """Send commands together, on one connection, and read their answers.

        Raises:
            AccessDenied: the node denies access.
            ConnectionLost: it cannot be connected to, or did not answer within `limit_s`.
        """
        now = asyncio.get_running_loop().time
        end = now() + limit_s
        await self._acquire(limit_s)
        try:
            link = self._ready() or await self._connected(end - now())
            age, is_whole = self._age, False
            try:
                replies = await link.ask(commands, end - now())
                is_whole = True
            finally:
                if is_whole and age == self._age:
                    self._idle.append(link)
                else:
                    link.close()
            return replies
        except ConnectionLost:
            self.hang_up()
            raise
        finally:
            self._free_links.release()

    def begin(
        self,
        commands: Sequence[Command],
        limit_s: float,
        done: Callable[[list[Reply] | ConnectionLost], None],
    ) -> bool:
        """Send commands on an idle connection and call `done` with their answers; return False if no connection is idle."""
        link = self._ready()
        if link is None:
            return False
        age = self._age

        def ended(result: list[Reply] | ConnectionLost) -> None:
            if isinstance(result, ConnectionLost):
                link.close()
                self.hang_up()
            elif age == self._age:
                self._idle.append(link)
            else:
                link.close()
            done(result)

        link.begin(commands, limit_s, ended)
        return True

    def hang_up(self) -> None:
        """Use new connections from now on."""
        self._age += 1
        idle, self._idle = self._idle, []
        for link in idle:
            link.close()

    async def _acquire(self, limit_s: float) -> None:
        if not self._free_links.locked():
            await self._free_links.acquire()  # without waiting
            return
        await asyncio.sleep(0)  # a timeout needs a task, and `eager.start` begins without one
        try:
            async with asyncio.timeout(limit_s):
                await self._free_links.acquire()
        except TimeoutError:
            raise self._late(limit_s) from None

    def _ready(self) -> Link | None:
        """Return an existing connection."""
        while self._idle:
            link = self._idle.pop()
            if not link.has_ended:
                return link
            link.close()
        return None

    async def _connected(self, limit_s: float) -> Link:
        now = asyncio.get_running_loop().time
        if now() < self._down_until:
            raise ConnectionLost(self._why_down, sent=False)
        await asyncio.sleep(0)  # as in `_acquire`
        try:
            async with asyncio.timeout(limit_s):
                return await self._opens(self.address)
        except AccessDenied:
            raise
        except (TimeoutError, ConnectionLost) as error:
            lost = error if isinstance(error, ConnectionLost) else self._late(limit_s)
            self._down_until, self._why_down = now() + _DOWN_S, str(lost)
            raise lost from None

    def _late(self, limit_s: float) -> ConnectionLost:
        return ConnectionLost(f"{shown(self.address)} must answer within {limit_s:.2g} s", sent=False)


class Topology(abc.ABC):
    """Knows which node has which partition. Lives on the event loop."""

    def __init__(self, access: Access, *, to_primary: bool) -> None:
        self._access = access
        self._to_primary = to_primary
        self._nodes: dict[Address, Node] = {}

    @abc.abstractmethod
    async def nodes_of(self, partitions: Collection[int]) -> dict[int, Node]:
        """Return the node of each partition, or of `META`. The caller limits the time.

        Raises:
            AccessDenied, ConnectionLost: the topology cannot be queried.
        """

    @abc.abstractmethod
    def known(self, partitions: Collection[int]) -> Node | None:
        """Return the node that has all these partitions, if it is known and not in doubt."""

    @abc.abstractmethod
    def doubt(self) -> None:
        """Query the topology again before the next use, because something was not as expected."""

    @abc.abstractmethod
    def moved(self, partition: int, address: Address) -> None:
        """Note a server's answer that another node has a partition."""

    @abc.abstractmethod
    async def primaries(self) -> list[Node]:
        """Return all nodes with a part of the store.

        Raises:
            AccessDenied, ConnectionLost: they cannot be found.
        """

    @abc.abstractmethod
    async def look(self) -> None:
        """Check the topology periodically: a server that is no longer the primary may not know it.

        Raises:
            AccessDenied, ConnectionLost: no server answers.
        """

    def node_at(self, address: Address) -> Node:
        """Return the node at an address."""
        if address not in self._nodes:
            self._nodes[address] = Node(address, self._open)
        return self._nodes[address]

    def call_itself(self, name: str) -> None:
        """Rename the connections, for people who inspect the server."""
        self._access.name = name
        for node in self._nodes.values():
            node.hang_up()

    def close(self) -> None:
        """Close all idle connections; the others close after their exchange."""
        self._keep_only(())

    def _keep_only(self, addresses: Collection[Address]) -> None:
        for address in self._nodes.keys() - set(addresses):
            self._nodes.pop(address).hang_up()

    async def _open(self, address: Address) -> Link:
        return await open_link(address, self._access, to_primary=self._to_primary)


class Primary(Topology):
    """One node has everything; in doubt, its address is queried again."""

    def __init__(self, access: Access, find: Callable[[], Awaitable[Address]]) -> None:
        super().__init__(access, to_primary=True)
        self._find = find
        self._finding = asyncio.Lock()
        self._node: Node | None = None
        """None: unknown."""

    @override
    async def nodes_of(self, partitions: Collection[int]) -> dict[int, Node]:
        node = self._node
        if node is None:
            async with self._finding:
                node = self._node  # another task may have found it meanwhile
                if node is None:
                    node = self._node = self.node_at(await self._find())
                    self._keep_only([node.address])
        return dict.fromkeys(partitions, node)

    @override
    def known(self, partitions: Collection[int]) -> Node | None:
        return self._node

    @override
    async def look(self) -> None:
        node = self._node
        if node is not None and await self._find() != node.address and self._node is node:
            self._node = None

    @override
    def doubt(self) -> None:
        self._node = None

    @override
    def moved(self, partition: int, address: Address) -> None:
        self._node = None

    @override
    async def primaries(self) -> list[Node]:
        return [(await self.nodes_of([META]))[META]]


class Cluster(Topology):
    """Slots are divided among nodes. Only the slots of our partitions matter."""

    def __init__(
        self, access: Access, seeds: Sequence[Address], tag: Callable[[int], bytes], timeout_s: float
    ) -> None:
        # replicas can answer queries for the primaries, and redirect other commands
        super().__init__(access, to_primary=False)
        self._timeout_s = timeout_s
        self._seeds = seeds
        self._tag = tag
        self._slots = _Slots(())
        self._known: dict[int, Node] = {}
        """By partition."""
        self._is_doubted = True
        self._looked = -1.0
        self._looking = asyncio.Lock()

    @override
    async def nodes_of(self, partitions: Collection[int]) -> dict[int, Node]:
        if self._is_doubted:
            await self._look()
        found = {}
        for partition in partitions:
            node = self._known.get(partition)
            if node is None:
                address = self._slots.owner(slot_of(self._tag(partition)))
                if address is None:
                    self._is_doubted = True
                    raise ConnectionLost("the Cluster must cover all slots; some have no owner", sent=False)
                node = self._known[partition] = self.node_at(address)
            found[partition] = node
        return found

    @override
    async def look(self) -> None:
        self._is_doubted = True
        await self._look()

    @override
    def known(self, partitions: Collection[int]) -> Node | None:
        if self._is_doubted:
            return None
        nodes = {self._known.get(partition) for partition in partitions}
        return nodes.pop() if len(nodes) == 1 else None

    @override
    def doubt(self) -> None:
        self._is_doubted = True

    @override
    def moved(self, partition: int, address: Address) -> None:
        self._known[partition] = self.node_at(address)
        self._is_doubted = True

    @override
    async def primaries(self) -> list[Node]:
        if self._is_doubted:
            await self._look()
        return [self.node_at(address) for address in sorted(self._slots.owners)]

    async def _look(self) -> None:
        async with self._looking:
            loop = asyncio.get_running_loop()
            if not self._is_doubted:
                return
            if self._slots.owners and loop.time() < self._looked + _REFRESH_S:
                return
            problem: ConnectionLost | None = None
            for address in dict.fromkeys((*sorted(self._slots.owners), *self._seeds)):
                try:
                    slots = await self._slots_as_seen_by(address)
                except AccessDenied:
                    raise
                except ConnectionLost as error:
                    problem = error
                    continue
                self._slots, self._is_doubted, self._looked = slots, False, loop.time()
                self._known = {}
                self._keep_only(slots.owners)
                return
            assert problem is not None
            raise problem

    async def _slots_as_seen_by(self, address: Address) -> _Slots:
        node = self.node_at(address)
        (reply,) = await node.ask([("CLUSTER", "SLOTS")], self._timeout_s)
        if isinstance(reply, ErrorReply):
            raise AccessDenied(f"{shown(address)} must be a node of a Cluster: {reply}")
        ranges = []
        for first, last, primary, *_ in reply:
            host = (primary[0] or b"").decode()
            ranges.append((first, last, (host if host not in {"", "?"} else address[0], int(primary[1]))))
        if not ranges:
            raise ConnectionLost(f"{shown(address)} must belong to a Cluster; it knows no slots", sent=False)
        return _Slots(ranges)


class _Slots:
    """The owners of slots, as ranges: first, last, owner."""

    def __init__(self, ranges: Sequence[tuple[int, int, Address]]) -> None:
        self._ranges = sorted(ranges)
        self._firsts = [first for first, _, _ in self._ranges]
        self.owners = frozenset(owner for _, _, owner in ranges)

    def owner(self, slot: int) -> Address | None:
        """Return the owner of a slot; None: there is none."""
        place = bisect.bisect_right(self._firsts, slot) - 1
        if place < 0 or slot > self._ranges[place][1]:
            return None
        return self._ranges[place][2]


_ASK_S = 1.0
"""Limit for one server to name the primary, if others can be asked."""


def topology_of(url: StoreUrl, tag: Callable[[int], bytes]) -> Topology:
    """Create the topology for a URL. Does not connect.

    Args:
        url: The URL of the store.
        tag: Returns the hash tag in the keys of a partition.

    Raises:
        StoreError: certificate files cannot be used.
    """
    context = None if url.tls is None else context_of(url.tls)
    server_name = "" if url.tls is None else url.tls.server_name
    access = Access(url.login, url.database, context, server_name, password_file=url.password_file)
    ask_s = min(_ASK_S, url.timeout_s)
    if url.kind == "cluster":
        return Cluster(access, url.addresses, tag, ask_s)
    if url.kind == "sentinel":
        sentinel = Access(url.sentinel_login, 0, context, server_name)
        return Primary(access, _FirstAnswer(url.addresses, ask_s, _AskSentinel(url.sentinel, sentinel)))
    if len(url.addresses) == 1:
        return Primary(access, _SingleServer(url.addresses[0]))
    return Primary(access, _FirstAnswer(url.addresses, ask_s, _AskServer(access)))


class _SingleServer:
    """The only server. A connection to it verifies that it is the primary."""

    def __init__(self, address: Address) -> None:
        self._address = address

    async def __call__(self) -> Address:
        return self._address


class _FirstAnswer:
    """Asks servers for the primary, one after the other, until one knows it. That one is asked first the next time."""

    def __init__(
        self, addresses: Sequence[Address], limit_s: float, ask: Callable[[Address], Awaitable[Address]]
    ) -> None:
        self._addresses = list(addresses)
        self._limit_s = limit_s
        self._ask = ask

    async def __call__(self) -> Address:
        problems = []
        for address in tuple(self._addresses):
            try:
                async with asyncio.timeout(self._limit_s):
                    found = await self._ask(address)
            except TimeoutError:
                problems.append(f"{shown(address)} must answer within {self._limit_s:g} s")
            except AccessDenied:
                raise
            except ConnectionLost as error:
                problems.append(str(error))
            else:
                self._addresses.remove(address)
                self._addresses.insert(0, address)
                return found
        raise ConnectionLost("; ".join(problems), sent=False)


class _AskServer:
    """Asks a server whether it is the primary."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def __call__(self, address: Address) -> Address:
        (await open_link(address, self._access, to_primary=True)).close()
        return address


class _AskSentinel:
    """Asks a Sentinel which server is the primary."""

    def __init__(self, name: str, access: Access) -> None:
        self._name = name
        self._access = access

    async def __call__(self, address: Address) -> Address:
        with contextlib.closing(await Link.open(address, self._access)) as link:
            (reply,) = await link.ask([("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name)], _FIRST_S)
        if isinstance(reply, ErrorReply):
            raise AccessDenied(f"{shown(address)} must be a Sentinel: {reply}")
        if reply is None:
            raise AccessDenied(f"the Sentinel {shown(address)} knows no primary named {self._name!r}")
        host, port = reply
        return host.decode(), int(port)
