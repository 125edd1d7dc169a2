"""Runs programs on ONNX Runtime. The only module that imports it.

The compiler has rewritten the graph (`compile.onnx.rewrite`): its tensors have the signature keys of a program, rows
come first, and constants and contexts are part of the graph.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnxruntime

from stepwell_server.engine.executors.base import ExecutionError, Executor
from stepwell_server.engine.executors.padded import PaddedExecutor
from stepwell_server.engine.executors.step_function import fill
from stepwell_server.engine.types import Array
from stepwell_server.process.memory import memory_bytes
from stepwell_server.program import ONNX_MODEL, Program, StateSpec, TensorSpec, dtype_of

#: Processor time after which a run of a graph with a `Loop` is terminated. Others end by themselves.
RUN_LIMIT_S = 0.5
#: Share of the memory that all runs may take together, without weights. The values that callers send may decide how much
#: a run takes: what a `Loop` carries may grow in each pass, and only some values reach a branch of an `If`.
MEMORY_SHARE = 1 / 2
#: How often running graphs are looked at.
_WATCH_INTERVAL_S = 0.02
#: Numbers of rows whose addresses are kept bound.
_MAX_BINDINGS = 64
_SILENT = 4
"""Only fatal errors are logged: the others are raised."""


def load(program: Program) -> Executor:
    """Return an executor of ``program``; it pads only if the program lists batch sizes.

    Raises:
        ValueError: ONNX Runtime cannot load the graph.
    """
    executor = OnnxExecutor(program)
    if not program.batch_sizes:
        return executor

    def run(inputs: Sequence[Array], states: Sequence[Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        executor.bind(len((*inputs, *states)[0]))
        fill(executor, inputs, states)
        executor.invoke()
        return executor.outputs(), executor.next_states()

    return PaddedExecutor(program, run)


class OnnxExecutor(Executor):
    """An `Executor` whose arrays are bound to the graph's inputs and outputs. For one thread at a time.

    All executors of one graph share a session, which any number of threads may run.
    """

    def __init__(self, program: Program) -> None:
        self._graph = _graph_of(program.files[ONNX_MODEL])
        self._kinds = (
            _Buffers("in", program.inputs),
            _Buffers("state", program.state),
            _Buffers("out", program.outputs),
            _Buffers("next", program.state),
        )
        self._rows = 0
        self._capacity = 0
        self._bindings: dict[int, onnxruntime.IOBinding] = {}
        """By number of rows."""

    def bind(self, rows: int) -> None:
        """Make the buffers exactly ``rows`` long."""
        if rows == self._rows:
            return
        if rows > self._capacity:
            self._bindings.clear()
            for buffers in self._kinds:
                buffers.allocate(rows)
            self._capacity = rows
        for buffers in self._kinds:
            buffers.bind(rows)
        if rows not in self._bindings:
            if len(self._bindings) == _MAX_BINDINGS:
                self._bindings.clear()
            self._bindings[rows] = self._bound()
        self._rows = rows

    def _bound(self) -> onnxruntime.IOBinding:
        binding = self._graph.session.io_binding()
        given, state, made, after = self._kinds
        for bind, buffers in (
            (binding.bind_input, given),
            (binding.bind_input, state),
            (binding.bind_output, made),
            (binding.bind_output, after),
        ):
            for key, array in zip(buffers.keys, buffers.arrays, strict=True):
                bind(key, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding

    def inputs(self) -> Sequence[Array]:
        """Writable views of the inputs of one time step."""
        return self._kinds[0].arrays

    def states(self) -> Sequence[Array]:
        """Writable views of the state before the step."""
        return self._kinds[1].arrays

    def invoke(self) -> None:
        """Run one time step.

        Raises:
            ExecutionError: a kernel refused its input, or a loop did not end in time.
        """
        self._graph.run(self._bindings[self._rows])

    def outputs(self) -> Sequence[Array]:
        """Views of the outputs of the last step."""
        return self._kinds[2].arrays

    def next_states(self) -> Sequence[Array]:
        """Views of the state after the last step."""
        return self._kinds[3].arrays


class _Buffers:
    """The arrays of one kind of tensors, in the order of the program's specs."""

    def __init__(self, kind: str, specs: Sequence[TensorSpec | StateSpec]) -> None:
        self.keys = [f"{kind}_{i}" for i in range(len(specs))]
        self._specs = specs
        self._whole: list[Array] = []
        self.arrays: list[Array] = []

    def allocate(self, rows: int) -> None:
        self._whole = [np.zeros((rows, *spec.shape), dtype_of(spec.dtype)) for spec in self._specs]

    def bind(self, rows: int) -> None:
        self.arrays = [array[:rows] for array in self._whole]


