"""The long version of the fault tests of versions: `make soak` runs it with 200 kills and 1,000 reloads.

Servers are killed at random moments while their sessions are carried to and fro, and one server's model is reloaded
again and again: what it takes in the end is shown beside what it took before.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

from support.load.moving_defaults import MovingDefaults
from support.load.reloads import reload
from support.servers.fault_servers import local

KILLS_A_ROUND = 20
_MEGABYTE = 1 << 20


def kill(wanted: int, seed: int) -> None:
    """Kill servers so often; half of them wait for the disk."""
    chance, began_s = random.Random(seed), time.monotonic()
    kills = moved = steps = mixed = 0
    while kills < wanted:
        durability = ["sync", "async"][kills // KILLS_A_ROUND % 2]
        rows = chance.choice(["900", "65536"])
        with tempfile.TemporaryDirectory(prefix="stepwell-soak-") as folder:
            options = ("--durability", durability, "--resident-rows", rows)
            with (
                local(Path(folder) / "data", *options) as server,
                MovingDefaults(server, chance.getrandbits(31), busy=900, idle=100) as carrying,
            ):
                for _ in range(min(KILLS_A_ROUND, wanted - kills)):
                    carrying.kill()
                    kills += 1
                carrying.finish()
        moved, steps, mixed = moved + carrying.moved, steps + carrying.steps, mixed + carrying.mixed
        print(
            f"{time.monotonic() - began_s:6.0f} s  kills within carries {kills}/{wanted}, carries acknowledged {moved},"
            f" frames of 900 sessions answered {steps} ({mixed} by two versions, around a kill), lost 0, twice 0, wrong 0",
            flush=True,
        )


def reloads(wanted: int, seed: int) -> None:
    """Reload the model of one server so often."""
    with tempfile.TemporaryDirectory(prefix="stepwell-soak-") as folder:
        found = reload(Path(folder), wanted, seed)
    for each in found.taken:
        print(
            f"        {each.rss_bytes / _MEGABYTE:.0f} MiB, {each.threads} threads, {each.descriptors} descriptors,"
            f" {each.temporary} temporary files, {each.cached} files in the cache"
        )
    print(
        f"{found.seconds:6.0f} s  {wanted} reloads: memory grew by {found.first_growth_bytes / _MEGABYTE:.1f} MiB in the"
        f" first half and by {found.growth_bytes / _MEGABYTE:.1f} MiB in the second",
        flush=True,
    )
    found.require_level()


def main() -> int:
    """Read the arguments and go."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--reloads", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    if arguments.kills:
        kill(arguments.kills, arguments.seed)
    if arguments.reloads:
        reloads(arguments.reloads, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
