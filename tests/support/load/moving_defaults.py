"""Sessions that are stepped while the default of their model moves and the server is killed, and what must be true of them.

One thread steps a group in frames, one moves the default to and fro with CARRY, and the test's kills the server. What
was answered is held against two histories of each session, one for each version that a step may have run on: the
weights are such that outputs tell them apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt

import stepwell
from stepwell.testing import LocalServer
from stepwell.v1 import models_pb2 as pb
from stepwell.v1 import models_pb2_grpc
from support import secured
from support.checks.replay import TOLERANCE, LstmDense, LstmState
from support.load.driver import FEATURES, MODEL
from support.servers.server_process import forecast, retrained

Floats = npt.NDArray[np.floating[Any]]
PATIENCE_S = 200.0
_CARRY = pb.SESSION_POLICY_CARRY


class Admin:
    """Loads versions and moves the default, over any number of restarts."""

    def __init__(self, address: str) -> None:
        self._channel = secured.channel(address)
        self._models = models_pb2_grpc.ModelServiceStub(self._channel)
        self._admin = models_pb2_grpc.ModelAdminServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def load(self, path: Any, *, version: int = 0, keep_default: bool = False, **fields: Any) -> int:
        """Load a file; returns the number of the version."""
        request = pb.LoadModelRequest(
            name=MODEL, version=version, path=str(path), keep_default=keep_default, **fields
        )
        *_, last = self._admin.LoadModel(request, timeout=PATIENCE_S, wait_for_ready=True)
        return int(last.version)

    def unload(self, version: int, *, force: bool = False) -> None:
        request = pb.UnloadModelRequest(name=MODEL, version=version, force=force)
        self._admin.UnloadModel(request, timeout=PATIENCE_S)

    def wait_alone(self, version: int) -> None:
        """Return when no other version is there."""
        while [each.version for each in self._model().versions] != [version]:
            threading.Event().wait(0.002)

    def _model(self) -> pb.Model:
        request = pb.GetModelRequest(name=MODEL)
        model: pb.Model = self._models.GetModel(request, timeout=PATIENCE_S, wait_for_ready=True).model
        return model

    def default(self) -> int:
        """The version that the name stands for."""
        return int(self._model().version)

    def move(self, version: int) -> bool:
        """Carry all sessions to a version; False: the server was away before it answered."""
        request = pb.SetDefaultRequest(name=MODEL, version=version, sessions=_CARRY)
        try:
            self._admin.SetDefault(request, timeout=PATIENCE_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True


@dataclasses.dataclass
class Move:
    """A change of the default: between which moments it happened, if it did."""

    began: int
    target: int
    ended: int | None = None


class Moments:
    """A clock that shows in which order things began and ended, to several threads."""

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self._lock = threading.Lock()
        self.moves: list[Move] = []
        self.kills: list[int] = []

    def now(self) -> int:
        with self._lock:
            return next(self._count)

    def killed_between(self, began: int, ended: int) -> bool:
        return any(began < kill < ended for kill in self.kills)

    def defaults_between(self, began: int, ended: int) -> set[int]:
        """What the default may have been between two moments: a move that was never answered may have happened."""
        found = {1}
        for move in list(self.moves):
            if move.began > ended:
                break
            is_over = move.ended is not None and move.ended < began
            found = {move.target} if is_over else found | {move.target}
        return found


class Reference:
    """Sessions of one row each, as they must be."""

    def __init__(self, models: dict[int, LstmDense], count: int) -> None:
        self.models = models
        self.state = models[1].initial(count)
        self.ran: npt.NDArray[np.int64] = np.zeros(count, np.int64)
        """The version that each session's last step ran on."""

    def step(self, x: Floats, y: Floats) -> npt.NDArray[np.int64]:
        """Take a step on whichever version gives what was answered; returns the version of each row.

        Raises:
            AssertionError: a row is what neither gives.
        """
        ways = {version: model.step(self.state, x) for version, model in self.models.items()}
        fits = {version: np.abs(out - y).max(axis=1) < TOLERANCE for version, (out, _) in ways.items()}
        known = np.sum(list(fits.values()), axis=0)
        assert (known == 1).all(), (
            f"sessions {np.flatnonzero(known != 1)[:5]} answered what no version gives, or what several give"
        )
        self.ran = np.select(list(fits.values()), list(fits), 0)
        h, c = (
            np.select([fit[:, None] for fit in fits.values()], [getattr(s, name) for _, s in ways.values()])
            for name in ("h", "c")
        )
        self.state = LstmState(h, c, self.state.position + 1)
        return self.ran