# ------------------------------------------------------------------------------------------------------------ sessions


class _Graph:
    """A loaded graph. Thread-safe."""

    def __init__(self, content: bytes) -> None:
        options = onnxruntime.SessionOptions()
        # One thread: how a sum is divided among threads decides its last bits. More executors give more speed.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # plans memory for one size only
        options.log_severity_level = _SILENT
        self._max_bytes = _bound_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        try:
            # The fallback prints to stdout, and tries the same again.
            self.session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # its errors have no common class
            raise ValueError(f"ONNX Runtime cannot load the graph: {_first_line(error)}") from error
        # The name of an operator stands in the file as it is.
        self._may_not_end = b"Loop" in content

    def run(self, binding: onnxruntime.IOBinding) -> None:
        with self.running() as options:
            self.session.run_with_iobinding(binding, options)

    @contextlib.contextmanager
    def running(self) -> Iterator[onnxruntime.RunOptions]:
        """Options for one run in this block; what it raises becomes an `ExecutionError`."""
        options = onnxruntime.RunOptions()
        options.log_severity_level = _SILENT
        if self._may_not_end:  # nor need it end with as much memory as before
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        limited = _watchdog.limit(options) if self._may_not_end else contextlib.nullcontext()
        with limited as run:
            try:
                yield options
            except Exception as error:
                problem = _first_line(error)
                if run is not None and run.is_late:
                    problem = f"a loop did not end within {RUN_LIMIT_S:g} s"
                elif any(sign in problem for sign in _TOO_LARGE):
                    problem = f"all runs must take at most {self._max_bytes} bytes of memory, and this one takes more"
                raise ExecutionError(problem) from error


_TOO_LARGE = ("Available memory of", "Failed to allocate memory", "bad_alloc")
"""In messages of runs for which there is not enough memory."""


@functools.cache
def _bound_memory() -> int:
    """Bound the memory of all graphs of this process that ask for it; return the bytes."""
    bound = int(memory_bytes() * MEMORY_SHARE)
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    info = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg({"max_mem": bound}))
    return bound


_graphs: weakref.WeakValueDictionary[bytes, _Graph] = weakref.WeakValueDictionary()
_loading = threading.Lock()


def _graph_of(content: bytes) -> _Graph:
    """Return the loaded graph, which all its executors share."""
    key = hashlib.sha256(content).digest()
    with _loading:
        graph = _graphs.get(key)
        if graph is None:
            graph = _graphs[key] = _Graph(content)
        return graph


Run = Callable[[Mapping[str, Array]], dict[str, Array]]
"""A graph as a function from inputs to outputs, by name."""


def plain(content: bytes) -> Run:
    """Return a graph as a function, for the compiler and its comparisons.

    Raises:
        ValueError: ONNX Runtime cannot load the graph.
    """
    graph = _Graph(content)
    names = [each.name for each in graph.session.get_outputs()]

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        with graph.running() as options:
            return dict(zip(names, graph.session.run(names, dict(inputs), options), strict=True))

    return run


class _Watchdog:
    """Terminates runs that compute for too long. Its thread starts with the first run that has a limit.

    Processor time counts, because on a busy machine any run may take long.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs: dict[int, _Limited] = {}
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limit(self, options: onnxruntime.RunOptions) -> Iterator[_Limited]:
        """Terminate the run with these options if the block computes longer than `RUN_LIMIT_S`."""
        run = _Limited(options)
        with self._changed:
            self._runs[id(run)] = run
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="onnx-watchdog", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield run
        finally:
            with self._changed:
                del self._runs[id(run)]

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._runs:
                    self._changed.wait()
                for run in self._runs.values():
                    run.terminate_late()
            time.sleep(_WATCH_INTERVAL_S)


class _Limited:
    """A run with a limit, on this thread."""

    def __init__(self, options: onnxruntime.RunOptions) -> None:
        self._options = options
        self._clock = time.CLOCK_MONOTONIC
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._began = time.clock_gettime(self._clock)
        self.is_late = False

    def terminate_late(self) -> None:
        """End the run if its time is over. For any thread."""
        if time.clock_gettime(self._clock) - self._began >= RUN_LIMIT_S:
            self.is_late = self._options.terminate = True


_watchdog = _Watchdog()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
