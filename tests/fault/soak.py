"""The long version of the fault tests: `make soak ARGS="--kills 1000 --seed 7 --lanes 2"`.

Each lane has a server, a data directory and a driver of its own, and goes through rounds of some kills: in each the
durability, the room for resident sessions, the segments' size, good or bad connections and whether clients die too
are drawn. Most kills come at a random moment under load, some while the server is starting, and now and then it is a
SIGTERM. After each round the checker replays the history. What is found wrong is kept, with the seed to find it again. With
`STEPWELL_TEST_SECURED=1` the servers speak TLS and know who calls.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

from stepwell.testing import LocalServer, ServerStartError
from support import secured
from support.checks.checker import Report
from support.load.driver_process import DriverProcess
from support.load.random_kills import kill_at_random
from support.peers.proxy import Fate, Proxy
from support.servers.fault_servers import SMALL_BYTES, local, verdict
from support.servers.server_process import forecast

KILLS_A_ROUND = 20
BAD: tuple[Fate, ...] = ("clean", "clean", "drop", "truncate", "delay", "double")
_LONGEST_START_S = 0.8


@dataclasses.dataclass
class Total:
    """What was done so far, by all lanes."""

    wanted: int
    kills: int = 0
    starts_killed: int = 0
    stops: int = 0
    clients_killed: int = 0
    acknowledged: int = 0
    unknown: int = 0
    lost: int = 0
    twice: int = 0
    wrong: int = 0

    def add(self, report: Report) -> None:
        self.acknowledged += report.acknowledged
        self.unknown += report.unknown
        self.lost += report.count("lost") + report.count("gone")
        self.twice += report.count("twice")
        self.wrong += report.count("wrong") + report.count("error")

    def __str__(self) -> str:
        return (
            f"kills {self.kills}/{self.wanted} ({self.starts_killed} while starting), SIGTERMs {self.stops},"
            f" clients killed {self.clients_killed}, changes acknowledged {self.acknowledged} (and"
            f" {self.unknown} of unknown outcome), lost {self.lost}, twice {self.twice}, wrong {self.wrong}"
        )


@dataclasses.dataclass(frozen=True)
class Weather:
    """What is drawn for a round."""

    durability: str
    resident_rows: int
    bad_connections: bool
    clients_die: bool
    segment_bytes: int | None

    @classmethod
    def draw(cls, chance: random.Random) -> Weather:
        return cls(
            chance.choice(["sync", "async"]),
            chance.choice([16, 65536]),
            chance.random() < 0.3,
            chance.random() < 0.3,
            chance.choice([SMALL_BYTES, None]),
        )


class Round:
    """One server, its clients and some kills."""

    def __init__(self, seed: int, number: int, folder: Path, total: Total, fixed: dict[str, Any]) -> None:
        self._chance = random.Random(f"{seed}/{number}")
        self._number = number
        self._total = total
        self._weather = dataclasses.replace(Weather.draw(self._chance), **fixed)
        self.folder = folder / str(number)
        self._history = self.folder / "history"

    def run(self, kills: int) -> Report:
        """Go through it; the report says what the checker found."""
        self.folder.mkdir()
        weather = self._weather
        options = ("--durability", weather.durability, "--resident-rows", str(weather.resident_rows))
        server = local(self.folder / "data", *options, segment_bytes=weather.segment_bytes)
        with server, self._way_to(server) as address:
            driver = self._driver(address)
            try:
                for _ in range(kills):
                    self._kill(server, driver)
                    if weather.clients_die and self._chance.random() < 0.3:
                        driver.kill()
                        self._total.clients_killed += 1
                        driver = self._driver(address)
                driver.stop()
            finally:
                driver.kill()
                (self.folder / "log").write_text(server.logs())
        return verdict(self._history)

    @contextlib.contextmanager
    def _way_to(self, server: LocalServer) -> Iterator[str]:
        if not self._weather.bad_connections:
            yield server.address
            return
        with Proxy(server.address, self._chance.getrandbits(32), BAD) as proxy:
            yield proxy.address

    def _driver(self, address: str) -> DriverProcess:
        return DriverProcess(address, self._history, self._chance.getrandbits(31), pause_s=0.02)

    def _kill(self, server: LocalServer, driver: DriverProcess) -> None:
        dice = self._chance.random()
        if dice < 0.1:
            driver.wait_acknowledged(self._chance.randrange(50))
            assert server.stop() == 0, server.logs()
            self._total.stops += 1
        if dice < 0.2:
            self._kill_a_start(server)
        else:
            kill_at_random(server, driver, self._chance, kills=1)
        self._total.kills += 1

    def _kill_a_start(self, server: LocalServer) -> None:
        """Kill it while it starts, or right after."""
        if server.pid is not None:
            server.kill()
        moment_s = self._chance.uniform(0.0, _LONGEST_START_S)
        killer = threading.Timer(
            moment_s, lambda: os.kill(server.pid or 0, signal.SIGKILL) if server.pid else None
        )
        killer.start()
        with contextlib.suppress(ServerStartError):
            server.start()
        killer.join()
        self._total.starts_killed += 1
        if server.pid is not None:
            server.kill()
        server.start()

    def __str__(self) -> str:
        return f"round {self._number}, kept in {self.folder}: {self._weather}"


def soak(wanted: int, seed: int, lanes: int, fixed: dict[str, Any]) -> int:
    """Run all rounds, with what is fixed of the weather. Returns the exit code."""
    total, began_s = Total(wanted), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="stepwell-soak-"))
    print(f"seed {seed}, {lanes} lanes, what is found wrong is kept in {folder}", flush=True)
    sizes = [min(KILLS_A_ROUND, wanted - done) for done in range(0, wanted, KILLS_A_ROUND)]
    failed = False
    forecast()  # made once, before there are lanes
    with ThreadPoolExecutor(lanes) as pool:
        rounds = [Round(seed, number, folder, total, fixed) for number in range(len(sizes))]
        going = {pool.submit(one.run, kills): one for one, kills in zip(rounds, sizes, strict=True)}
        for done in as_completed(going):
            one, wrong = going[done], ""
            try:
                report = done.result()
            except (AssertionError, ServerStartError) as error:
                wrong = f"it broke off: {error}"
            else:
                total.add(report)
                wrong = "\n".join(str(found) for found in report.violations[:10])
            print(f"{time.monotonic() - began_s:6.0f} s  {total}", flush=True)
            if wrong:
                failed = True
                print(f"{one}\n{wrong}", flush=True)
            else:
                shutil.rmtree(one.folder)
    if not failed:
        folder.rmdir()
    return int(failed)


def main() -> int:
    """Read the arguments and go."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--lanes", type=int, default=2, help="servers at a time")
    parser.add_argument(
        "--segment-bytes", type=int, help="of each server's segments; they are drawn unless given"
    )
    arguments = parser.parse_args()
    if secured.is_on():
        secured.switch_on()
    fixed = {"segment_bytes": arguments.segment_bytes} if arguments.segment_bytes else {}
    return soak(arguments.kills, arguments.seed, arguments.lanes, fixed)


if __name__ == "__main__":
    sys.exit(main())
