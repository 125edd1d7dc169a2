"""Real Valkey servers on free ports of the loopback: one alone, a primary that Sentinels watch, and a Cluster.

Each keeps its files in a temporary folder of its own, can be killed, paused and started again on the same port with the
same files, and ends with its block:

    with Valkey(append="always") as valkey:
        ...  # valkey.url("?prefix=t:"), valkey.ask("GET", "key"), valkey.kill(), valkey.start()

`Sentinels` and `Cluster` are the same for the other two. The programs are Debian's `valkey-server` and
`valkey-sentinel`; where they are missing, a test fails and says so.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from support.certificates import Pair
from support.servers.resp import Connection, ReplyError, by_name, fields

HOST = "127.0.0.1"
NAME = "stepwell"
"""What Sentinels call their primary."""
SLOTS = 16384
Append = Literal["", "no", "everysec", "always"]
_HANG_S = 100.0
_PATIENT = "timeout_ms=20000"
# Below the ports that the system gives away by itself, so that one is still free when its server is started again.
_PORTS = range(12000, 32000)


class NoValkey(Exception):
    """A program is missing."""


def program(name: str) -> str:
    """Where `valkey-server` or `valkey-sentinel` is.

    Raises:
        NoValkey: it is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise NoValkey(
            f"{name} is not installed; `make test` installs it on a Debian as root,"
            " elsewhere install Valkey 7.2 or newer (on Debian: apt-get install valkey-server valkey-sentinel)"
        )
    return found


class Port:
    """A port of the loopback that no other test takes until it is given back, whether anybody listens on it or not."""

    def __init__(self) -> None:
        chance = random.SystemRandom()
        for _ in range(1000):
            self.number = chance.choice(_PORTS)
            # Held as a UDP port: everybody who takes ports here sees that, and TCP is free for the server.
            self._held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                self._held.bind((HOST, self.number))
                with socket.socket() as tried:
                    tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    tried.bind((HOST, self.number))
            except OSError:
                self._held.close()
                continue
            return
        raise AssertionError(f"no port from {_PORTS.start} to {_PORTS.stop - 1} is free")

    def free(self) -> None:
        """Give it back."""
        self._held.close()


