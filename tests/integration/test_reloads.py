"""A trainer's way: the same model with other weights, again and again, compiled by one worker beside the traffic."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepwell.v1 import models_pb2, models_pb2_grpc, sessions_pb2
from support.models import zoo
from support.processes import children, is_there, until
from support.servers.server_process import FEATURES, connect, forecast, random_tensor, serve

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="it looks at processes as Linux shows them"
    ),
]
LIMIT_S = 200.0
RELOADS = 5


@pytest.mark.slow
def test_one_worker_compiles_all_of_them_and_ends_with_the_server(tmp_path: Path) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    model = keras.models.load_model(forecast().path)
    workers: list[list[int]] = []
    # A cache of its own, which has nothing of them.
    with serve("--cache-dir", str(tmp_path / "cache")) as server:
        channel, stub = connect(server)
        with channel:
            admin = models_pb2_grpc.ModelAdminServiceStub(channel)
            opened = sessions_pb2.OpenSessionRequest(model="forecast", session_id="user")
            stub.OpenSession(opened, timeout=LIMIT_S)
            for seed in range(1, RELOADS + 1):
                zoo.randomize(model, seed)
                file = tmp_path / f"{seed}.keras"
                model.save(file)
                request = models_pb2.LoadModelRequest(
                    name="forecast", path=str(file), sessions=models_pb2.SESSION_POLICY_CARRY
                )
                stages = [reply.stage for reply in admin.LoadModel(request, timeout=LIMIT_S)]
                assert "convert" in stages
                step = sessions_pb2.StepRequest(
                    session_id="user", inputs=[random_tensor(seed, 1, 1, FEATURES)]
                )
                assert stub.Step(step, timeout=LIMIT_S).model_version == seed + 1
                (fork_server,) = children(server.process.pid)
                workers.append(children(fork_server))
    assert [len(found) for found in workers] == [1] * RELOADS
    assert workers == [workers[0]] * RELOADS
    until(lambda: not is_there(fork_server) and not is_there(workers[0][0]))
