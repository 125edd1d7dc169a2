"""The bare server of `front_prototype`: built, started and loaded like the real one."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import harness, loads
from bench.harness import HERE, MODELS, OUT, ROOT, Result

sys.path.append(str(ROOT / "server" / "front" / "backend"))
import front_cargo

CannotBuild = front_cargo.CannotBuild
SOURCES = HERE / "front_prototype"
SESSIONS = 1024
_BUILD_S = 600.0


@dataclass(frozen=True)
class BareServer:
    """A bare server that runs."""

    address: str
    pid: int
    process: subprocess.Popen[str]

    def steps_and_passes(self) -> tuple[int, int]:
        """How many it has made so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        steps, passes = self.process.stdout.readline().split()
        return int(steps), int(passes)


def library() -> Path:
    """The compiled module of the bare wire, built from copies of its sources if they have changed.

    Raises:
        CannotBuild: There is no cargo, or it has no crates, or it fails.
    """
    folder = OUT / "front_prototype"
    built = folder / "target" / "release" / "libbare_front.so"
    changed = [path for path in _sources() if not _is_copied(path, folder)]
    if built.exists() and not changed:
        return built
    built.unlink(missing_ok=True)
    for path in changed:
        copy = folder / path.relative_to(SOURCES)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    cargo = front_cargo.working_cargo(folder)
    front_cargo.find_crates(cargo, folder)
    print("building the bare server (Rust; about a minute)", file=sys.stderr, flush=True)
    done = subprocess.run(
        [cargo, "build", "--release", "--quiet"],
        cwd=folder, capture_output=True, text=True, timeout=_BUILD_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise CannotBuild(f"cargo failed:\n{done.stderr[-3000:]}")
    return built


def _sources() -> list[Path]:
    return [SOURCES / "Cargo.toml", *sorted((SOURCES / "src").glob("*.rs"))]


def _is_copied(path: Path, folder: Path) -> bool:
    copy = folder / path.relative_to(SOURCES)
    return copy.exists() and copy.read_bytes() == path.read_bytes()


@contextlib.contextmanager
def serve(program: Path) -> Iterator[BareServer]:
    """A bare server of a compiled program, with its sessions in memory."""
    arguments = (str(library()), str(program), str(SESSIONS))
    with harness.started(str(SOURCES / "engine.py"), *arguments) as (process, address):
        yield BareServer(address, process.pid, process)


def singly(server: BareServer, model: str, kind: str, sessions: int, times: loads.Times) -> Result:
    """Sessions of a bare server, each stepped by itself, as `loads.singly` does it."""
    ids = [f"s{number}" for number in range(sessions)]
    method, requests = loads.step_requests(kind, ids, MODELS[model][1])
    return loads.generate(server.address, method, kind, requests, times)
