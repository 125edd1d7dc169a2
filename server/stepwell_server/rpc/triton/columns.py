"""Requests that a front has read by itself: steps of sequences that go on, as columns.

What is plain is the front's to say; whether a request can be done so is said here. A request whose sequence has another
one at work, has not begun, or is not what the request takes it for, one that the model's tensors do not fit, and what
comes behind such a one, is handed back: it becomes a call or a message of one, and `Inference` gives it its answer.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from stepwell_server.engine.change import Change, Reply
from stepwell_server.engine.types import Members, Tensors
from stepwell_server.errors import InvalidInput, ModelNotFound, ServerError
from stepwell_server.rpc import tensors
from stepwell_server.rpc.fronts.base import OutputColumn, StepColumns
from stepwell_server.rpc.status import message_of
from stepwell_server.rpc.steps.columns import Form, sizes_of
from stepwell_server.rpc.triton.errors import names_sequence, translated
from stepwell_server.rpc.triton.sequences import sequence_of
from stepwell_server.rpc.triton.statistics import Timing
from stepwell_server.rpc.triton.tensors import MAX_BATCH_SIZE, Tensor

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.rpc.boundary import RequestObserver
    from stepwell_server.rpc.triton.infer import Inference
    from stepwell_server.rpc.triton.versions import InferModel

_NOBODY: Members = np.zeros(0, np.intp)


class RequestForm(Form):
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

    def prepare(self) -> None:
        """Read the tensors, and hand back what cannot be done so."""
        if not self._read():
            self._hand_back(self.members)
            return
        out = self._out()
        if len(out):
            self._hand_back(self._with_followers(out))
        self._timing.read = time.perf_counter_ns()

    def _read(self) -> bool:
        """Whether the requests fit a model."""
        try:
            model = self._model = self._inference.models.find(*self._named)
        except (InvalidInput, ModelNotFound):
            return False
        self._versions = [model.version] if self._named[1] else self._inference.models.alike(model)
        outputs = model.tensors.named(self.columns.output_names)
        inputs = model.tensors.of_columns(self.columns.inputs)
        if outputs is None or inputs is None:
            return False
        self._outputs, self.inputs, self._steps = outputs, inputs.arrays, inputs.steps
        return True

    def _out(self) -> Members:
        """Requests that cannot be done so, beside those of which the engine says it."""
        columns = self.columns
        masks = []
        if columns.sizes.max() > MAX_BATCH_SIZE:
            masks.append(columns.sizes > MAX_BATCH_SIZE)
        now = self._clock.monotonic()
        if columns.deadlines.min() <= now:
            masks.append(columns.deadlines <= now)
        waits = self._inference.sequences.must_wait(columns.session_ids, columns.request_ids)
        if waits is not None:
            masks.append(waits)
        out = np.flatnonzero(np.logical_or.reduce(masks)) if masks else _NOBODY
        behind = columns.replies.behind()
        return np.union1d(out, behind).astype(np.intp) if behind else out

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
        self._hand_back(followers[followers >= members[0]])
        return followers

    def _with_followers(self, members: Members) -> Members:
        """With all that name the same sequences."""
        ids = self.columns.session_ids
        if len(set(ids)) == len(ids):
            return members
        out = {ids[member] for member in members.tolist()}
        return np.array([member for member in self.members.tolist() if ids[member] in out], np.intp)

    def _hand_back(self, members: Members) -> None:
        """Hand requests back to the front: none of them is left to do."""
        self.members = np.setdiff1d(self.members, members)
        self.columns.replies.hand_back(members)

    @override
    def applied(self, members: Members | None, reply: Reply) -> None:
        timing, sizes = self._timing, self.columns.sizes
        timing.run = time.perf_counter_ns()
        self._answer(members, reply)
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

    @override
    def version_text(self, version: int) -> str:
        return str(version)

    def output_columns(self, outputs: Tensors) -> list[OutputColumn]:
        """The outputs that were asked for, in that order."""
        columns = []
        for tensor in self._outputs:
            array = outputs[tensor.spec.name]
            number, data = tensors.to_bytes(array)
            shape = array.shape if tensor.spec.shape else (*array.shape, 1)
            columns.append(OutputColumn(tensor.spec.name, number, shape[1:], data))
        return columns
