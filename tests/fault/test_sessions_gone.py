"""The data folder is removed or replaced under a server: it acknowledges nothing it has noticed to be lost, and ends."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from stepwell.v1 import sessions_pb2
from support.servers.server_process import FEATURES, ServerProcess, connect, random_tensor, serve

REFUSED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
"""The second is what gRPC makes of a call that is sent while the connection is closed."""
DURABILITIES = pytest.mark.parametrize("durability", ["sync", "async"])


def started(data: Path, durability: str, *, ready: bool = True) -> ServerProcess:
    options = ("--data-dir", str(data), "--durability", durability, "--log-level", "warning")
    return serve(*options, ready=ready)


def rename(data: Path) -> None:
    data.rename(data.with_name("elsewhere"))


def replace(data: Path) -> None:
    """Put an older copy in its place, as a restore does."""
    shutil.copytree(data, data.with_name("backup"))
    rename(data)
    data.with_name("backup").rename(data)


def ended(server: ServerProcess, within_s: float) -> bool:
    """Whether the server has ended by then."""
    try:
        server.process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def require_ended(server: ServerProcess, data: Path) -> None:
    code, _, log = server.finish()
    assert code == 1, log
    (line,) = [line for line in log.splitlines() if " error " in line]
    assert "the store is gone, the server ends" in line
    assert f"{data} must stay where it is while a server uses it; " in line


@pytest.mark.slow
@DURABILITIES
@pytest.mark.parametrize("how", [shutil.rmtree, rename, replace])
def test_a_server_that_does_nothing_notices(
    tmp_path: Path, durability: str, how: Callable[[Path], None]
) -> None:
    data = tmp_path / "data"
    with started(data, durability) as server:
        how(data)
        require_ended(server, data)


@pytest.mark.slow
@DURABILITIES
def test_no_step_is_acknowledged_once_it_was_noticed(tmp_path: Path, durability: str) -> None:
    data = tmp_path / "data"
    with started(data, durability) as server:
        channel, stub = connect(server)
        with channel:
            session_id = stub.OpenSession(
                sessions_pb2.OpenSessionRequest(model="forecast")
            ).session.session_id
            request = sessions_pb2.StepRequest(
                session_id=session_id, inputs=[random_tensor(1, 1, FEATURES)], request_id=1
            )
            stub.Step(request)
            shutil.rmtree(data)
            refusals: list[str] = []
            codes: set[grpc.StatusCode] = set()
            while not ended(server, within_s=0.005):
                request.request_id += 1
                try:
                    stub.Step(request, timeout=100.0)
                    assert not refusals, "it was noticed before, and this is lost"
                except grpc.RpcError as error:
                    codes.add(error.code())
                    refusals.append(error.details() or "")
        require_ended(server, data)
    assert refusals
    assert codes <= REFUSED


@pytest.mark.slow
def test_two_servers_never_acknowledge_under_one_name(tmp_path: Path) -> None:
    """However long the first one does not notice."""
    data = tmp_path / "data"
    with started(data, "sync") as first:
        first.signal(signal.SIGSTOP)
        shutil.rmtree(data)
        with started(data, "sync", ready=False) as second:
            code, _, log = second.finish()
        assert code == 2
        assert f"process {first.process.pid} still runs with a folder of this name" in log
        first.signal(signal.SIGCONT)
        require_ended(first, data)
    with started(data, "sync") as third:
        third.signal()
        assert third.finish()[0] == 0
