"""Malformed messages, connections and requests of HTTP against real servers: `make fuzz ARGS="--messages 50000 --seed 7"`.

Each front has a server of its own, with sessions that were stepped before and that no message names. What the fuzzer
sends is drawn from the seed. It finds: a server that ends, an error that the log calls a defect, a call that has no end,
a session that is not as it was, bit for bit. What was on its way then is kept in a folder, and the server started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import select
import selectors
import socket
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

import grpc
import numpy as np
from click.testing import CliRunner

from stepwell.cli import main as stepwell
from stepwell.v1 import models_pb2
from stepwell.v1 import sessions_pb2 as pb
from support.peers import malformed_http, malformed_http2, malformed_messages
from support.peers.http2 import Gone
from support.peers.malformed_messages import Valid
from support.peers.pipelined import Pipeline
from support.peers.wire import Wire, data, tensor
from support.servers import served
from support.servers.both_fronts import FRONTS

MODEL = "seq"
FUZZED = [f"fuzz-{number}" for number in range(8)]
"""Sessions that messages name."""
WATCHED = [f"watched-{number:02}-9b7c41d2e5" for number in range(16)]
"""Sessions that none names, however it is damaged."""
LOOK_EVERY = 5000
"""Messages, or connections divided by ten, between two looks at the server."""
SOCKETS = 48
"""Connections at the same time."""
LINGER_S = 1.0
"""A connection that the server leaves open for so long is closed by the peer."""
WAIT_S = 100.0
AWAY_S, ENDS_S = 10.0, 5.0
"""gRPC's own server may be away for a moment: the front in Python starts it again where it has stopped by itself."""
KEPT = 400
"""Calls or connections that are kept when something is found: more than are on their way at a time."""
_DEFECT = re.compile(r"^\S+ (error|critical) |^Traceback|panicked at", re.MULTILINE)
_NEXT_LINE = re.compile(r"\n(?=\d{4}-\d\d-\d\dT\S+ \w+ )")
_WARM_UP = 2000
State = tuple[object, ...]


