"""Requests to the store: sent to the nodes that have their keys, and sent again until they are answered or time is up."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Coroutine, Sequence

from stepwell_server.errors import Overloaded, ServerError, StoreAway, StoreRefuses
from stepwell_server.logs import Log
from stepwell_server.store.valkey.connection.client import (
    AccessDenied,
    Command,
    ConnectionLost,
    ErrorReply,
    Reply,
)
from stepwell_server.store.valkey.connection.nodes import Node, Topology
from stepwell_server.store.valkey.connection.url import Address
from stepwell_server.store.valkey.scripts import ALL, Script

LIMIT = 2.5
"""Of the time for an answer: for so long a request is sent again before it is given up."""
WAIT_SHARE = 0.8
"""Of the time for an answer: so long a server waits for its disk, beside the time for the answer itself."""
REPEAT_LOG_S = 10.0
"""The log is told again of a refusal after so long, if it comes again."""
_RETRY_AFTER_S = 1.0
_MIN_REMAINING_S = 0.01
"""With less time left nothing is tried any more."""
_LATE = ConnectionLost("time was up", sent=False)
_log = Log("store.valkey")
_PAUSES_S = (0.0, 0.02, 0.05, 0.1, 0.2)
_WRONG_TYPE, _OTHER_TYPE = "WRONGTYPE", "a key of the store is of another type than it must be"
_KEYS_SHOWN = 4
_REDIRECTIONS = frozenset({"MOVED", "ASK"})
#: Nothing was done, and it may be otherwise soon.
_PASSING = frozenset(
    {"TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "LOADING", "BUSY", "READONLY", "NOSCRIPT", "UNBLOCKED"}
)
NO_OTHER = object()
_LOAD: Sequence[Command] = [(b"SCRIPT", b"LOAD", script.source.encode()) for script in ALL]


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A command whose keys are all of one partition, or in one node anyway, and what became of it."""

    partition: int
    command: Command
    reply: Reply = None
    is_answered: bool = False
    is_durable: bool = True
    """Of what was asked to wait for the disk: so many have it as was asked."""
    is_sent: bool = False
    """It may have been done."""
    problem: ServerError | None = None
    """Why it was not answered, or refused."""
    otherwise: Reply = NO_OTHER
    """What stands for the answer where its key is of another type; `NO_OTHER`: it is refused then."""
    _ask: Address | None = None
    """The node that is to be asked this one time."""

    @property
    def keys(self) -> str:
        """Some of its keys, for people."""
        first, *words = self.command
        keys = words[2 : 2 + int(words[1])] if first == b"EVALSHA" else words[:1]
        shown = [str(key, "utf-8", "replace") if isinstance(key, bytes) else str(key) for key in keys]
        return " ".join(shown[:_KEYS_SHOWN]) + (" ..." if len(shown) > _KEYS_SHOWN else "")

    @classmethod
    def of(
        cls, partition: int, script: Script, keys: Sequence[bytes], *arguments: bytes | str | int
    ) -> Request:
        """A script with keys and arguments."""
        return cls(partition, (b"EVALSHA", script.sha, len(keys), *keys, *arguments))


