"""LMDB gives up under a whole server, because its disk failed for a moment: the server goes on, or says why it ends."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import stepwell
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from support import secured
from support.load.driver import FEATURES, MODEL
from support.servers.fault_servers import FaultyServer

X = np.ones((1, FEATURES), np.float32)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def is_ready_for_triton(address: str) -> bool:
    with secured.channel(address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerReady",
            request_serializer=pb.ServerReadyRequest.SerializeToString,
            response_deserializer=pb.ServerReadyResponse.FromString,
        )
        ready: bool = call(pb.ServerReadyRequest(), timeout=100.0).ready
        return ready


@contextmanager
def health(address: str) -> Iterator[Iterator[int]]:
    """What the health service says of all, one answer after the other."""
    with secured.channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=100.0)
        yield (answer.status for answer in watch)
        watch.cancel()


def refuse_one(client: stepwell.Client) -> None:
    with pytest.raises((stepwell.UnavailableError, stepwell.DeadlineExceededError)):
        client.open_session(MODEL, session_id="refused", timeout_s=0.3)


def test_a_moment_ends_nothing(tmp_path: Path) -> None:
    with (
        FaultyServer(tmp_path / "data", "--durability", "sync") as server,
        stepwell.connect(server.address) as client,
    ):
        session = client.open_session(MODEL, session_id="mine")
        session.step(X)
        server.tell("panic")
        # one transaction fails; whoever retries it is the first to find the disk well again
        client.open_session(MODEL, session_id="another").close()
        assert {info.session_id for info in client.sessions()} == {"mine"}
        assert client.session_info("mine").revision == 1
        session.step(X)
        session.close()
        assert server.stop() == 0
        assert "the store was reopened" in server.logs()


@pytest.mark.slow
def test_while_it_cannot_be_opened_nobody_is_sent_here(tmp_path: Path) -> None:
    metrics = ("--metrics-listen", "127.0.0.1:0", "--log-level", "info")
    with (
        FaultyServer(tmp_path / "data", "--durability", "sync", *metrics) as server,
        stepwell.connect(server.address) as client,
        health(server.address) as answers,
    ):
        session = client.open_session(MODEL, session_id="mine")
        session.step(X)
        assert next(answers) == SERVING
        server.tell("panic-away")
        refuse_one(client)
        assert next(answers) == NOT_SERVING
        assert not is_ready_for_triton(server.address)
        assert scraped(server)["stepwell_store_ready"] == 0.0
        server.tell("well")
        assert next(answers) == SERVING
        expected = {"stepwell_store_ready": 1.0, "stepwell_store_reopened_total": 1.0}
        assert expected.items() <= scraped(server).items()
        assert is_ready_for_triton(server.address)
        assert client.session_info("mine").revision == 1
        session.step(X)
        client.open_session(MODEL).close()
        assert "the store cannot be used reason=" in server.logs()
        assert "the store can be used again" in server.logs()


def scraped(server: FaultyServer) -> dict[str, float]:
    address = next(line for line in server.logs().splitlines() if " metrics address=" in line).split("=")[-1]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=100.0) as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.split() for line in lines if line.startswith("stepwell_store"))
    }


@pytest.mark.slow
def test_a_store_that_will_never_open_again_ends_the_server(tmp_path: Path) -> None:
    with (
        FaultyServer(tmp_path / "data", "--durability", "sync") as server,
        stepwell.connect(server.address) as client,
    ):
        client.open_session(MODEL, session_id="mine").step(X)
        server.tell("panic-away")
        refuse_one(client)
        with (tmp_path / "data" / "sessions" / "data.mdb").open("r+b") as file:
            file.write(b"not LMDB" * 2000)
        server.tell("well")
        assert server.wait_for_end() == 1
        (line,) = [line for line in server.logs().splitlines() if " error " in line]
        assert "the store is gone, the server ends" in line
        assert f"{tmp_path}/data/sessions must hold a store that can be opened again" in line