class Process:
    """A program of Valkey with a folder and a port of its own. Leaving the block ends it and removes its folder."""

    def __init__(self, name: str) -> None:
        self._program = program(name)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self._port = Port()
        self.port = self._port.number
        self.address = f"{HOST}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._is_paused = False

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has been started and not ended, by us or by itself. A paused one runs."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Its output over all its lives."""
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start it, with the files of its last life, and wait until it answers.

        Raises:
            AssertionError: it ends or does not answer; the message has its log.
        """
        assert self._process is None, "it runs already"
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [self._program, *self._arguments()],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until(self._answers, f"{self._program} does not answer", self.log)

    def kill(self) -> None:
        """End it at once, as by a loss of power of its process alone: what it gave the kernel is kept."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Kill it, and start it on the same port with the same files."""
        self.kill()
        self.start()

    def pause(self) -> None:
        """Let it do nothing; its connections stay open. Returns when it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it does not stop", self.log)
        self._is_paused = True

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)
        self._is_paused = False

    def ask(self, *words: object) -> Any:
        """The reply to a command, over a connection that is kept. Of one thread.

        Raises:
            ReplyError: it refuses.
            OSError: it is not there.
        """
        if self._connection is not None and self._connection.has_ended():
            self._hang_up()
        if self._connection is None:
            self._connection = self.connect()
        try:
            return self._connection.ask(*words)
        except OSError:
            self._hang_up()
            raise

    def connect(self) -> Connection:
        """A connection of the caller's own."""
        return Connection(HOST, self.port)

    def end(self) -> None:
        """Kill it if it runs, and remove its files. Does nothing the second time."""
        self.kill()
        self._port.free()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _arguments(self) -> list[str]:
        raise NotImplementedError

    def _answers(self) -> bool:
        assert self._process is not None
        code = self._process.poll()
        assert code is None, f"{self._program} has ended with {code}:\n{self.log()}"
        try:
            return bool(self.ask("PING") == b"PONG")
        except (OSError, ReplyError):  # not yet there, or loading
            return False

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._hang_up()
        self._process.send_signal(number)
        if self._is_paused:
            self.resume()
        try:
            self._process.wait(_HANG_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Valkey(Process):
    """One valkey-server.

    Args:
        append: fsync of its append-only file; empty: it keeps nothing, and a restart begins empty.
        maxmemory: bytes; 0: no limit. `policy` is what it does then.
        password: of the user `default`; empty: nobody is asked.
        tls: its certificate; it listens to TLS alone then. `ca` is the authority of the certificate, and of those of
            clients where `asks_clients`.
        options: words of further settings, as on its command line: ("--hz", "100").
    """

    def __init__(
        self,
        *,
        append: Append = "always",
        maxmemory: int = 0,
        policy: str = "noeviction",
        password: str = "",
        tls: Pair | None = None,
        ca: Path | None = None,
        asks_clients: bool = False,
        options: Sequence[str] = (),
    ) -> None:
        assert (tls is None) == (ca is None), "tls and ca go together"
        super().__init__("valkey-server")
        self._password = password
        self._ca = ca
        listen = ["--port", str(self.port)]
        if tls is not None:
            listen = ["--port", "0", "--tls-port", str(self.port)]
            listen += ["--tls-cert-file", str(tls.cert), "--tls-key-file", str(tls.key)]
            listen += ["--tls-ca-cert-file", str(ca), "--tls-auth-clients", "yes" if asks_clients else "no"]
        kept = ["--appendonly", "yes", "--appendfsync", append] if append else ["--appendonly", "no"]
        limits = ["--maxmemory", str(maxmemory), "--maxmemory-policy", policy]
        secret = ["--requirepass", password, "--primaryauth", password] if password else []
        self._options = [*listen, *kept, "--save", "", *limits, *secret, *options]

    def url(self, rest: str = "") -> str:
        """Its URL as `--store` takes it, without user and password: database 0, the `rest`, and a long time limit."""
        return patient(f"{'valkey' if self._ca is None else 'valkeys'}://{self.address}/0{rest}")

    def connect(self) -> Connection:
        """See `Process`."""
        return Connection(HOST, self.port, password=self._password, ca=self._ca)

    def info(self, section: str) -> dict[str, str]:
        """Its own report, by field."""
        return fields(self.ask("INFO", section))

    def role(self) -> str:
        """`master` or `slave`, as the protocol calls them."""
        return str(self.ask("ROLE")[0].decode())

    def follow(self, primary: Valkey) -> None:
        """Be a replica, and wait until it has all that the primary has."""
        self.ask("REPLICAOF", HOST, primary.port)
        until(self.follows, "it does not follow its primary", self.log)

    def follows(self) -> bool:
        """Whether it is a replica that has all that its primary had when it came."""
        return self.info("replication").get("master_link_status") == "up"

    def wait_for_replica(self) -> None:
        """Wait until its one replica has acknowledged all that it wrote."""

        def is_level() -> bool:
            info = self.info("replication")
            return f"offset={info['master_repl_offset']}," in info.get("slave0", "")

        until(is_level, "its replica does not acknowledge what it wrote", self.log)

    def _arguments(self) -> list[str]:
        fixed = [
            "--bind",
            HOST,
            "--dir",
            str(self.folder),
            "--daemonize",
            "no",
            "--repl-diskless-sync-delay",
            "0",
        ]
        return [*fixed, *self._options]


class Sentinel(Process):
    """One valkey-sentinel of a primary and its replicas."""

    def __init__(self, primary: Valkey, replicas: Sequence[Valkey], quorum: int, down_after_ms: int) -> None:
        super().__init__("valkey-sentinel")
        self.run_id = random.SystemRandom().randbytes(20).hex()
        self._primary = primary
        self._replicas = replicas
        self._quorum = quorum
        self._down_after_ms = down_after_ms

    def know(self, others: Sequence[Sentinel]) -> None:
        """Write its configuration, with who is there: it need not find them, which takes seconds."""
        lines = [
            f"port {self.port}",
            f"bind {HOST}",
            f"dir {self.folder}",
            f"sentinel myid {self.run_id}",
            f"sentinel monitor {NAME} {HOST} {self._primary.port} {self._quorum}",
            f"sentinel down-after-milliseconds {NAME} {self._down_after_ms}",
            f"sentinel failover-timeout {NAME} 5000",
            *(f"sentinel known-replica {NAME} {HOST} {one.port}" for one in self._replicas),
            *(f"sentinel known-sentinel {NAME} {HOST} {one.port} {one.run_id}" for one in others),
        ]
        (self.folder / "sentinel.conf").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """See `Process`."""
        super().start()
        # A machine on which it gets no time for two seconds would make it wait for thirty; replicas are asked often.
        self.ask("SENTINEL", "DEBUG", "tilt-trigger", 1000000, "info-period", 500, "publish-period", 500)

    def primary(self) -> tuple[str, int]:
        """Whom it takes for the primary."""
        host, port = self.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
        return host.decode(), int(port)

    def is_ready(self, others: int, replicas: int) -> bool:
        """Whether it knows this many other Sentinels and could fail over to this many replicas."""
        seen = by_name(self.ask("SENTINEL", "PRIMARY", NAME))
        able = [by_name(one) for one in self.ask("SENTINEL", "REPLICAS", NAME)]
        able = [one for one in able if one["flags"] == "slave" and one["master-link-status"] == "ok"]
        return (
            seen["flags"] == "master" and int(seen["num-other-sentinels"]) == others and len(able) == replicas
        )

    def _arguments(self) -> list[str]:
        return [str(self.folder / "sentinel.conf")]


class Sentinels:
    """A primary, replicas of it and Sentinels that make a replica the primary.

    Args:
        replicas, sentinels: how many.
        down_after_ms: how long the primary must be silent until they do it by themselves. It is long, as a busy machine
            can be silent too: a test says `fail_over`.
        options: of each valkey-server, see `Valkey`.
    """

    def __init__(
        self, *, replicas: int = 1, sentinels: int = 3, down_after_ms: int = 100_000, **options: Any
    ) -> None:
        self._stack = contextlib.ExitStack()
        self.servers = [Valkey(**options) for _ in range(1 + replicas)]
        """The first primary, and its first replicas."""
        first, *others = self.servers
        quorum = sentinels // 2 + 1
        self.sentinels = [Sentinel(first, others, quorum, down_after_ms) for _ in range(sentinels)]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for process in (*self.servers, *self.sentinels):
                stack.callback(process.end)
            first, *others = self.servers
            first.start()
            for one in others:
                one.start()
                one.follow(first)
            for sentinel in self.sentinels:
                sentinel.know([one for one in self.sentinels if one is not sentinel])
                sentinel.start()
            self.wait_ready(len(others))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def url(self, rest: str = "") -> str:
        """As `Valkey.url`; `rest` begins with an ampersand."""
        addresses = ",".join(one.address for one in self.sentinels)
        return f"valkey://{addresses}/0?sentinel={NAME}{rest}"

    def primary(self) -> Valkey:
        """Whom the Sentinels take for the primary."""
        port = self.sentinels[0].primary()[1]
        return next(one for one in self.servers if one.port == port)

    def wait_ready(self, replicas: int) -> None:
        """Wait until every Sentinel could fail over to this many replicas."""
        count = len(self.sentinels) - 1
        for one in self.sentinels:
            until(functools.partial(one.is_ready, count, replicas), "the Sentinels do not agree", one.log)

    def fail_over(self) -> Valkey:
        """Let the Sentinels replace the primary; return the new one, once all of them know it.

        They promote no replica that has been silent for some seconds, as on a busy machine.
        """
        old, one = self.primary(), self.sentinels[0]
        begun = functools.partial(_accepts, one, "NOGOODSLAVE", "SENTINEL", "FAILOVER", NAME)
        until(begun, "the Sentinels find no replica to promote", one.log)
        return self.wait_fail_over(old)

    def wait_fail_over(self, gone: Valkey) -> Valkey:
        """Wait until all Sentinels take another for the primary, and it is one; that one."""

        def is_over() -> bool:
            ports = {one.primary()[1] for one in self.sentinels}
            if gone.port in ports or len(ports) > 1:
                return False
            with self.primary().connect() as mine:  # those that are kept end with its being a replica
                return bool(mine.ask("ROLE")[0] == b"master")

        until(is_over, "nobody has taken over", self.sentinels[0].log)
        return self.primary()


class Cluster:
    """A Cluster of primaries that have the slots in equal parts, and replicas of each.

    Args:
        primaries: how many.
        replicas: of each primary.
        node_timeout_ms: how long a node must be silent to be taken for gone. It is long, as a busy machine can be silent
            too: a test says `fail_over`.
        options: of each valkey-server, see `Valkey`.
    """

    def __init__(
        self, *, primaries: int = 3, replicas: int = 0, node_timeout_ms: int = 15_000, **options: Any
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._buses = [Port() for _ in range(primaries * (1 + replicas))]
        extra = tuple(options.pop("options", ()))
        self.nodes = [
            Valkey(options=(*self._settings(bus, node_timeout_ms), *extra), **options) for bus in self._buses
        ]
        self.primaries = self.nodes[:primaries]
        """As they are at first."""
        self.replicas = self.nodes[primaries:]
        """The replica number i is of primary i modulo their count, at first."""

    @staticmethod
    def _settings(bus: Port, node_timeout_ms: int) -> tuple[str, ...]:
        enabled = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf")
        return (*enabled, "--cluster-port", str(bus.number), "--cluster-node-timeout", str(node_timeout_ms))

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for node, bus in zip(self.nodes, self._buses, strict=True):
                stack.callback(bus.free)
                stack.callback(node.end)
            for epoch, node in enumerate(self.nodes, 1):
                node.start()
                node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
            self._share_slots()
            self._meet()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def url(self, rest: str = "") -> str:
        """As `Valkey.url`; `rest` begins with an ampersand."""
        addresses = ",".join(one.address for one in self.primaries)
        return patient(f"valkey://{addresses}/0?cluster=true{rest}")

    def primary_of(self, key: str) -> Valkey:
        """The node that has a key now, as a node that is there says."""
        asked = next(one for one in self.nodes if one.is_running)
        slot = asked.ask("CLUSTER", "KEYSLOT", key)
        for first, last, primary, *_ in asked.ask("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return next(one for one in self.nodes if one.port == primary[1])
        raise AssertionError(f"nobody has slot {slot}")

    def fail_over(self, primary: Valkey) -> Valkey:
        """Let its replica replace a primary of the beginning, be it there or not; the new one, when all know."""
        new = self.replicas[self.primaries.index(primary)]
        new.ask("CLUSTER", "FAILOVER", "TAKEOVER")
        for node in self.nodes:
            if node is not primary and node.is_running:
                until(functools.partial(self._follows, node, primary, new), "it has no news", node.log)
        return new

    def begin_move(self, source: Valkey, target: Valkey, key: str) -> int:
        """Begin to move the slot of a key as `valkey-cli --cluster reshard` does; that slot."""
        slot = int(source.ask("CLUSTER", "KEYSLOT", key))
        self._set_slot(target, slot, "IMPORTING", source)
        self._set_slot(source, slot, "MIGRATING", target)
        return slot

    def end_move(self, source: Valkey, target: Valkey, slot: int) -> None:
        """Move the keys that are left, three at a time, and then the slot."""
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 3):
            migrate(source, target, *keys)
        for node in (target, source, *self.primaries):
            self._set_slot(node, slot, "NODE", target)

    def move_slot(self, source: Valkey, target: Valkey, key: str) -> None:
        """Move the slot of a key."""
        self.end_move(source, target, self.begin_move(source, target, key))

    @staticmethod
    def _set_slot(node: Valkey, slot: int, word: str, other: Valkey) -> None:
        """Set a slot's state. A node waits for its replicas two seconds: a busy machine or disk can take longer."""
        words = ("CLUSTER", "SETSLOT", slot, word, other.ask("CLUSTER", "MYID"))
        until(functools.partial(_accepts, node, "NOREPLICAS", *words), "no replica answers", node.log)

    def wait_ok(self) -> None:
        """Wait until every running node reports a healthy cluster."""
        for node in self.nodes:
            if node.is_running:
                until(functools.partial(self._is_ok, node), "the Cluster does not come up", node.log)

    def _share_slots(self) -> None:
        count = len(self.primaries)
        for i, node in enumerate(self.primaries):
            node.ask("CLUSTER", "ADDSLOTSRANGE", SLOTS * i // count, SLOTS * (i + 1) // count - 1)

    def _meet(self) -> None:
        first, *others = self.nodes
        for node, bus in zip(others, self._buses[1:], strict=True):
            first.ask("CLUSTER", "MEET", HOST, node.port, bus.number)
        for node in self.nodes:
            until(functools.partial(self._knows_all, node), "the nodes do not find each other", node.log)
        for i, node in enumerate(self.replicas):
            primary = self.primaries[i % len(self.primaries)]
            node.ask("CLUSTER", "REPLICATE", primary.ask("CLUSTER", "MYID"))
            until(node.follows, "it does not follow its primary", node.log)
        self.wait_ok()
        for node in self.nodes:
            until(functools.partial(_can_start_again, node), "the shards are not agreed upon", node.log)

    @staticmethod
    def _follows(node: Valkey, old: Valkey, new: Valkey) -> bool:
        ports = {part[2][1] for part in node.ask("CLUSTER", "SLOTS")}
        return new.port in ports and old.port not in ports

    def _knows_all(self, node: Valkey) -> bool:
        lines = node.ask("CLUSTER", "NODES").decode().splitlines()
        return len(lines) == len(self.nodes) and not any("handshake" in line for line in lines)

    @staticmethod
    def _is_ok(node: Valkey) -> bool:
        return fields(node.ask("CLUSTER", "INFO"))["cluster_state"] == "ok"


def patient(url: str) -> str:
    """A URL with a long time limit, unless it names one: a busy disk can take longer for a flush than the default."""
    return url if "timeout_ms=" in url else f"{url}{'&' if '?' in url else '?'}{_PATIENT}"


def migrate(source: Valkey, target: Valkey, *keys: bytes) -> None:
    """Move keys of a slot that is on the move."""
    source.ask("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)


def _can_start_again(node: Valkey) -> bool:
    """Its file has replicas in the shards of their primaries: else Valkey 8.1.1 takes it for damaged when it starts.

    That comes about a while after they have met: https://github.com/valkey-io/valkey/issues/774.
    """
    lines = [line.split() for line in (node.folder / "nodes.conf").read_text().splitlines()]
    shards = {words[0]: words[1].rpartition("shard-id=")[2] for words in lines if words[0] != "vars"}
    followed = [(words[0], words[3]) for words in lines if words[0] != "vars" and words[3] != "-"]
    return all(shards[replica] == shards.get(primary) for replica, primary in followed)


def until(condition: Callable[[], bool], otherwise: str, log: Callable[[], str]) -> None:
    """Wait for what another process does by itself, of which nobody is told; fail with its log if it does not."""
    never = threading.Event()
    end_s = time.monotonic() + _HANG_S
    pause_s = 0.005
    while not condition():
        assert time.monotonic() < end_s, f"{otherwise}:\n{log()}"
        never.wait(pause_s)
        pause_s = min(2 * pause_s, 0.05)


def _accepts(process: Process, refusal: str, *words: Any) -> bool:
    """Give a command; False if it is refused for this reason."""
    try:
        process.ask(*words)
    except ReplyError as error:
        if not str(error).startswith(refusal):
            raise
        return False
    return True


@contextlib.contextmanager
def paused(process: Process) -> Iterator[None]:
    """Let a process do nothing within the block."""
    process.pause()
    try:
        yield
    finally:
        process.resume()