class Requests:
    """Sends requests. Lives on the event loop.

    No request takes longer than `LIMIT` times the time for an answer, whatever the servers do.
    """

    def __init__(self, topology: Topology, *, timeout_s: float, wait: tuple[int, int] | None) -> None:
        """`wait`: what is sent with `waits` is waited for, until so many servers and replicas have it on their disk."""
        self._topology = topology
        self._timeout_s = timeout_s
        self._wait: Command | None = (
            None if wait is None else ("WAITAOF", *wait, max(1, int(timeout_s * 1000 * WAIT_SHARE)))
        )
        self._least = wait or (0, 0)
        self._confirm: Command | None = (
            ("WAIT", wait[1], max(1, int(timeout_s * 1000 * WAIT_SHARE))) if wait and wait[1] else None
        )
        self._loop = asyncio.get_running_loop()
        self._down_since: float | None = None
        self.trouble: ConnectionLost | ErrorReply | None = None
        """Why the last request was not answered, for people who run the server; None: it was."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: dict[str, tuple[float, int]] = {}
        """By the first word of a refusal: when the log was told of it, and how often it came since."""

    @property
    def waits(self) -> bool:
        """There is something to wait for, with `waits`."""
        return self._wait is not None

    @property
    def confirms(self) -> bool:
        """It can be seen whether a server is still the primary of its replicas, with `confirms`."""
        return self._confirm is not None

    async def ask(self, *requests: Request) -> list[Reply]:
        """What the servers answer; for what changes nothing, or may be done twice.

        Raises:
            StoreAway: they do not answer in time.
            Overloaded: there is no memory for it.
            Unavailable: they refuse.
        """
        await self.send(requests)
        for request in requests:
            if request.problem is not None:
                raise request.problem
        return [request.reply for request in requests]

    async def send(
        self, requests: Sequence[Request], *, waits: bool = False, once: bool = False, confirms: bool = False
    ) -> None:
        """Have requests answered, or say why they are not. It does not raise.

        Each must be one that may be done twice: it is sent again when its answer is lost, but for those that are sent
        `once`. With `waits` what is answered is on the disk where `is_durable` says so. With `confirms`, of requests that write
        something, it says that the server was the primary: so many replicas have heard of what was written.
        """
        wait = self._confirm if confirms else self._wait if waits else None
        deadline = self._loop.time() + self._limit_s()
        why = await self._attempt(requests, wait, deadline)
        await self._send_left(requests, wait, deadline, why, once=once)

    def begin(self, requests: Sequence[Request], done: Callable[[], None], *, waits: bool = False) -> None:
        """As `send`; `done` is called when it has ended, maybe before this returns.

        They are on their way when this returns if the node and a connection to it are known, as mostly: no task waits
        then unless something goes wrong.
        """
        if not requests:
            done()
            return
        wait = self._wait if waits else None
        deadline = self._loop.time() + self._limit_s()
        node = self._topology.known({request.partition for request in requests})

        def came(replies: list[Reply] | ConnectionLost) -> None:
            assert node is not None, "it has answered"
            refused = (
                () if isinstance(replies, ConnectionLost) else self._note_replies(requests, wait, replies)
            )
            if isinstance(replies, ConnectionLost) or refused:
                self._spawn(go_on(self._after(node, requests, replies, refused)), done)
            else:
                self._note(None)
                done()

        async def go_on(first: Coroutine[None, None, ConnectionLost | ErrorReply | None]) -> None:
            await self._send_left(requests, wait, deadline, await first)

        limit_s = min(self._answer_s(wait), deadline - self._loop.time())
        if node is None or not node.begin(self._commands(requests, wait), limit_s, came):
            self._spawn(go_on(self._attempt(requests, wait, deadline)), done)

    def _spawn(self, work: Coroutine[None, None, None], done: Callable[[], None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)

        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            done()

        task.add_done_callback(ended)

    async def _send_left(
        self,
        requests: Sequence[Request],
        wait: Command | None,
        deadline: float,
        why: ConnectionLost | ErrorReply | None,
        *,
        once: bool = False,
    ) -> None:
        """Send again what one attempt left, for the reason that it gave."""
        attempt = 0
        while left := [one for one in requests if not one.is_answered and one.problem is None]:
            pause_s = _PAUSES_S[min(attempt, len(_PAUSES_S) - 1)]
            attempt += 1
            is_late = self._loop.time() + pause_s + _MIN_REMAINING_S > deadline
            if is_late or once or isinstance(why, AccessDenied):
                break
            if pause_s:
                await asyncio.sleep(pause_s)
            why = await self._attempt(left, wait, deadline) or why
        for request in left:
            request.problem = StoreAway(
                "the store must answer within its time limit; it did not", retry_after_s=_RETRY_AFTER_S
            )
        self._note((why or _LATE) if left else None)

    def _limit_s(self) -> float:
        """When nobody has answered for longer than a request may take, the next one is tried once."""
        whole = self._timeout_s * LIMIT
        if self._down_since is None or self._loop.time() < self._down_since + whole:
            return whole
        return self._timeout_s

    def _answer_s(self, wait: Command | None) -> float:
        return self._timeout_s if wait is None else self._timeout_s * (1 + WAIT_SHARE)

    def _note(self, problem: ConnectionLost | ErrorReply | None) -> None:
        if problem is None:
            self._down_since = self.trouble = None
            return
        self.trouble = problem
        if self._down_since is None:
            self._down_since = self._loop.time()

    async def _attempt(
        self, requests: Sequence[Request], wait: Command | None, deadline: float
    ) -> ConnectionLost | ErrorReply | None:
        """Send each once, and say why some are left."""
        left_s = deadline - self._loop.time()
        if not any(request._ask for request in requests):
            node = self._topology.known({request.partition for request in requests})
            if node is not None:
                limit_s = min(self._answer_s(wait), left_s)
                return await self._send_to(node, requests, wait, limit_s, asking=False)
        limit_s = min(self._timeout_s, left_s)
        await asyncio.sleep(0)  # a timeout needs a task, and `eager.start` begins without one
        try:
            async with asyncio.timeout(limit_s):
                nodes = await self._topology.nodes_of({request.partition for request in requests})
        except TimeoutError:
            self._topology.doubt()
            return ConnectionLost("nobody said in time who has its keys", sent=False)
        except ConnectionLost as error:
            self._topology.doubt()
            return error
        groups: dict[tuple[Node, bool], list[Request]] = {}
        for request in requests:
            asked = request._ask
            node = nodes[request.partition] if asked is None else self._topology.node_at(asked)
            groups.setdefault((node, asked is not None), []).append(request)
        # at least a moment, so that time that is up is said by who was asked last
        limit_s = max(_MIN_REMAINING_S, min(self._answer_s(wait), deadline - self._loop.time()))
        sent = [
            self._send_to(node, group, wait, limit_s, asking=asking)
            for (node, asking), group in groups.items()
        ]
        problems = [await sent[0]] if len(sent) == 1 else await asyncio.gather(*sent)
        return next((problem for problem in problems if problem is not None), None)

    async def _send_to(
        self, node: Node, requests: Sequence[Request], wait: Command | None, limit_s: float, *, asking: bool
    ) -> ConnectionLost | ErrorReply | None:
        try:
            replies = await node.ask(self._commands(requests, wait, asking=asking), limit_s)
        except ConnectionLost as error:
            return await self._after(node, requests, error, ())
        refused = self._note_replies(requests, wait, replies, asking=asking)
        return await self._after(node, requests, replies, refused) if refused else None

    @staticmethod
    def _commands(
        requests: Sequence[Request], wait: Command | None, *, asking: bool = False
    ) -> Sequence[Command]:
        commands = [request.command for request in requests]
        if asking:
            commands = [each for command in commands for each in (("ASKING",), command)]
        if wait is not None:
            commands.append(wait)
        return commands

    def _note_replies(
        self, requests: Sequence[Request], wait: Command | None, replies: list[Reply], *, asking: bool = False
    ) -> Sequence[tuple[Request, ErrorReply]]:
        """Note what was answered; what was refused is returned."""
        waited: Reply = replies.pop() if wait is not None else None
        if asking:
            replies = replies[1::2]
        if isinstance(waited, ErrorReply):  # such as UNBLOCKED: the server is no primary any more
            self._topology.doubt()
            if wait is self._confirm and waited.code == "NOPERM":
                _log.warning("the user of the store should have the right +wait: reads are slower without")
                self._confirm = self._wait
        is_durable = wait is None or self._is_enough(waited)
        refused = []
        for request, reply in zip(requests, replies, strict=True):
            request._ask = None
            if (
                isinstance(reply, ErrorReply)
                and reply.code == _WRONG_TYPE
                and request.otherwise is not NO_OTHER
            ):
                _log.error(_OTHER_TYPE, key=request.keys)
                request.reply, request.is_answered, request.is_durable = request.otherwise, True, is_durable
            elif isinstance(reply, ErrorReply):
                refused.append((request, reply))
            else:
                request.reply, request.is_answered, request.is_durable = reply, True, is_durable
        return refused

    async def _after(
        self,
        node: Node,
        requests: Sequence[Request],
        replies: list[Reply] | ConnectionLost,
        refused: Sequence[tuple[Request, ErrorReply]],
    ) -> ConnectionLost | ErrorReply | None:
        """Do what must be done before anything is sent again; why some requests are left."""
        if isinstance(replies, ConnectionLost):
            for request in requests:
                request.is_sent |= replies.sent
                request._ask = None
            self._topology.doubt()
            return replies
        problem: ErrorReply | None = None
        for request, reply in refused:
            if await self._goes_on(node, request, reply):
                problem = reply
            else:
                request.problem = self._error(reply, request)
        return problem

    async def _goes_on(self, node: Node, request: Request, reply: ErrorReply) -> bool:
        """Whether to send again what was refused."""
        if reply.code in _REDIRECTIONS:
            host, port = reply.address or ("", 0)
            address = (host or node.address[0], port)
            if reply.code == "ASK":
                request._ask = address
            else:
                self._topology.moved(request.partition, address)
            return True
        if reply.code not in _PASSING:
            return False
        if reply.code == "NOSCRIPT":
            await self._load(node)
        else:
            self._topology.doubt()
            if reply.code == "READONLY":
                node.hang_up()
        return True

    async def _load(self, node: Node) -> None:
        try:
            await node.ask(_LOAD, self._timeout_s)
        except ConnectionLost:
            self._topology.doubt()

    def _is_enough(self, waited: Reply) -> bool:
        here, replicas = self._least
        if isinstance(waited, int):  # of WAIT
            return waited >= replicas
        return isinstance(waited, list) and waited[0] >= here and waited[1] >= replicas

    def _error(self, reply: ErrorReply, request: Request) -> ServerError:
        """What callers are told; the log and `StoreRefuses.why` have what the server said."""
        if reply.code == _WRONG_TYPE:
            _log.error(_OTHER_TYPE, key=request.keys)
        else:
            self._tell(reply)
        if reply.code == "OOM":
            return Overloaded("the store must have memory left; it has none", retry_after_s=_RETRY_AFTER_S)
        refuses = "the store must do what it is asked; it refuses"
        return StoreRefuses(f"{refuses}: {reply.code}", why=f"{refuses}: {reply}")

    def _tell(self, reply: ErrorReply) -> None:
        """Write to the log that the store refuses, not for every request of a flood."""
        now = self._loop.time()
        told, more = self._told.get(reply.code, (-math.inf, 0))
        if now < told + REPEAT_LOG_S:
            self._told[reply.code] = told, more + 1
            return
        self._told[reply.code] = now, 0
        _log.warning("the store refuses", reason=str(reply), **({"more_before": more} if more else {}))
