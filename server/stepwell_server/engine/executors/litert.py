"""Runs programs on LiteRT. The only module that imports it, besides the converter's own check."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from stepwell_server.engine.executors.base import Buffers, ExecutionError, Executor
from stepwell_server.engine.executors.dense import dense_delegates
from stepwell_server.engine.executors.padded import PaddedExecutor
from stepwell_server.engine.executors.quiet import without_announcements
from stepwell_server.engine.executors.step_function import fill
from stepwell_server.engine.types import Array
from stepwell_server.program import FLATBUFFER, Program, StateSpec, TensorSpec

#: Interpreters that an executor keeps, each with a batch size of its own, and about how much memory they may take. With
#: more, the tensors of one displace those of the others from the processor's cache: wider models than an LSTM(128) are
#: slower then.
_MAX_KEPT, _MAX_KEPT_BYTES = 8, 3 << 20
#: For that estimate: rows of a batch, and tensors of a graph for each one in the program's specs. Each interpreter
#: may pack the weights for itself.
_TYPICAL_ROWS, _TENSORS_PER_SPEC = 64, 4
#: After this many runs of one size the arrays are cached.
_RUNS_UNTIL_HELD = 8
#: The weight of a duration above the estimate, most of which were interrupted.
_RISE = 0.02


def load(program: Program, *, is_exact: bool = False) -> Executor:
    """Return an executor of ``program``; it pads only if the program lists batch sizes."""
    executor = LiteRTExecutor(program, is_exact=is_exact)
    if not program.batch_sizes:
        return executor

    def run(inputs: Sequence[Array], states: Sequence[Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        executor.bind(len((*inputs, *states)[0]))
        fill(executor, inputs, states)
        executor.invoke()
        # Copies: no view may live while the interpreter runs again.
        return (
            [np.array(value) for value in executor.outputs()],
            [np.array(value) for value in executor.next_states()],
        )

    return PaddedExecutor(program, run)


def places_tensors_late(flatbuffer: bytes) -> bool:
    """Whether some tensors of a graph get their place in memory only while it runs.

    LiteRT does not know the size of some results before that, such as that of a Slice with a computed size, and places
    all later tensors then. Delegates read some of them where they were before: about one run in a thousand gave wrong
    values to all rows. So such a graph runs without delegates. The compiler leaves few of them: `compile.program.sizes`.
    """
    interpreter = Interpreter(
        model_content=flatbuffer,
        num_threads=1,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    try:
        for item in interpreter.get_tensor_details():
            if item["name"]:  # Others are scratch memory of a kernel.
                interpreter.tensor(item["index"])()
    except ValueError:  # It has no memory yet.
        return True
    return False


_has_announced_itself = threading.Event()


def _swallow_announcement(interpreter: Interpreter) -> None:
    """Make LiteRT log its delegate, which it does once per process, where the line is discarded."""
    if not _has_announced_itself.is_set():
        with without_announcements():
            interpreter.allocate_tensors()
        _has_announced_itself.set()


class LiteRTExecutor(Executor):
    """An `Executor` whose views are the interpreters' own memory. For one thread at a time.

    The flatbuffer is not copied, so many executors of one program share its weights. They share those that the native
    module packs for its own kernels, too.

    To change an interpreter's batch size, LiteRT plans the memory of the whole graph again. So there are several
    interpreters, each with the size of a recent batch. A batch runs at its own size, or at a larger one where the
    measured times say that this is cheaper than a resize. The rows beyond the batch then hold rows of earlier runs,
    which cannot fail: a run that fails ends with a resize.
    """

    def __init__(self, program: Program, *, is_exact: bool = False) -> None:
        """Take the flatbuffer and find its tensors by their signature keys.

        ``is_exact``: each batch runs at its own size, for a trial of that size.
        """
        self._program, self._is_exact = program, is_exact
        self._is_late = places_tensors_late(program.files[FLATBUFFER])
        """A run may move its tensors."""
        self._now = self._made()
        """The interpreter of the batch."""
        self._kept = [self._now]
        self._max_kept = _max_kept(program)
        self._rows = 0
        """Rows of the batch."""
        self._resize_s = _Lowest()
        self._row_s = _Lowest()
        """Seconds of a run, by row."""

    def bind(self, rows: int) -> None:
        """Make the buffers exactly ``rows`` long."""
        if rows == self._rows and self._now.size:
            return
        kept = self._kept
        found: _Sized | None = None
        for one in kept:
            if one.size >= rows and (found is None or one.size < found.size):
                found = one
        if self._is_exact and found is not None and found.size > rows:
            found = None
        if found is None or (found.size - rows) * self._row_s.value > self._resize_s.value:
            found = self._resized(rows)
        if found is not kept[-1]:
            kept.remove(found)
            kept.append(found)  # the last one is the most recent
        self._now, self._rows = found, rows

    def _made(self) -> _Sized:
        return _Sized(self._program, is_late=self._is_late)

    def _resized(self, rows: int) -> _Sized:
        """An interpreter of this size: one without a size, a new one, or the one that was not used for longest."""
        one = next((one for one in self._kept if not one.size), None)
        if one is None and len(self._kept) < self._max_kept:
            one = self._made()
            self._kept.append(one)
        one = one or self._kept[0]
        is_new, began = one.is_new, time.perf_counter()
        one.resize(rows)
        if not is_new:  # the first one takes longer
            self._resize_s.note(time.perf_counter() - began)
        return one

    def buffers(self) -> Buffers | None:
        """See `Executor.buffers`."""
        return self._now.buffers

    def inputs(self) -> Sequence[Array]:
        """Writable views of the inputs of one time step."""
        return self._now.inputs.views(self._rows)

    def states(self) -> Sequence[Array]:
        """Writable views of the state before the step."""
        return self._now.states.views(self._rows)

    def invoke(self) -> None:
        """Run one time step.

        Raises:
            ExecutionError: a kernel refused its input, e.g. an Embedding index out of range.
        """
        now, began = self._now, time.perf_counter()
        try:
            now.interpreter.invoke()
        except RuntimeError as error:
            if "reference to internal data" in str(error):
                raise  # The caller kept a view: a bug in the program, not a problem of the batch.
            # Kernels that failed half-way leave tensors in no defined shape.
            now.size = 0
            raise ExecutionError(str(error).strip()) from error
        self._row_s.note((time.perf_counter() - began) / now.size)
        if now.must_settle:
            now.settle()

    def outputs(self) -> Sequence[Array]:
        """Views of the outputs of the last step."""
        return self._now.outputs.views(self._rows)

    def next_states(self) -> Sequence[Array]:
        """Views of the state after the last step."""
        return self._now.next_states.views(self._rows)


class _Sized:
    """An interpreter, and its tensors of some number of rows."""

    def __init__(self, program: Program, *, is_late: bool) -> None:
        """``is_late``: `places_tensors_late`."""
        self._is_late = is_late
        self.size = 0
        """Rows of the interpreter's tensors; 0: it must be resized."""
        self.is_new = True
        """It has not been resized yet."""
        self.buffers: Buffers | None = None
        """All rows of the tensors, if these stay where they are."""
        self.must_settle = True
        """Whether `settle` must be called after a run."""
        self._runs = 0
        """Runs since the last resize."""
        self.interpreter = Interpreter(
            model_content=program.files[FLATBUFFER],
            num_threads=1,
            experimental_delegates=None if is_late else list(dense_delegates()),
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            if is_late
            else OpResolverType.AUTO,
        )
        if not is_late:
            _swallow_announcement(self.interpreter)
        # The runner references the interpreter's memory, so it must be deleted before the first resize.
        runner = self.interpreter.get_signature_runner()
        details = runner.get_input_details()
        _require_shapes("in", program.inputs, details)
        _require_shapes("state", program.states_taken, details)
        given = {key: int(item["index"]) for key, item in details.items()}
        made = {key: int(item["index"]) for key, item in runner.get_output_details().items()}
        del runner
        shapes = {f"in_{i}": spec.shape for i, spec in enumerate(program.inputs)}
        shapes |= {f"state_{i}": spec.shape for i, spec in enumerate(program.states_taken)}
        self._given = [(index, shapes[key]) for key, index in given.items()]
        """The interpreter's input tensors, with the shape of a row."""
        taken = set(given.values())
        self.inputs = _Tensors(self.interpreter, "in", program.inputs, given)
        self.states = _Tensors(self.interpreter, "state", program.states_taken, given)
        self.outputs = _Tensors(self.interpreter, "out", program.outputs, made, taken)
        self.next_states = _Tensors(self.interpreter, "next", program.states_returned, made, taken)

    @property
    def _tensors(self) -> tuple[_Tensors, ...]:
        return self.inputs, self.states, self.outputs, self.next_states

    def resize(self, rows: int) -> None:
        self.size = 0  # Until it succeeds: a half-resized interpreter must be resized again.
        for index, shape in self._given:
            self.interpreter.resize_tensor_input(index, (rows, *shape))
        self.interpreter.allocate_tensors()
        self.is_new, self._runs, self.buffers, self.must_settle = False, 0, None, True
        for tensors in self._tensors:
            tensors.resize(rows)
        self.size = rows

    def settle(self) -> None:
        """Complete a run."""
        copies = [tensors.settle() for tensors in (self.outputs, self.next_states)]
        self._runs += 1
        if self._runs == _RUNS_UNTIL_HELD and not self._is_late:
            self.buffers = Buffers(*(tensors.hold() for tensors in self._tensors))
            self.must_settle = any(copies)