class MovingDefaults:
    """The sessions and the thread that moves them. Its threads end with the block."""

    def __init__(self, server: LocalServer, seed: int, *, busy: int, idle: int) -> None:
        self._server = server
        self._chance = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self.moments = Moments()
        self.moving = threading.Event()
        """Set while a move is under way."""
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self.steps = self.moved = 0
        self.mixed = 0
        """Frames whose members ran on several versions: some were answered again after a kill."""
        self.admin = Admin(server.address)
        models = {1: LstmDense.load(forecast().path), 2: LstmDense.load(retrained().path)}
        assert self.admin.load(retrained().path, version=2, keep_default=True) == 2
        self._client = stepwell.connect(server.address, timeout_s=PATIENCE_S)
        self._groups = [self._client.open_sessions(MODEL, count) for count in (busy, idle)]
        self._references = [Reference(models, count) for count in (busy, idle)]
        self._step(1)
        self._threads = [
            threading.Thread(target=self._guarded, args=(each,))
            for each in (self._keep_stepping, self._keep_moving)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()
        self.admin.close()

    def kill(self) -> None:
        """Kill the server within a move, or soon after, when others were answered and frames too; and start it again."""
        self.wait(moves=self._chance.randrange(4), frames=self._chance.randrange(1, 6))
        assert self.moving.wait(PATIENCE_S), "no move has begun"
        threading.Event().wait(self._chance.uniform(0, 0.04))
        # noted before and behind: what began before may have been answered by either server
        self.moments.kills.append(self.moments.now())
        assert self._server.kill() == -9, f"the server had ended by itself:\n{self._server.logs()}"
        self.moments.kills.append(self.moments.now())
        self._server.restart()
        self.raise_errors()

    def raise_errors(self) -> None:
        """Raise what went wrong in a thread."""
        if self._errors:
            raise AssertionError(f"{self._errors[0]}\n{self._server.logs()[-3000:]}") from self._errors[0]

    def wait(self, *, moves: int, frames: int) -> None:
        """Return when this many more of them are answered."""
        moves, frames = self.moved + moves, self.steps + frames
        while self.moved < moves or self.steps < frames:
            self.raise_errors()
            threading.Event().wait(0.001)

    def finish(self) -> None:
        """Stop, and look at every session: revision, position, state, version, and that a step goes on from there."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.raise_errors()
        default = self.admin.default()
        for group, reference in zip(self._groups, self._references, strict=True):
            group.refresh()
            assert set(group.revisions.tolist()) == {reference.state.position}, (
                "steps are lost or were made twice"
            )
            assert set(group.positions.tolist()) == {reference.state.position}
            read = group.get_states()
            for name, right in reference.state.named().items():
                assert np.abs(np.asarray(read[name]) - right).max() < TOLERANCE
        for place in range(2):
            assert set(self._step(place).tolist()) == {default}

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)

    def _keep_stepping(self) -> None:
        while not self._stop.is_set():
            self._step(0)

    def _step(self, place: int) -> npt.NDArray[np.int64]:
        group, reference, moments = self._groups[place], self._references[place], self.moments
        x = self._numbers.standard_normal((len(group), FEATURES)).astype(np.float32)
        began = moments.now()
        y = np.asarray(group.step(x))
        ended = moments.now()
        ran = reference.step(x, y)
        self.steps += place == 0
        if moments.killed_between(began, ended):  # some may have been answered again, on whichever they ran
            self.mixed += len(set(ran.tolist())) > 1
        else:
            assert len(set(ran.tolist())) == 1, "a carry took place within a frame"
            assert (np.asarray(group.model_versions) == ran).all(), (
                "a step ran on another version than it says"
            )
        possible = moments.defaults_between(began, ended)
        assert set(ran.tolist()) <= possible, (
            f"sessions of group {place} ran on {set(ran.tolist())}, the default was {possible} and is {self.admin.default()};"
            f" step {reference.state.position} between {began} and {ended}, kills {moments.kills[-4:]}, moves {moments.moves[-4:]}"
        )
        return ran

    def _keep_moving(self) -> None:
        target = 2
        while not self._stop.is_set():
            move = Move(self.moments.now(), target)
            self.moments.moves.append(move)
            self.moving.set()
            is_known = self.admin.move(target)
            self.moving.clear()
            if is_known:
                move.ended = self.moments.now()
                self.moved += 1
                target = 3 - target
            threading.Event().wait(self._chance.uniform(0, 0.02))
