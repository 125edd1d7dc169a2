"""Requests that a front has parsed: steps of sequences that have started.

They are the same columns as Stepwell's own steps. This module adds Triton's part: versions and tensor names, statistics, and
the texts of errors. Some requests need more and are served alone by `Inference`, behind earlier requests of their sequence:
if another request of the sequence is running, if the sequence has not started or differs from what the request assumes, or
if the model's tensors do not fit.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from stepwell_server.engine.api import ChangeResult
from stepwell_server.engine.change import NO_STATES, Reply
from stepwell_server.engine.types import Members, Tensors
from stepwell_server.errors import InvalidInput, ModelNotFound, ServerError, release_frames
from stepwell_server.rpc.boundary import internal
from stepwell_server.rpc.fronts.base import StepColumns
from stepwell_server.rpc.status import message_of
from stepwell_server.rpc.steps.columns import Batch, Content, Wire, who_of
from stepwell_server.rpc.tracing import TRACES
from stepwell_server.rpc.triton.errors import names_sequence, translated
from stepwell_server.rpc.triton.infer import Answer, Inference
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.request import Origin
from stepwell_server.rpc.triton.sequences import sequence_of
from stepwell_server.rpc.triton.statistics import Timing
from stepwell_server.rpc.triton.tensors import MAX_BATCH_SIZE, replied
from stepwell_server.rpc.triton.versions import Read

if TYPE_CHECKING:
    from stepwell_server.rpc.triton.sequences import QueuePosition


class ColumnInference:
    """Reads and answers requests that arrive as columns. Lives on the event loop."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference
        self.wire = Wire("ModelInfer", "ModelStreamInfer", self._read, _refusals, self._serve_alone)

    def _read(self, columns: StepColumns) -> Content:
        models, timing = self._inference.models, Timing(time.perf_counter_ns())
        name, version = _model_of(columns)
        try:
            model = models.find(name, version)
            outputs = model.tensors.requested([(output, {}) for output in columns.output_names])
            read = Read(model, outputs, model.tensors.of_columns(columns.inputs, int(columns.sizes.sum())))
        except (InvalidInput, ModelNotFound):
            return Content({}, alone=np.arange(len(columns.session_ids)))
        alone = columns.sizes > MAX_BATCH_SIZE
        waits = self._inference.sequences.must_wait(columns.session_ids, columns.request_ids)
        if waits is not None:
            alone |= waits
        timing.read = time.perf_counter_ns()

        def replied_now(outputs: Tensors) -> Tensors:
            timing.run = time.perf_counter_ns()
            return replied(read.outputs, outputs)

        return Content(
            read.inputs.arrays,
            replied=replied_now,
            model=name,
            versions=[model.version] if version else models.alike(model),
            alone=np.flatnonzero(alone) if alone.any() else None,
            count=functools.partial(self._count, columns, read, timing),
        )

    def _count(
        self,
        columns: StepColumns,
        read: Read,
        timing: Timing,
        members: Members | None,
        reply: Reply | None,
    ) -> None:
        sizes = columns.sizes if members is None else columns.sizes[members]
        if reply is None:
            read.model.statistics.failed(timing, time.perf_counter_ns(), len(sizes))
        elif model := self._inference.models.known(read.model.name, reply.version):
            rows, steps = int(sizes.sum()), read.inputs.steps
            self._inference.succeeded(model, timing, rows=rows, steps=steps, count=len(sizes))

    def _serve_alone(self, batch: Batch, member: int) -> None:
        """Serve a request behind the others of its sequence."""
        position = self._inference.sequences.enter(batch.columns.session_ids[member])
        self._inference.run(self._answer_alone(batch, member, position), position)

    async def _answer_alone(self, batch: Batch, member: int, position: QueuePosition) -> None:
        columns, members = batch.columns, np.array([member])
        caller = columns.callers[member if len(columns.callers) > 1 else 0]
        origin = Origin(caller, who_of(columns, member), float(columns.deadlines[member]))
        if not position.is_refused:
            await position.wait()
            if member in columns.replies.gone():
                return
        if (trace := batch.traces.get(member)) is not None:
            TRACES.set({0: trace})
        try:
            request = pb.ModelInferRequest.FromString(columns.replies.request(member))
            answer = functools.partial(_answer, batch, members)
            await self._inference.serve(request, origin, position, answer)
        except Exception as error:
            release_frames(error)
            known = error if isinstance(error, ServerError) else internal(error, method=batch.wire.method)
            known.model, _ = _model_of(columns)
            batch.refuse(members, known, message_of(known).encode())


def _answer(batch: Batch, members: Members, read: Read, reply: Answer) -> None:
    assert isinstance(reply, ChangeResult), "it is of a sequence"
    revisions, positions = np.array([[reply.revision], [reply.position]], np.uint64)
    of_one = Reply(revisions, positions, reply.outputs, NO_STATES, reply.replayed, reply.version)
    batch.answer(members, of_one, replied(read.outputs, reply.outputs))


def _refusals(
    columns: StepColumns, members: Members | None, error: ServerError
) -> Iterator[tuple[Members | None, ServerError, bytes]]:
    """Return the error in Triton's words, per request if the text names the sequence."""
    (name, _), ids = _model_of(columns), columns.session_ids
    groups = [members]
    if names_sequence(error):
        groups = [np.array([member]) for member in (range(len(ids)) if members is None else members)]
    for group in groups:
        known = translated(error, sequence_of(name, ids[0 if group is None else group[0]]), name)
        known.model = name
        yield group, known, message_of(known).encode()


def _model_of(columns: StepColumns) -> tuple[str, str]:
    assert columns.model is not None, "requests of this protocol name one"
    return columns.model
