"""Requests that a front has read by itself: steps of sequences that have begun.

They are the same columns as Stepwell's own steps. What the protocol adds is here: which versions of the model they are
for, what their tensors are called there, the statistics, and the words of errors. A request for which that is not enough
is served alone by `Inference`, behind what came before it for its sequence: another request of the sequence is running,
the sequence has not begun or is not what the request takes it for, or the model's tensors do not fit it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from stepwell_server.engine.api import Applied
from stepwell_server.engine.change import NO_STATES, Change, Reply
from stepwell_server.engine.types import Members, Tensors
from stepwell_server.errors import InvalidInput, ModelNotFound, ServerError, release_frames
from stepwell_server.rpc import tensors
from stepwell_server.rpc.boundary import internal
from stepwell_server.rpc.fronts.base import OutputColumn, StepColumns
from stepwell_server.rpc.status import message_of
from stepwell_server.rpc.steps.columns import Form, sizes_of, who_of
from stepwell_server.rpc.tracing import TRACES
from stepwell_server.rpc.triton.errors import names_sequence, translated
from stepwell_server.rpc.triton.infer import Answer, Origin
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.sequences import sequence_of
from stepwell_server.rpc.triton.statistics import Timing
from stepwell_server.rpc.triton.tensors import MAX_BATCH_SIZE, Tensor

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.rpc.boundary import RequestObserver
    from stepwell_server.rpc.triton.infer import Inference
    from stepwell_server.rpc.triton.sequences import Turn
    from stepwell_server.rpc.triton.versions import InferModel, Read


class InferForm(Form):
    """Steps of sequences of one model. Lives on the event loop."""

    method, stream_method = "ModelInfer", "ModelStreamInfer"

    def __init__(
        self, columns: StepColumns, inference: Inference, clock: Clock, observer: RequestObserver
    ) -> None:
        super().__init__(columns, clock, observer)
        self._inference = inference
        self._timing = Timing(time.perf_counter_ns())
        self._model: InferModel | None = None
        """A version that the tensors fit: the one that the requests name, or the default."""
        self._versions: Collection[int] | None = None
        """Those that the requests are for; None: all of the model."""
        self._outputs: Sequence[Tensor] = ()
        self._steps = 1
        self._named = columns.model or ("", "")

    @override
    def prepare(self) -> None:
        alone = self._alone() if self._read() else self.members
        if len(alone):
            self._serve_alone(alone)
        self._timing.read = time.perf_counter_ns()

    def _read(self) -> bool:
        """Whether the requests fit a model."""
        models, columns = self._inference.models, self.columns
        try:
            model = self._model = models.find(*self._named)
            self._outputs = model.tensors.requested([(name, {}) for name in columns.output_names])
            self.inputs, self._steps = model.tensors.of_columns(columns.inputs)
        except (InvalidInput, ModelNotFound):
            return False
        self._versions = [model.version] if self._named[1] else models.alike(model)
        return True

    def _alone(self) -> Members:
        """The requests to be served alone, beside those that the engine does not take."""
        columns = self.columns
        alone = columns.sizes > MAX_BATCH_SIZE
        waits = self._inference.sequences.must_wait(columns.session_ids, columns.request_ids)
        if waits is not None:
            alone |= waits
        return self._with_followers(np.flatnonzero(alone)) if alone.any() else np.flatnonzero(alone)

    @override
    def change(self, members: Members | None) -> Change:
        change = super().change(members)
        change.continued_model, change.continued_versions = self._named[0], self._versions
        change.output_names = ()
        change.batch_sizes = sizes_of(self.columns, members)
        return change

    @override
    def decline(self, members: Members) -> Members:
        followers = self._with_followers(members)
        self._serve_alone(followers[followers >= members[0]])
        return followers

    def _with_followers(self, members: Members) -> Members:
        """With all that name the same sequences."""
        ids = self.columns.session_ids
        if len(set(ids)) == len(ids):
            return members
        named = {ids[member] for member in members.tolist()}
        return np.array([member for member in self.members.tolist() if ids[member] in named], np.intp)

    def _serve_alone(self, members: Members) -> None:
        """Serve requests one by one, each in its sequence's line: none of them is left to do."""
        self.members = np.setdiff1d(self.members, members)
        for member in members.tolist():
            turn = self._inference.sequences.enter(self.columns.session_ids[member])
            self._inference.run(self._answer_alone(member, turn), turn)

    async def _answer_alone(self, member: int, turn: Turn) -> None:
        columns, members = self.columns, np.array([member])
        caller = columns.callers[member if len(columns.callers) > 1 else 0]
        origin = Origin(caller, who_of(columns, member), float(columns.deadlines[member]))
        if not turn.is_refused:
            await turn.come()
            if member in columns.replies.gone():
                return
        if (trace := self.traces.get(member)) is not None:
            TRACES.set({0: trace})
        try:
            request = pb.ModelInferRequest.FromString(columns.replies.request(member))
            await self._inference.serve(
                request, origin, turn, functools.partial(self._applied_alone, members)
            )
        except Exception as error:
            release_frames(error)
            known = error if isinstance(error, ServerError) else internal(error, method=self.method)
            known.model = self._named[0]
            self._refuse(members, known, message_of(known).encode())

    def _applied_alone(self, members: Members, read: Read, reply: Answer) -> None:
        assert isinstance(reply, Applied), "it is of a sequence"
        revisions, positions = np.array([[reply.revision], [reply.position]], np.uint64)
        several = Reply(revisions, positions, reply.outputs, NO_STATES, reply.replayed, reply.version)
        self._answer(members, several, _columns(read.outputs, reply.outputs))

    @override
    def applied(self, members: Members | None, reply: Reply) -> None:
        timing, sizes = self._timing, self.columns.sizes
        timing.run = time.perf_counter_ns()
        self._answer(members, reply, _columns(self._outputs, reply.outputs))
        model = self._inference.models.known(self._named[0], reply.version)
        if model is None:
            return
        model.statistics.succeeded(
            timing,
            time.perf_counter_ns(),
            now_s=self._clock.now(),
            rows=int((sizes if members is None else sizes[members]).sum()),
            steps=self._steps,
            count=len(reply.revisions),
        )

    @override
    def failed(self, members: Members | None, error: ServerError) -> None:
        name, ids = self._named[0], self.columns.session_ids
        if self._model is not None:
            count = len(ids) if members is None else len(members)
            self._model.statistics.failed(self._timing, time.perf_counter_ns(), count)
        for some, member in self._alike(members, error):
            told = translated(error, sequence_of(name, ids[member]), name)
            told.model = name
            self._refuse(some, told, message_of(told).encode())

    def _alike(self, members: Members | None, error: ServerError) -> Iterator[tuple[Members | None, int]]:
        """Those that are told the same, and one of them: what names a sequence is told to each by itself."""
        if not names_sequence(error):
            yield members, 0
            return
        for member in (self.members if members is None else members).tolist():
            yield np.array([member]), member


def _columns(wanted: Sequence[Tensor], outputs: Tensors) -> list[OutputColumn]:
    """The outputs that were asked for, in that order."""
    columns = []
    for tensor in wanted:
        array = outputs[tensor.spec.name]
        number, data = tensors.to_bytes(array)
        shape = array.shape if tensor.spec.shape else (*array.shape, 1)
        columns.append(OutputColumn(tensor.spec.name, number, shape[1:], data))
    return columns
