"""A TCP proxy that treats connections badly, drawn from a seed.

It forwards bytes between clients and one server on the loopback, and of each connection it decides when it is
accepted what becomes of it: refused, dropped after some bytes (by a reset or by an end in good order), cut in the middle
of a piece, held up now and then, or doubled: what the client sends goes to the server by two connections, and the
answers of the second one are thrown away, so that every change on it comes to the server twice. Only what is clean
lasts; everything else ends after some bytes.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import random
import socket
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal, Self

from support import secured

Direction = Literal["requests", "answers"]
Fate = Literal["clean", "refuse", "drop", "truncate", "delay", "double"]
_PIECE = 4096
_LONGEST_DELAY_S = 0.15
_BYTES_LOG_MEDIAN = 9.5  # 13 kB


@dataclasses.dataclass
class _Plan:
    """What becomes of one connection."""

    fate: Fate
    chance: random.Random
    left: int
    """Bytes, of both directions, until its end."""


class Proxy:
    """Context manager; runs in a thread of its own.

    Args:
        target: address of the server. If it is secured (see `support.secured`), so is the proxy's: bytes go through as
            they come, but for connections to be doubled, which end here and are made anew, since TLS knows its bytes.
        seed: what is drawn is drawn from this.
        fates: what may become of a connection, each as likely as it is often in here.
    """

    def __init__(self, target: str, seed: int, fates: tuple[Fate, ...] = ("clean",)) -> None:
        self._host, _, port = secured.host_and_port(target).rpartition(":")
        self._port = int(port)
        self._tls = secured.contexts() if target.startswith(secured.SCHEME) else None
        self._chance = random.Random(seed)
        self._fates = fates
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.seen: collections.Counter[str] = collections.Counter()
        """What was done, how often."""
        self.held = threading.Event()
        """Something is being kept back."""
        self._gates = {"requests": asyncio.Event(), "answers": asyncio.Event()}
        # Bound here, so that the address is known and nobody is refused from now on.
        self._socket = socket.create_server(("127.0.0.1", 0))
        scheme = secured.SCHEME if self._tls else ""
        self.address = f"{scheme}127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        self.release()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def be(self, *fates: Fate) -> None:
        """From now on treat connections so; those that are open are dropped."""

        def change() -> None:
            self._fates = fates
            for writer in tuple(self._open):
                writer.transport.abort()

        self._call(change)

    def hold(self, direction: Direction) -> None:
        """Keep back what comes in a direction from now on; `held` is set when there is something."""
        self.held.clear()
        self._call(self._gates[direction].clear)

    def release(self) -> None:
        """Let everything go on."""
        for gate in self._gates.values():
            self._call(gate.set)

    def _call(self, change: Callable[[], None]) -> None:
        """Do something in the proxy's thread, and wait until it is done."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(change)
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(200)

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, contextlib.suppress(RuntimeError):
            # Stopping the loop ends the run with a RuntimeError; the runner then cancels what is left.
            runner.run(self._accept())

    async def _accept(self) -> None:
        async with await asyncio.start_server(self._connected, sock=self._socket) as server:
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fate = self._chance.choice(self._fates)
        chance = random.Random(self._chance.getrandbits(32))
        plan = _Plan(fate, chance, int(chance.lognormvariate(_BYTES_LOG_MEDIAN, 1.5)))
        self.seen[fate] += 1
        self._open.add(writer)
        try:
            if fate != "refuse":
                await self._forward(plan, reader, writer)
        except asyncio.CancelledError:
            pass  # the proxy ends; Python 3.11 would complain about a task of a connection that ends so
        finally:
            self._open.discard(writer)
            self._end(plan, writer)

    async def _forward(self, plan: _Plan, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with contextlib.AsyncExitStack() as stack:
            servers = []
            as_server, as_client = self._tls if self._tls and plan.fate == "double" else (None, None)
            if as_server is not None:
                try:
                    await writer.start_tls(as_server)
                except OSError:
                    return  # the client has gone
            for _ in range(2 if plan.fate == "double" else 1):
                try:
                    servers.append(await asyncio.open_connection(self._host, self._port, ssl=as_client))
                except ssl.SSLCertVerificationError:
                    raise  # it will never do: asyncio logs it
                except OSError:
                    return  # the server is down: the client sees its connection end
                stack.callback(servers[-1][1].transport.abort)
            first, *others = servers
            pumps = [self._pump(plan, "requests", reader, [server[1] for server in servers])]
            pumps.append(self._pump(plan, "answers", first[0], [writer]))
            drains = [asyncio.ensure_future(self._pump(plan, "answers", other[0], [])) for other in others]
            both = [asyncio.ensure_future(pump) for pump in pumps]
            try:
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (*both, *drains):
                    task.cancel()
                await asyncio.gather(*both, *drains, return_exceptions=True)

    async def _pump(
        self,
        plan: _Plan,
        direction: Direction,
        reader: asyncio.StreamReader,
        writers: list[asyncio.StreamWriter],
    ) -> None:
        """Forward one direction until it ends or its plan says so."""
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                if plan.fate == "delay" and plan.chance.random() < 0.1:
                    await asyncio.sleep(plan.chance.uniform(0, _LONGEST_DELAY_S))
                if not self._gates[direction].is_set():
                    self.held.set()
                    await self._gates[direction].wait()
                plan.left -= len(piece)
                if plan.left < 0 and plan.fate != "clean":
                    if plan.fate == "truncate":
                        await self._send(piece[: plan.chance.randrange(len(piece))], writers)
                    return
                await self._send(piece, writers)

    async def _send(self, piece: bytes, writers: list[asyncio.StreamWriter]) -> None:
        for at, writer in enumerate(writers):
            try:
                writer.write(piece)
                await writer.drain()
            except OSError:
                if at == 0:  # the second server connection may end when it likes
                    raise

    def _end(self, plan: _Plan, writer: asyncio.StreamWriter) -> None:
        """A reset, or an end in good order."""
        if plan.chance.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