@dataclasses.dataclass
class Found:
    """What came of it, on one front."""

    front: str
    messages: int = 0
    calls: int = 0
    connections: int = 0
    requests: int = 0
    """Connections to the port of JSON."""
    message_s: float = 0.0
    connection_s: float = 0.0
    ended: Counter[str] = dataclasses.field(default_factory=Counter)
    """Calls by their status."""
    closed: Counter[str] = dataclasses.field(default_factory=Counter)
    """Connections by who closed them."""
    answered: Counter[str] = dataclasses.field(default_factory=Counter)
    """Answers of HTTP/1.1 by their status: at least one of each connection that has some."""
    crashes: list[str] = dataclasses.field(default_factory=list)
    """The server's process has ended, or its log tells of a defect, or a call has no end."""
    changed: set[str] = dataclasses.field(default_factory=set)
    """Sessions that are not as they were."""
    resident_before: int = 0
    resident_after: int = 0

    @property
    def is_good(self) -> bool:
        return not self.crashes and not self.changed

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.front}: {self.messages:,} messages in {self.calls:,} calls"
            f" ({self.messages / max(self.message_s, 1e-9):,.0f}/s), {self.connections:,} connections"
            f" ({self.connections / max(self.connection_s, 1e-9):,.0f}/s)"
        )
        yield f"  crashes: {len(self.crashes)}, changed sessions: {len(self.changed)} of {len(WATCHED)}"
        yield f"  memory: {self.resident_before >> 20} MiB before, {self.resident_after >> 20} MiB after"
        yield f"  calls ended: {_counted(self.ended)}"
        yield f"  connections ended: {_counted(self.closed)}"
        yield f"  {self.requests:,} connections with JSON, answered: {_counted(self.answered)}"
        yield from (f"  CRASH {crash}" for crash in self.crashes[:20])
        yield from (f"  CHANGED {name}" for name in sorted(self.changed))


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counter.most_common(12)) or "none"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Whom a server knows: who watches, and who sends the messages."""

    file: Path
    watcher: str
    fuzzer: str

    @classmethod
    def make(cls, folder: Path) -> Tokens:
        file = folder / "callers.tokens"
        return cls(file, _new_token(file, "watched"), _new_token(file, "fuzz"))


def _new_token(file: Path, name: str) -> str:
    arguments = ["tokens", "add", name, "--tenant", name, "--file", str(file), "--json"]
    added = CliRunner().invoke(stepwell, arguments, catch_exceptions=False)
    token: str = json.loads(added.stdout)["token"]
    return token


class Fuzz:
    """One front's server, and what is sent to it."""

    def __init__(
        self,
        front: str,
        seed: int,
        folder: Path,
        *,
        tokens: Tokens | None = None,
        until: float = float("inf"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`tokens`: callers are asked, and most calls have a token. `folder`: for what is found."""
        self.found = Found(front if tokens is None else f"{front}, callers asked")
        self._name = front
        self._tokens = tokens
        self._seed = seed
        self._folder = folder
        self._until = until
        options = ["--front", front, "--log-level", "warning", "--max-message-bytes", "1MiB"]
        if tokens is not None:
            options += ["--auth-tokens", str(tokens.file)]
        if front == "native":
            options += ["--http-listen", "127.0.0.1:0"]
        self._server = served.local_server(MODEL, extra_args=options, env=environment)
        self._recent: deque[object] = deque(maxlen=KEPT)
        self._before: dict[str, State] = {}
        self._logged = 0
        self._known: Sequence[Valid] = ()

    def run(self, messages: int, connections: int, requests: int = 0) -> Found:
        """Send so much of each, or as much as there is time for. `requests`: connections to the port of JSON, if there is one."""
        with self._server:
            self._prepare()
            # what is made once is made before memory is looked at
            self._send_messages(min(_WARM_UP, messages), random.Random(f"{self._seed} warm-up"))
            self._tidy()
            found = self.found
            found.messages = found.calls = 0
            found.ended.clear()
            found.resident_before = self._resident()
            began = time.monotonic()
            self._send_messages(messages, random.Random(f"{self._seed} messages"))
            found.message_s = time.monotonic() - began
            began = time.monotonic()
            rng = random.Random(f"{self._seed} connections")
            found.connections += self._send_connections(
                connections, lambda: malformed_http2.connection(self._call(rng), rng)
            )
            found.connection_s = time.monotonic() - began
            if self._server.http_address is not None:
                found.requests += self._send_requests(requests, random.Random(f"{self._seed} requests"))
            self._tidy()
            found.resident_after = self._resident()
            self._look("at the end")
            if self._server.stop(timeout_s=WAIT_S):
                found.crashes.append("the server did not stop as it should")
            self._look_at_log("when it has ended")  # its last lines may have been on their way
        return found

    def _prepare(self) -> None:
        """Sessions to be watched, with a past, and sessions to be fuzzed."""
        rng = np.random.default_rng(self._seed)
        with self._wire() as wire:
            (model,) = wire.models.ListModels(models_pb2.ListModelsRequest(), timeout=WAIT_S).models
            (spec,) = model.inputs
            features = spec.shape[-1]
            self._known = malformed_messages.valid(MODEL, FUZZED, features, spec.name)
            for name in WATCHED:
                wire.open(MODEL, session_id=name)
                x = rng.standard_normal((1, 3, features)).astype(np.float32)
                wire.step(name, [tensor(x, spec.name)])
        with self._wire(of_fuzzer=True) as wire:
            self._open_fuzzed(wire)
        self._before = self._states()

    def _wire(self, *, of_fuzzer: bool = False) -> Wire:
        """A client that knows what it does: of the watched sessions, or of the others."""
        if self._tokens is None:
            return Wire(self._server.address)
        token = self._tokens.fuzzer if of_fuzzer else self._tokens.watcher
        return Wire(self._server.address, ("authorization", f"Bearer {token}"))

    @staticmethod
    def _open_fuzzed(wire: Wire) -> None:
        for name in FUZZED:
            wire.open(MODEL, session_id=name)

    def _states(self) -> dict[str, State]:
        """Revision, position and state of the watched sessions that are there."""
        found = {}
        with self._wire() as wire:
            for name in WATCHED:
                try:
                    read = wire.state(name)
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
                    continue
                found[name] = read.session.revision, read.session.position, *data(read.state)
        return found

    def _tidy(self) -> None:
        """End the sessions that messages have opened, so that memory can be compared; those that they name are there again."""
        if self._server.pid is None:
            return
        with self._wire(of_fuzzer=True) as wire:
            token = ""
            while True:
                request = pb.ListSessionsRequest(page_size=1000, page_token=token, skip_total=True)
                page = wire.sessions.ListSessions(request, timeout=WAIT_S)
                wire.close(*({one.session_id for one in page.sessions} - {*WATCHED}))
                token = page.next_page_token
                if not token:
                    break
            self._open_fuzzed(wire)

    def _resident(self) -> int:
        status = Path(f"/proc/{self._server.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS"))

    # --- messages ---

    def _send_messages(self, count: int, rng: random.Random) -> None:
        pipeline: Pipeline | None = None
        sent = due = 0
        while sent < count and time.monotonic() < self._until:
            if sent >= due:
                due += LOOK_EVERY
                self._look("between messages")
                self._tidy()
            call = self._call(rng)
            self._recent.append(call)
            sent += call.messages
            try:
                if pipeline is None or pipeline.is_full:
                    self._finish(pipeline)
                    pipeline = Pipeline(self._server.address)
                pipeline.put(call)
            except (Gone, TimeoutError, OSError) as error:
                self._lost(pipeline, error)
                pipeline = None
        try:
            self._finish(pipeline)
        except (Gone, TimeoutError) as error:
            self._lost(pipeline, error)
        self.found.messages += sent
        self._look("after the messages")

    def _call(self, rng: random.Random) -> malformed_messages.Call:
        return malformed_messages.odd_call(
            self._known, rng, () if self._tokens is None else (self._tokens.fuzzer,)
        )

    def _finish(self, pipeline: Pipeline | None) -> None:
        if pipeline is not None:
            pipeline.finish()
            self._count(pipeline)

    def _count(self, pipeline: Pipeline) -> None:
        pipeline.close()
        self.found.ended += pipeline.ended
        self.found.calls += pipeline.calls

    def _lost(self, pipeline: Pipeline | None, error: Exception) -> None:
        """A connection whose HTTP/2 was in order has ended, or says nothing."""
        if pipeline is not None:
            self._count(pipeline)
        why = (
            "calls without an end" if isinstance(error, TimeoutError) else "a connection in order was closed"
        )
        self._crashed(f"{why}: {error!r}")

    # --- connections ---

    def _send_requests(self, count: int, rng: random.Random) -> int:
        """Make connections to the port of JSON. Returns their number."""
        known = malformed_http.valid(self._known)
        tokens = () if self._tokens is None else (self._tokens.fuzzer,)
        return self._send_connections(
            count, lambda: malformed_http.connection(known, rng, tokens), over_http=True
        )

    def _send_connections(self, count: int, draw: Callable[[], bytes], *, over_http: bool = False) -> int:
        """Make connections, each with bytes that are drawn. Returns their number."""
        due = number = 0
        peers: Peers | None = None
        while number < count and time.monotonic() < self._until:
            if number >= due:
                due += LOOK_EVERY // 10
                self._look("between connections")
                self._tidy()
            raw = draw()
            self._recent.append(raw)
            # a server that was started again has another port for JSON
            address = (self._server.http_address or "") if over_http else self._server.address
            if peers is None or peers.address != address:
                peers = Peers(address, self.found.closed, self.found.answered)
            try:
                peers.add(raw, number)
            except OSError as error:
                self._crashed(f"no connection is taken: {error!r}")
            number += 1
        if peers is not None:
            peers.finish()
        self._look("after the connections")
        return number

    # --- looking ---

    def _look(self, when: str) -> None:
        """See whether the server is well, and everything as it was."""
        if self._server.pid is None:
            self._crashed(f"the server has ended {when}")
            return
        self._look_at_log(when)
        if not self._before:
            return
        try:
            after = self._served_states()
        except grpc.RpcError as error:
            self._crashed(f"a client is not served {when}: {error}")
            return
        self.found.changed |= {name for name, state in self._before.items() if after.get(name) != state}

    def _look_at_log(self, when: str) -> None:
        log = self._server.logs()
        fresh, self._logged = log[self._logged :], len(log)
        if found := _DEFECT.search(fresh):
            # what was logged after it is of something else
            own = _NEXT_LINE.split(fresh[found.start() :], maxsplit=1)[0]
            self._keep(f"a defect in the log {when}: {own.strip().splitlines()[-1]}", fresh)

    def _served_states(self) -> dict[str, State]:
        """As `_states`, also where the server is away for a moment."""
        end = time.monotonic() + AWAY_S
        while True:
            try:
                return self._states()
            except grpc.RpcError:
                if time.monotonic() > end or self._server.pid is None:
                    raise

    def _crashed(self, what: str) -> None:
        """Take note, and go on with a server that is well."""
        if self._has_ended():
            what = f"{what}; the server's process has ended"
        self._look_at_log("of the server that is given up")
        self._keep(what, self._server.logs()[-20_000:])
        self._server.restart()
        self._logged = 0  # a new process has a log of its own
        self._before = {}
        self._prepare()

    def _has_ended(self) -> bool:
        """Whether the process has ended, or does within a moment: one that aborts closes its connections before."""
        pid = self._server.pid
        if pid is None:
            return True
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended meanwhile
            return True
        try:  # the server's own `pid` may say nothing while another thread waits for the end
            return bool(select.select([process], [], [], ENDS_S)[0])
        finally:
            os.close(process)

    def _keep(self, what: str, log: str) -> None:
        name = f"{self._name}-{self._seed}-{len(self.found.crashes)}"
        self.found.crashes.append(f"{what} (see {name}.txt)")
        self._folder.mkdir(parents=True, exist_ok=True)
        recent = "\n".join(repr(one) for one in self._recent)
        (self._folder / f"{name}.txt").write_text(
            f"{what}\n\n{log}\n\nthe last of what was sent:\n{recent}\n"
        )


class Peers:
    """Connections at the same time, each of which writes its bytes and waits for the server to close it."""

    def __init__(self, address: str, closed: Counter[str], answered: Counter[str]) -> None:
        self.address = address
        host, _, port = address.rpartition(":")
        self._address = (host, int(port))
        self._closed = closed
        self._answered = answered
        self._selector = selectors.DefaultSelector()
        self._left: dict[socket.socket, tuple[bytes, float]] = {}

    def add(self, raw: bytes, number: int) -> None:
        """One more, when there is room for it.

        Raises:
            OSError: the server takes none.
        """
        while len(self._left) >= SOCKETS:
            self._turn()
        peer = self._connected((f"127.0.0.{2 + number % 200}", 0))
        peer.setblocking(False)
        self._left[peer] = raw, time.monotonic() + LINGER_S
        self._selector.register(peer, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _connected(self, source: tuple[str, int]) -> socket.socket:
        """`source`: one address has not ports enough for all that were closed within a minute."""
        end = time.monotonic() + AWAY_S
        while True:
            try:
                return socket.create_connection(self._address, WAIT_S, source_address=source)
            except ConnectionRefusedError:
                if time.monotonic() > end:
                    raise
                self._closed["refused for a moment"] += 1
                time.sleep(0.01)

    def finish(self) -> None:
        while self._left:
            self._turn()

    def _turn(self) -> None:
        for key, events in self._selector.select(0.05):
            peer = key.fileobj
            assert isinstance(peer, socket.socket)
            try:
                if events & selectors.EVENT_READ:
                    self._read(peer)
                elif events & selectors.EVENT_WRITE:
                    self._write(peer)
            except BlockingIOError:
                continue
            except OSError:
                self._close(peer, "by the server, at once")
        now = time.monotonic()
        for peer in [peer for peer, (_, until) in self._left.items() if until < now]:
            self._close(peer, "by the peer")

    def _read(self, peer: socket.socket) -> None:
        came = peer.recv(1 << 16)
        if not came:
            self._close(peer, "by the server")
        elif came.startswith(b"HTTP/1.1 "):
            self._answered[came[9:12].decode("latin-1")] += 1

    def _write(self, peer: socket.socket) -> None:
        raw, until = self._left[peer]
        raw = raw[peer.send(raw) :] if raw else raw
        self._left[peer] = raw, until
        if not raw:
            peer.shutdown(socket.SHUT_WR)
            self._selector.modify(peer, selectors.EVENT_READ)

    def _close(self, peer: socket.socket, how: str) -> None:
        self._closed[how] += 1
        self._selector.unregister(peer)
        del self._left[peer]
        peer.close()


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=1_000_000, help="of all fronts together")
    parser.add_argument("--connections", type=int, default=100_000, help="of all fronts together")
    parser.add_argument("--requests", type=int, default=100_000, help="connections to the ports of JSON")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--front", choices=("both", *FRONTS), default="both")
    parser.add_argument("--minutes", type=float, default=60.0, help="at most; each front has its share")
    parser.add_argument(
        "--keep", type=Path, default=Path(tempfile.gettempdir()) / "stepwell-fuzz", metavar="DIR"
    )
    options = parser.parse_args(arguments)
    fronts = FRONTS if options.front == "both" else (options.front,)
    print(f"seed {options.seed}", flush=True)
    is_good = True
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens.make(Path(folder))
        runs = [(front, known) for front in fronts for known in (None, tokens)]
        for front, known in runs:
            until = time.monotonic() + 60 * options.minutes / len(runs)
            fuzz = Fuzz(front, options.seed, options.keep, tokens=known, until=until)
            requests = (
                options.requests // sum(name == "native" for name, _ in runs) if front == "native" else 0
            )
            found = fuzz.run(options.messages // len(runs), options.connections // len(runs), requests)
            print(*found.lines(), sep="\n", flush=True)
            is_good &= found.is_good
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
