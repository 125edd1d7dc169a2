"""A real server of a few small models of the zoo, and the watch that nothing but the asked-for happens on it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import stepwell
from stepwell.v1 import sessions_pb2
from support.models import programs, zoo
from support.peers import wire
from support.peers.wire import Array, Tensors, Wire
from support.secured import Server

#: Zoo model by the name it is served under.
MODELS = {
    "gru": "gru_reset_after",
    "last": "lstm_last_only",
    "masked": "masking",
    "multi": "several_inputs_and_outputs",
    "seq": "lstm_dense",
    "tokens": "embedding_mask_zero",
}
#: Rows of the Embedding of `tokens` and `multi`: indexes are 0 to 8.
VOCABULARY = 9
MAX_MESSAGE_BYTES = 4 << 20


@functools.cache
def keras_model(name: str) -> Any:
    """The Keras model that is served under a name."""
    return zoo.build(MODELS[name])


def local_server(*names: str, **options: Any) -> Server:
    """A server of some of the models, or of all; it finds their programs in its cache."""
    found = {name: programs.saved(MODELS[name]) for name in names or MODELS}
    paths = {name: one.path for name, one in found.items()}
    return Server(models=paths, cache_dir=programs.cache_dir(), start_timeout_s=100, **options)


@dataclasses.dataclass(frozen=True)
class Served:
    """The server, with a client of each kind."""

    server: Server
    wire: Wire
    client: stepwell.Client

    @property
    def address(self) -> str:
        return self.server.address

    @functools.cached_property
    def front(self) -> str:
        """Which front it has."""
        return self.client.server_info().front

    @functools.cached_property
    def infos(self) -> Mapping[str, stepwell.ModelInfo]:
        return {info.name: info for info in self.client.models()}

    def draw(self, model: str, rows: int, steps: int = 0, seed: int | None = None) -> dict[str, Array]:
        """Random inputs by name: of one time step without a time axis, or of `steps` with one."""
        rng = np.random.default_rng(seed)
        drawn: dict[str, Array] = {}
        for spec in self.infos[model].inputs:
            shape = (rows, *((steps,) if spec.temporal and steps else ()), *spec.shape)
            integral = np.issubdtype(np.dtype(spec.dtype), np.integer)
            values = rng.integers(0, VOCABULARY, shape) if integral else rng.standard_normal(shape)
            drawn[spec.name] = values.astype(spec.dtype)
        return drawn

    @contextlib.contextmanager
    def session(self, model: str, batch_size: int = 1, steps: int = 3) -> Iterator[str]:
        """A session that has a past: a state that is not the model's initial one."""
        session_id = self.wire.open(model, batch_size=batch_size)
        try:
            if steps:
                self.wire.step(session_id, wire.tensors(self.draw(model, batch_size, steps)), request_id=7)
            yield session_id
        finally:
            self.wire.close(session_id)

    def predicted(self, session_id: str, inputs: Mapping[str, Array]) -> Tensors:
        """What the session's next step must answer: the outputs of a run from its state."""
        read = self.wire.state(session_id)
        return self.wire.predict(read.session.model, wire.tensors(inputs), read.state).outputs

    @contextlib.contextmanager
    def nothing_changes(self, *session_ids: str) -> Iterator[None]:
        """Inside the block nothing happens to these sessions, nor to a neighbour of each one's model.

        State, revision and position are compared bit for bit; then each session and each neighbour is
        stepped, and must answer what was known before.
        """
        with contextlib.ExitStack() as stack:
            kinds = sorted({self.wire.session(one).model for one in session_ids}) or ["seq"]
            neighbours = [stack.enter_context(self.session(kind)) for kind in kinds]
            watched = [_Watched(self, one) for one in (*session_ids, *neighbours)]
            yield
            for one in watched:
                one.check()


class _Watched:
    def __init__(self, served: Served, session_id: str) -> None:
        self._served = served
        self._id = session_id
        self._before = served.wire.state(session_id)
        session = self._before.session
        self._next = served.draw(session.model, session.batch_size)
        self._known = wire.data(served.predicted(session_id, self._next))

    def check(self) -> None:
        after = self._served.wire.state(self._id)
        assert facts(after.session) == facts(self._before.session)
        assert wire.data(after.state) == wire.data(self._before.state), "the state has changed"
        session = self._before.session
        answer = self._served.wire.step(
            self._id,
            wire.tensors(self._next),
            expected_revision=session.revision,
            request_id=random.getrandbits(64) or 1,
        )
        assert wire.data(answer.outputs) == self._known, "the next output has changed"
        assert (answer.revision, answer.position) == (session.revision + 1, session.position + 1)


def facts(session: sessions_pb2.Session) -> tuple[object, ...]:
    """All of a session but the time of its last use."""
    return (
        session.session_id,
        session.model,
        session.model_fingerprint,
        session.batch_size,
        session.revision,
        session.position,
        session.created_time.ToNanoseconds(),
    )


@contextlib.contextmanager
def serve(*options: str) -> Iterator[Served]:
    """Serve all models."""
    local = local_server(extra_args=["--max-message-bytes", str(MAX_MESSAGE_BYTES), *options])
    with local, Wire(local.address) as raw, stepwell.connect(local.address) as client:
        yield Served(local, raw, client)
        assert "internal error" not in local.logs(), "a defect was reported to some caller; see the log"


def draw(rows: int, steps: int = 0) -> Any:
    """Return random inputs for the models that have three features."""
    rng = np.random.default_rng()
    return rng.standard_normal((rows, steps, 3) if steps else (rows, 3)).astype(np.float32)
