"""Sends requests to the nodes that have their keys, with retries until they are answered or time is up."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine, Sequence

from stepwell_server.errors import Overloaded, ServerError, StoreAway, StoreRefuses
from stepwell_server.logs import Log, Repeats
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
"""Total time for a request and its retries, as a multiple of the time for one answer."""
WAIT_SHARE = 0.8
"""Additional time in which a server may wait for its disk, as a share of the time for one answer."""
_RETRY_AFTER_S = 1.0
_MIN_REMAINING_S = 0.01
"""No retry starts with less time left."""
_LATE = ConnectionLost("time was up", sent=False)
_log = Log("store.valkey")
_PAUSES_S = (0.0, 0.02, 0.05, 0.1, 0.2)
_WRONG_TYPE, _OTHER_TYPE = "WRONGTYPE", "a key of the store has the wrong type"
_KEYS_SHOWN = 4
_REDIRECTIONS = frozenset({"MOVED", "ASK"})
#: Error replies for which nothing was done, and a retry may succeed soon.
_PASSING = frozenset(
    {"TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "LOADING", "BUSY", "READONLY", "NOSCRIPT", "UNBLOCKED"}
)
NO_OTHER = object()
_LOAD: Sequence[Command] = [(b"SCRIPT", b"LOAD", script.source.encode()) for script in ALL]


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A command, whose keys belong to one partition or at least one node, and its result."""

    partition: int
    command: Command
    reply: Reply = None
    is_answered: bool = False
    is_durable: bool = True
    """After a wait for the disk: enough servers have it on disk."""
    is_sent: bool = False
    """It may have been executed."""
    problem: ServerError | None = None
    """Why it was not answered, or why it was refused."""
    otherwise: Reply = NO_OTHER
    """The answer to use if its key has another type; `NO_OTHER`: that is an error."""
    _ask: Address | None = None
    """The node for the next attempt only."""

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
        """Create a request for a script with keys and arguments."""
        return cls(partition, (b"EVALSHA", script.sha, len(keys), *keys, *arguments))


