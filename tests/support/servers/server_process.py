"""The real server as a process, spoken to through raw gRPC stubs; the SDK's `LocalServer` has its own tests."""

from __future__ import annotations

import functools
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt

from stepwell.v1 import sessions_pb2, sessions_pb2_grpc, tensors_pb2
from support import secured
from support.models import programs, zoo
from support.models.programs import Saved
from support.servers import fork_server

_START_S = 100.0
_STOP_S = 100.0
FEATURES, OUTPUTS = 3, 2
"""Of the model that `forecast` makes."""
_CONTROLLED = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def forecast() -> Saved:
    """An LSTM with a dense layer, made and compiled once per test run."""
    return programs.saved("lstm_dense")


def retrained() -> Saved:
    """The model of `forecast` with other weights."""
    build = functools.partial(zoo.build, "lstm_dense", seed=1)
    return programs.saved("lstm_dense_retrained", build, kept=programs.kept_folder())


class ServerProcess:
    """``python -m stepwell_server`` on a port of the system's choice. Leaving the block kills it.

    It keeps sessions in memory unless the arguments say otherwise. With a `terminal`, the secondary end of a
    pseudo-terminal, it is the first process of a session that this one controls.
    """

    def __init__(
        self,
        *arguments: str,
        ready: bool = True,
        environment: Mapping[str, str | None] | None = None,
        terminal: int | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        """`program` is what Python runs, if not `-m stepwell_server`; `environment` is added to the test's own; None takes out what is there. Metrics are off unless it or an option says otherwise."""
        if not {"--store", "--data-dir"} & set(arguments):
            arguments = (*arguments, "--store", "memory")
        added_options = secured.options(arguments)
        self._scheme = secured.SCHEME if added_options else ""
        # but for the front, which `make soak` chooses for all servers
        kept = (key for key in os.environ if key == "STEPWELL_FRONT" or not key.startswith("STEPWELL_"))
        clean = {key: os.environ[key] for key in kept}
        clean["STEPWELL_METRICS_LISTEN"] = "off"
        added = {**clean, **(environment or {})}
        command = [sys.executable, *(program or ("-m", "stepwell_server")), *arguments, *added_options]
        if terminal is not None:
            command = [sys.executable, "-c", _CONTROLLED, *command]
        self.process = fork_server.Process(
            command,
            stdin=terminal,
            start_new_session=terminal is not None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in added.items() if value is not None},
        )
        self._stderr: list[str] = []
        self.ready_line = self._read_ready_line() if ready else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def address(self) -> str:
        """Host and port; with a scheme if it is secured."""
        return self._scheme + self.ready_line.rpartition("listening on ")[2].strip()

    @property
    def log(self) -> list[str]:
        """The lines that `wait_for_log` has read."""
        return self._stderr

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait_for_log(self, pattern: str) -> str:
        """Read the log up to a line that matches, and return it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._stderr.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError(f"no line matches {pattern!r} in:\n{''.join(self._stderr)}")

    def finish(self) -> tuple[int, str, str]:
        """Wait for the end. Returns the exit code, the rest of stdout, and stderr."""
        out, err = self.process.communicate(timeout=_STOP_S)
        return self.process.returncode, out, "".join(self._stderr) + err

    def _read_ready_line(self) -> str:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], _START_S)
        line: str = self.process.stdout.readline() if readable else ""
        if not line:
            self.process.kill()
            raise AssertionError(f"the server did not start:\n{self.process.communicate()[1]}")
        return line


def serve(
    *arguments: str,
    ready: bool = True,
    environment: Mapping[str, str | None] | None = None,
    terminal: int | None = None,
    program: Sequence[str] | None = None,
) -> ServerProcess:
    """A server of the `forecast` model; wait until it is `ready`, or not."""
    model = forecast()
    standard = (f"forecast={model.path}", "--listen", "127.0.0.1:0", "--cache-dir", str(model.cache_dir))
    options = (*standard, *arguments)
    return ServerProcess(*options, ready=ready, environment=environment, terminal=terminal, program=program)


def connect(
    server: ServerProcess, ca: bytes | None = None
) -> tuple[grpc.Channel, sessions_pb2_grpc.SessionServiceStub]:
    """A channel, and the stub of its SessionService. Replies of any size are read. With a `ca`, over TLS."""
    options = [("grpc.max_receive_message_length", -1)]
    if ca is None:
        channel = secured.channel(server.address, options)
    else:
        channel = grpc.secure_channel(server.address, grpc.ssl_channel_credentials(ca), options=options)
    return channel, sessions_pb2_grpc.SessionServiceStub(channel)


def tensor(array: npt.NDArray[np.generic], name: str = "") -> tensors_pb2.Tensor:
    """A wire tensor."""
    dtype = tensors_pb2.DataType.Value(f"DATA_TYPE_{array.dtype.name.upper()}")
    return tensors_pb2.Tensor(name=name, dtype=dtype, shape=array.shape, data=array.tobytes())


def random_tensor(seed: int, *shape: int) -> tensors_pb2.Tensor:
    """A wire tensor of random float32 numbers."""
    return tensor(np.random.default_rng(seed).standard_normal(shape, np.float32))


def array(message: tensors_pb2.Tensor) -> npt.NDArray[np.generic]:
    """The array of a wire tensor."""
    dtype = tensors_pb2.DataType.Name(message.dtype).removeprefix("DATA_TYPE_").lower()
    return np.frombuffer(message.data, dtype).reshape(tuple(message.shape))


def begin_long_step(stub: Any, session_id: str, steps: int) -> Any:
    """A step that runs for a while. Returns its call when the server has it under way."""
    x = tensor(np.zeros((1, steps, FEATURES), np.float16))
    request = sessions_pb2.StepRequest(
        session_id=session_id, inputs=[x], outputs=sessions_pb2.OUTPUT_SELECTION_NONE
    )
    call = stub.Step.future(request, timeout=100.0)
    # Its message is long: what is sent later may come first. Once it has come, nobody gets at the session, while
    # anybody sees how it is. Twice, for an answer may be late for another reason.
    in_vain = 0
    while in_vain < 2:
        began_s = time.perf_counter()
        stub.GetSession(sessions_pb2.GetSessionRequest(session_id=session_id), timeout=100.0)
        patience_s = max(0.03, 3 * (time.perf_counter() - began_s))
        try:
            stub.GetState(sessions_pb2.GetStateRequest(session_id=session_id), timeout=patience_s)
            in_vain = 0
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            in_vain += 1
        assert not call.done(), "it was over before it was seen under way: it must be longer"
    return call
