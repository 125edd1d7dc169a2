"""Sessions of a model with large windows, of which the store keeps changes, while the server is killed again and again."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell.testing import LocalServer
from support.models import programs
from support.servers.valkey_servers import Valkey

KILLS, SESSIONS = 6, 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sync", "paged", "valkey"])
# Keras calls numpy in a way that numpy 2 deprecates, when it saves a model.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_output_is_right_whenever_the_server_is_killed(tmp_path: Path, kind: str) -> None:
    """A step that the kill interrupts is sent again. The windows reach back over many kills.

    `paged` has room for fewer rows than there are. `valkey` has two servers, and kills one of them.
    """
    from stepwell_server.compile.graph.tensorflow_setup import keras

    inputs = keras.Input((None, 32))
    model: Any = keras.Model(inputs, keras.layers.Conv1D(8, 3, dilation_rate=64, padding="causal")(inputs))
    model.save(tmp_path / "model.keras")
    chance, rng = random.Random(33), np.random.default_rng(33)
    x = rng.standard_normal((SESSIONS, 4000, 32)).astype(np.float32)
    whole, at = np.asarray(model(x)), [0] * SESSIONS
    with ExitStack() as stack:
        extra = {"sync": ["--durability", "sync"], "paged": ["--resident-rows", "3"]}.get(kind)
        if extra is None:
            extra = ["--store", stack.enter_context(Valkey(append="always")).url()]
        servers = [
            stack.enter_context(
                LocalServer(
                    {"m": tmp_path / "model.keras"},
                    data_dir=None if kind == "valkey" else tmp_path / "data",
                    cache_dir=programs.cache_dir(),
                    extra_args=extra,
                    start_timeout_s=100,
                )
            )
            for _ in range(1 + (kind == "valkey"))
        ]
        server = servers[0]
        client = stack.enter_context(stepwell.connect(",".join(each.address for each in servers)))
        sessions = [client.open_session("m", session_id=f"s{number}") for number in range(SESSIONS)]
        for _ in range(KILLS):
            is_killed = threading.Event()

            def kill(is_killed: threading.Event = is_killed) -> None:
                server.kill()
                is_killed.set()
                server.restart()

            killer = threading.Timer(chance.uniform(0.05, 0.5), kill)
            killer.start()
            steps_after = 0
            while steps_after < 30:
                steps_after += is_killed.is_set()
                number, steps = chance.randrange(SESSIONS), chance.choice([1, 1, 1, 1, 3, 40])
                if at[number] + steps > x.shape[1]:
                    break
                now = slice(at[number], at[number] + steps)
                answer = sessions[number].step(x[number : number + 1, now])
                np.testing.assert_allclose(answer, whole[number : number + 1, now], rtol=0, atol=2e-5)
                at[number] += steps
            killer.join()
        for number, session in enumerate(sessions):
            assert session.position == at[number]
    assert min(at) > 200