class Requests:
    """Sends requests. Lives on the event loop.

    No request takes longer than `LIMIT` times the time for one answer, whatever the servers do.
    """

    def __init__(self, topology: Topology, *, timeout_s: float, wait: tuple[int, int] | None) -> None:
        """`wait`: requests with `waits` wait until this many servers and replicas have them on disk."""
        self._topology = topology
        self._timeout_s = timeout_s
        self._wait: Command | None = (
            None if wait is None else ("WAITAOF", *wait, max(1, int(timeout_s * 1000 * WAIT_SHARE)))
        )
        self._min_durable = wait or (0, 0)
        self._confirm: Command | None = (
            ("WAIT", wait[1], max(1, int(timeout_s * 1000 * WAIT_SHARE))) if wait and wait[1] else None
        )
        self._loop = asyncio.get_running_loop()
        self._down_since: float | None = None
        self.trouble: ConnectionLost | ErrorReply | None = None
        """Why the last request was not answered, for operators; None: it was."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusals = Repeats()
        """By code of an error reply."""

    @property
    def waits(self) -> bool:
        """Requests with `waits` wait for a disk."""
        return self._wait is not None

    @property
    def confirms(self) -> bool:
        """Requests with `confirms` verify that a server is still the primary of its replicas."""
        return self._confirm is not None

    async def ask(self, *requests: Request) -> list[Reply]:
        """Return the answers to requests that change nothing, or that may be executed twice.

        Raises:
            StoreAway: the servers do not answer in time.
            Overloaded: they have no memory left.
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
        """Send requests and store their answers or problems in them. Does not raise.

        A request must be safe to execute twice: it is sent again if its answer is lost, unless `once` is set. With
        `waits`,
        `is_durable` means that it is on disk. With `confirms`, which is for requests that write, it means that the
        server was the primary, because enough replicas have received the write.
        """
        wait = self._confirm if confirms else self._wait if waits else None
        deadline = self._loop.time() + self._limit_s()
        why = await self._attempt(requests, wait, deadline)
        await self._send_left(requests, wait, deadline, why, once=once)

    def begin(self, requests: Sequence[Request], done: Callable[[], None], *, waits: bool = False) -> None:
        """As `send`; `done` is called at the end, possibly before this returns.

        Usually the node is known and has an idle connection. Then the requests are sent before this returns, and no
        task is needed unless something fails.
        """
        if not requests:
            done()
            return
        wait = self._wait if waits else None
        deadline = self._loop.time() + self._limit_s()
        node = self._topology.known({request.partition for request in requests})

        def came(replies: list[Reply] | ConnectionLost) -> None:
            assert node is not None, "it answered"
            refused = (
                () if isinstance(replies, ConnectionLost) else self._note_replies(requests, wait, replies)
            )
            if isinstance(replies, ConnectionLost) or refused:
                self._spawn(finish(self._after(node, requests, replies, refused)), done)
            else:
                self._note(None)
                done()

        async def finish(first: Coroutine[None, None, ConnectionLost | ErrorReply | None]) -> None:
            await self._send_left(requests, wait, deadline, await first)

        limit_s = min(self._answer_s(wait), deadline - self._loop.time())
        if node is None or not node.begin(self._commands(requests, wait), limit_s, came):
            self._spawn(finish(self._attempt(requests, wait, deadline)), done)

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
        """Retry the requests that an attempt left unanswered, given its reason."""
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
        """Return the total time for a request. After a long outage it is shorter, so that there is only one attempt."""
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
        """Send each request once; return why some were not answered."""
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
            return ConnectionLost("the owner of its keys could not be found in time", sent=False)
        except ConnectionLost as error:
            self._topology.doubt()
            return error
        groups: dict[tuple[Node, bool], list[Request]] = {}
        for request in requests:
            asked = request._ask
            node = nodes[request.partition] if asked is None else self._topology.node_at(asked)
            groups.setdefault((node, asked is not None), []).append(request)
        # at least a moment, so that the node asked last reports the timeout
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
        """Store the answers; return the error replies."""
        waited: Reply = replies.pop() if wait is not None else None
        if asking:
            replies = replies[1::2]
        if isinstance(waited, ErrorReply):  # such as UNBLOCKED: the server is no longer the primary
            self._topology.doubt()
            if wait is self._confirm and waited.code == "NOPERM":
                _log.warning("grant the user of the store the right +wait: reads are slower without it")
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
        """Prepare retries; return why some requests were not answered."""
        if isinstance(replies, ConnectionLost):
            for request in requests:
                request.is_sent |= replies.sent
                request._ask = None
            self._topology.doubt()
            return replies
        problem: ErrorReply | None = None
        for request, reply in refused:
            if await self._is_retried(node, request, reply):
                problem = reply
            else:
                request.problem = self._error(reply, request)
        return problem

    async def _is_retried(self, node: Node, request: Request, reply: ErrorReply) -> bool:
        """Whether to send a request again after this error reply."""
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
        here, replicas = self._min_durable
        if isinstance(waited, int):  # the reply of WAIT
            return waited >= replicas
        return isinstance(waited, list) and waited[0] >= here and waited[1] >= replicas

    def _error(self, reply: ErrorReply, request: Request) -> ServerError:
        """Return the error for callers. The server's own text goes to the log and to `StoreRefuses.why`."""
        if reply.code == _WRONG_TYPE:
            _log.error(_OTHER_TYPE, key=request.keys)
        else:
            self._log_refusal(reply)
        if reply.code == "OOM":
            return Overloaded("the store must have free memory; it has none", retry_after_s=_RETRY_AFTER_S)
        refuses = "the store must accept the request; it refuses"
        return StoreRefuses(f"{refuses}: {reply.code}", why=f"{refuses}: {reply}")

    def _log_refusal(self, reply: ErrorReply) -> None:
        """Log an error reply, but not for every request of a flood."""
        if (more := self._refusals.due(reply.code, self._loop.time())) is not None:
            _log.warning("the store refuses", reason=str(reply), **more)
