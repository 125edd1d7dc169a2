"""The two servers, and what is done to both of them, one call after the other."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from against.builds import Build
from against.differences import Exchange, Place, Report
from against.player import Player, Specs
from against.programs import Program, Step
from stepwell.testing import LocalServer
from stepwell.v1 import models_pb2
from support.peers.wire import TIMEOUT_S, Wire

START_TIMEOUT_S = 400.0
"""A server compiles its models in this time."""
STOP_TIMEOUT_S = 100.0
_DEFECT = re.compile(r"^\S+ (error|critical) |^Traceback|panicked at|internal error", re.MULTILINE)
_Make = Callable[[Player], list[Exchange]]


class BuiltServer(LocalServer):
    """The server of a build."""

    def __init__(
        self, build: Build, models: Mapping[str, Path], data_dir: Path | None, cache_dir: Path, *options: str
    ) -> None:
        super().__init__(models, data_dir, options, cache_dir=cache_dir, start_timeout_s=START_TIMEOUT_S)
        self._build = build

    def _command(self) -> list[str]:
        _, *arguments = super()._command()
        return [
            str(self._build.python),
            "-I",
            *arguments,
        ]  # neither this folder nor PYTHONPATH has its modules


class Pair:
    """The servers of the base and of the tree, started with the same options."""

    def __init__(
        self,
        label: str,
        base: LocalServer,
        tree: LocalServer,
        report: Report,
        seed: int,
        files: Sequence[Path] = (),
    ) -> None:
        """`files`: see `Player`."""
        self.label = label
        self._files = files
        self.servers: Sequence[LocalServer] = (base, tree)
        self._report = report
        self._seed = seed
        self._wires: list[Wire] = []
        self._specs: Specs = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for server in self.servers:
            self._stack.enter_context(server)
        self._connect()
        listed = self._wires[0].models.ListModels(models_pb2.ListModelsRequest(), timeout=TIMEOUT_S)
        self._specs = {model.name: model for model in listed.models}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disconnect()
        if kind is None:
            for name, server in self._named():
                if server.pid is not None and server.stop(STOP_TIMEOUT_S):
                    self.note(f"the {name} did not stop as it should")
            self.look("at the end")
        self._stack.close()

    def play(self, program: Program) -> bool:
        """Play a program at both. Ends where `Report.compare` says so; returns whether it was played to its end."""
        players = [Player(wire, self._specs, program, self._seed, self._files) for wire in self._wires]
        name = f"program {program.number} of {program.model}"
        steps: list[tuple[int, _Make]] = [(-1, Player.begin)]
        steps += [(number, functools.partial(_do, step)) for number, step in enumerate(program.steps)]
        steps += [(len(program.steps), Player.finish)]
        for number, make in steps:
            if number == program.restart_at:
                if not self._compare(name, number, [player.before_restart() for player in players]):
                    break
                self.restart(is_killed=program.is_killed)
                both = [player.after_restart(wire) for player, wire in zip(players, self._wires, strict=True)]
                if not self._compare(name, number, both):
                    break
            if not self._compare(name, number, [make(player) for player in players]):
                break
        else:
            return True
        for player in players:  # the next program is to find nothing of it
            player.finish()
        self.revive()
        return False

    def restart(self, *, is_killed: bool) -> None:
        """Both servers begin anew on the data that they have, on the same ports."""
        self._disconnect()
        self.look("before a restart")
        for server in self.servers:
            if is_killed and server.pid is not None:
                server.kill()
            server.restart()
        self._connect()

    def revive(self) -> None:
        """Note a server that has ended, and start both anew."""
        ended = [name for name, server in self._named() if server.pid is None]
        if ended:
            self.note(f"the process of the {' and of the '.join(ended)} has ended")
            self.restart(is_killed=False)

    def look(self, when: str) -> None:
        """Note a server that has logged a defect."""
        for name, server in self._named():
            if found := _DEFECT.search(server.logs()):
                line = server.logs()[found.start() :].strip().splitlines()[0]
                self.note(f"the {name} logged a defect {when}: {line}")

    def _named(self) -> Iterator[tuple[str, LocalServer]]:
        return zip(("base", "tree"), self.servers, strict=True)

    def note(self, what: str) -> None:
        self._report.notes.append(f"{self.label}: {what}")

    def compare(self, name: str, number: int, base: Exchange, tree: Exchange) -> bool:
        """Hold the answers of both to one call against each other."""
        return self._report.compare(Place(self.label, name, number), base, tree)

    def _compare(self, name: str, number: int, both: Sequence[Sequence[Exchange]]) -> bool:
        base, tree = both
        for one, two in zip(base, tree, strict=False):
            if not self.compare(name, number, one, two):
                return False
        if len(base) != len(tree):  # the answers that decide about calls are equal, so it cannot be
            self.note(f"{name}, step {number}: {len(base)} calls of the base, {len(tree)} of the tree")
        return len(base) == len(tree)

    def _connect(self) -> None:
        self._wires = [Wire(server.address) for server in self.servers]

    def _disconnect(self) -> None:
        for wire in self._wires:
            wire.channel.close()
        self._wires = []


def _do(step: Step, player: Player) -> list[Exchange]:
    return player.do(step)


def progress(items: Sequence[Program], say: Callable[[str], object], what: str) -> Iterator[Program]:
    """The items, with a line for each tenth of them."""
    for number, item in enumerate(items):
        if number % max(1, len(items) // 10) == 0:
            say(f"{what}: program {number} of {len(items)}")
        yield item
