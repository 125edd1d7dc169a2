"""The long version of `test_mixture`: `python tests/fault/soak_mixture.py --seconds 60 --seed 7`.

A server is called by the mixture of `support.load.mixture`. Other options go to the server, for example
`--resident-rows 100` or `--max-batch-rows 8`. With `STEPWELL_TEST_SECURED=1` it speaks TLS and knows its caller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).resolve().parent.parent))

from click.testing import CliRunner

from stepwell.cli import main as stepwell
from support import secured
from support.checks.mixture_replay import CARRIED
from support.load.mixture import Mixture
from support.models import mixture_models, programs
from support.secured import Server

START_TIMEOUT_S = 100.0
_DEFECT = re.compile(r"^\S+ (error|critical) |^Traceback|panicked at", re.MULTILINE)


def play(
    seed: int,
    seconds: float,
    tasks: int = 64,
    sessions: int = 60,
    *,
    extra: Sequence[str] = (),
    tenants: int = 0,
    models: Sequence[str] = (mixture_models.WIDE, *mixture_models.OF_ZOO),
) -> Sequence[Mixture]:
    """Start a server, play, judge, and stop it.

    With `tenants`, each has a mixture of its own with the same session ids. Only a caller who may do everything moves
    defaults and loads versions.
    """
    files = mixture_models.files(models)
    may_admin = not tenants and not secured.is_on()
    second = files[f"{CARRIED}@2"] if may_admin else None
    with tempfile.TemporaryDirectory(prefix="stepwell-mixture-") as folder:
        tokens = Path(folder, "callers.tokens")
        names = [f"tenant-{number}" for number in range(tenants)]
        callers = [_new_token(tokens, name) for name in names] if tenants else [None]
        options = ["--log-level", "warning", *extra, *(["--auth-tokens", str(tokens)] if tenants else [])]
        server = Server(
            files, extra_args=options, cache_dir=programs.cache_dir(), start_timeout_s=START_TIMEOUT_S
        )
        with server:
            mixtures = [
                Mixture(server.address, seed + number, tasks, sessions, token=token, second=second)
                for number, token in enumerate(callers)
            ]
            asyncio.run(_run(mixtures, seconds))
            ended, log = server.stop(), server.logs()
        if ended or _DEFECT.search(log):
            mixtures[0].wrong.append(f"the server ended with {ended}: {log[-3000:]}")
    return mixtures


async def _run(mixtures: Sequence[Mixture], seconds: float) -> None:
    await asyncio.gather(*[mixture.run(seconds) for mixture in mixtures])


def _new_token(file: Path, name: str) -> str:
    arguments = ["tokens", "add", name, "--tenant", name, "--file", str(file), "--json"]
    added = CliRunner().invoke(stepwell, arguments, catch_exceptions=False)
    token: str = json.loads(added.stdout)["token"]
    return token


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument("--tenants", type=int, default=0, help="callers with tokens (default: none)")
    options, extra = parser.parse_known_args(arguments)
    mixtures = play(
        options.seed, options.seconds, options.tasks, options.sessions, extra=extra, tenants=options.tenants
    )
    for mixture in mixtures:
        print(
            f"seed {options.seed}:", ", ".join(f"{n:,} {name}" for name, n in sorted(mixture.counts.items()))
        )
        for wrong in mixture.wrong:
            print("WRONG", wrong)
    return int(any(mixture.wrong for mixture in mixtures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
