"""A server that peers attack, and a client that keeps calling it meanwhile."""

from __future__ import annotations

import contextlib
import json
import resource
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from stepwell.v1 import sessions_pb2 as pb
from support.servers.server_process import FEATURES, ServerProcess, connect, serve, tensor
from support.telemetry.scrape import samples_of

TIMEOUT_S = 100.0
_LIMITED = Path(__file__).with_name("low_limits.py")
X = tensor(np.zeros((1, FEATURES), np.float32))


class AttackedServer:
    """A server, a client that keeps calling whatever the others do, and the server's counters."""

    def __init__(self, front: str, server: ServerProcess, metrics: str) -> None:
        self.front = front
        self.server = server
        self.metrics_address = metrics
        self.channel, self.stub = connect(server)
        self.session_id = self.open()

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def is_native(self) -> bool:
        return self.front == "native"

    def open(self) -> str:
        request = pb.OpenSessionRequest(model="forecast")
        session_id: str = self.stub.OpenSession(request, timeout=TIMEOUT_S).session.session_id
        return session_id

    def require_service(self) -> None:
        """The client that was there before is answered."""
        self.stub.Step(pb.StepRequest(session_id=self.session_id, inputs=[X]), timeout=TIMEOUT_S)

    def count(self, name: str, *labels: str) -> float:
        """A number of the front's metrics."""
        return self.number(f"stepwell_front_{name}", *labels)

    def number(self, name: str, *labels: str) -> float:
        """A number of the metrics."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=TIMEOUT_S) as response:
            samples = samples_of(response.read().decode(), name)
        for sample in samples:
            if tuple(sample.labels.values()) == labels:
                return sample.value
        raise LookupError((name, labels))

    def refused(self, reason: str) -> float:
        return self.count("refused_total", reason)

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Ask repeatedly until it is so; only a hang reaches the limit. The other client keeps calling."""
        while not holds():
            self.require_service()

    def memory(self) -> int:
        """Bytes that the server has of the machine's memory."""
        with open(f"/proc/{self.server.process.pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def target(
    front: str, *arguments: str, limits: Mapping[str, float] | None = None
) -> Iterator[AttackedServer]:
    """A server on a front; `limits`: other `FrontLimits` than a server has, so that a test need not wait for those."""
    options = ("--front", front, "--metrics-listen", "127.0.0.1:0", "--log-format", "json", *arguments)
    program = [str(_LIMITED), json.dumps(limits)] if limits else None
    with serve(*options, program=program) as server:
        metrics = json.loads(server.wait_for_log('"metrics"'))["address"]
        found = AttackedServer(front, server, metrics)
        with found.channel:
            yield found
            found.require_service()