def _max_kept(program: Program) -> int:
    """How many interpreters of a program an executor may keep."""
    row_bytes = sum(spec.row_bytes for spec in (*program.inputs, *program.outputs))
    row_bytes += sum(spec.row_bytes for spec in (*program.states_taken, *program.states_returned))
    batch_bytes = _TYPICAL_ROWS * _TENSORS_PER_SPEC * row_bytes
    return max(1, min(_MAX_KEPT, _MAX_KEPT_BYTES // (len(program.files[FLATBUFFER]) + batch_bytes)))


def _require_shapes(
    kind: str, specs: Sequence[TensorSpec | StateSpec], details: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check that a program accepts what its specs say, before memory of that size is allocated."""
    for i, spec in enumerate(specs):
        item = details.get(f"{kind}_{i}")  # the converter drops tensors that nothing reads
        if item is not None and tuple(map(int, item["shape"][1:])) != spec.shape:
            raise ValueError(
                f"it takes {spec.name!r} with the shape {tuple(map(int, item['shape'][1:]))} of a row; got {spec.shape}"
            )


class _Tensors:
    """The tensors of one kind, in the order of the program's specs.

    A tensor that the converter dropped (an input that nothing reads) gets a buffer of its own. So does a result
    that is the same tensor as an input: it is copied once the step has run, because the caller may fill the inputs
    again before it carries the state.
    """

    def __init__(
        self,
        interpreter: Interpreter,
        kind: str,
        specs: Sequence[TensorSpec | StateSpec],
        indexes: Mapping[str, int],
        taken: set[int] | None = None,
    ) -> None:
        found = [indexes.get(f"{kind}_{i}") for i in range(len(specs))]
        self._specs = specs
        self._read: list[Callable[[], Array] | None] = [
            None if index is None else interpreter.tensor(index) for index in found
        ]
        self._own = [index is None or index in (taken or ()) for index in found]
        self._buffers = [np.zeros((0, *spec.shape), spec.dtype) for spec in specs]
        self._held: list[Array] | None = None
        """All rows of the tensors, if these stay where they are."""
        self._bound: list[Array] = []
        self._rows = 0
        """The first rows of `_held`, and how many; 0: none yet."""

    def resize(self, rows: int) -> None:
        self._held = None
        for place, own in enumerate(self._own):
            if own:
                spec = self._specs[place]
                self._buffers[place] = np.zeros((rows, *spec.shape), spec.dtype)

    def settle(self) -> bool:
        """Copy results that are inputs too; returns whether there are any."""
        copied = False
        for read, own, buffer in zip(self._read, self._own, self._buffers, strict=True):
            if own and read is not None:
                np.copyto(buffer, read())
                copied = True
        return copied

    def hold(self) -> list[Array]:
        """Return the same arrays until the next resize, instead of creating them each time.

        LiteRT places a graph's tensors when they are allocated, and moves them only at the next allocation, or in a run if
        it places some of them late.
        """
        self._held, self._rows = [_unbound(view) for view in self._whole()], 0
        return self._held

    def views(self, rows: int) -> list[Array]:
        if self._held is None:
            return [array[:rows] for array in self._whole()]
        if rows != self._rows:
            self._bound, self._rows = [array[:rows] for array in self._held], rows
        return self._bound

    def _whole(self) -> list[Array]:
        return [
            buffer if own or read is None else read()
            for read, own, buffer in zip(self._read, self._own, self._buffers, strict=True)
        ]


class _Lowest:
    """A duration in seconds, as if nothing had interrupted it: lower values count at once, higher ones slowly."""

    def __init__(self) -> None:
        self.value = 0.0

    def note(self, seconds: float) -> None:
        value = self.value
        self.value = seconds if seconds < value or not value else value + _RISE * (seconds - value)


def _unbound(view: Array) -> Array:
    """The same memory as an array that does not block the interpreter from running."""
    if not view.size:
        return view.copy()
    memory = (ctypes.c_char * view.nbytes).from_address(view.__array_interface__["data"][0])
    unbound: Array = np.ndarray(view.shape, view.dtype, memoryview(memory))
    return unbound
