"""A model whose operations look back, on a real server: its windows are state like all state."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell.cli.models import facts
from support.models import causal, programs
from support.servers.fork_server import ForkedServer
from support.servers.valkey_servers import Valkey


def _close(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def served(name: str, folder: Path) -> tuple[Any, ForkedServer]:
    """Build a causal model, and a server of it as `m` that keeps sessions on disk."""
    model: Any = causal.build(name)
    model.save(folder / "model.keras")
    return model, ForkedServer(
        {"m": folder / "model.keras"},
        data_dir=folder / "data",
        cache_dir=programs.cache_dir(),
        start_timeout_s=100,
    )


@pytest.mark.slow
# Keras calls numpy in a way that numpy 2 deprecates, when it saves a model.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_windows_are_read_set_forked_reset_traced_and_outlive_a_kill(tmp_path: Path) -> None:
    model, server = served("around_an_lstm", tmp_path)
    x = np.random.default_rng(5).standard_normal((2, 24, 4)).astype(np.float32)
    whole = np.asarray(model(x))
    with server, stepwell.connect(server.address) as client:
        session = client.open_session("m", batch_size=2, session_id="one")
        _close(session.step(x[:, :7]), whole[:, :7])
        state = session.get_state()
        (window,) = (name for name in state if name.startswith("conv1d") and name.endswith("/last"))
        assert set(state) == {"lstm/h", "lstm/c", window, "behind/last"}
        np.testing.assert_array_equal(state[window], x[:, 5:7])
        info = client.model("m")
        assert {spec.name: spec.window for spec in info.state if spec.window} == {window: 2, "behind/last": 3}
        assert (info.state_row_bytes, info.changed_state_row_bytes) == (4 * (8 + 20), 4 * (8 + 8))
        shown = dict(facts(info))
        assert "behind/last float32 (B, 3, 4): the last 3 time steps" in shown["state"].splitlines()
        assert shown["state size"] == "112 bytes per row; a time step replaces 64"
        assert shown["cost"] == f"{3 * 4 * 4 + 4 * 8 * 4 + 4 * 4 * 4} multiply-adds per row and time step"

        twin = session.fork()
        server.kill()
        server.restart()
        _close(session.step(x[:, 7:9]), whole[:, 7:9])
        traced = session.trace(x[:, 9:12])
        np.testing.assert_array_equal(traced.states[window][:, 1], x[:, 9:11])
        _close(twin.step(x[:, 7]), whole[:, 7])

        session.reset_states(rows=[1])
        after = session.step(x[:, 12:15])
        _close(after[0], whole[0, 12:15])
        _close(after[1], np.asarray(model(x[1:, 12:15]))[0])
        session.reset_states(state)
        _close(session.step(x[:, 7:20]), whole[:, 7:20])
        moved = {**state, window: np.ones((2, 2, 4), np.float32)}
        session.reset_states(moved)
        session.step(x[:, :1])
        np.testing.assert_array_equal(session.get_state()[window][:, 0], np.ones((2, 4), np.float32))
        session.reset_states()
        _close(session.step(x), whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_rings_are_stepped_alone_and_together_forked_set_and_outlive_a_kill(tmp_path: Path) -> None:
    model, server = served("conv_dilated", tmp_path)
    x = np.random.default_rng(6).standard_normal((3, 90, 4)).astype(np.float32)
    whole = np.asarray(model(x))
    with server, stepwell.connect(server.address) as client:
        group = client.open_sessions("m", 3)
        for time in range(40):
            _close(group.step(x[:, time]), whole[:, time])
        (name,) = state = group[1].get_state()
        assert state[name].shape == (1, 32, 4)
        np.testing.assert_array_equal(state[name], x[1:2, 8:40])

        twin = group[1].fork()
        server.kill()
        server.restart()
        for time in range(40, 43):
            _close(group.step(x[:, time]), whole[:, time])
            _close(twin.step(x[1:2, time]), whole[1:2, time])
        _close(group.step(x[:, 43:80]), whole[:, 43:80])
        _close(group[0].step(x[:1, 80]), whole[:1, 80])

        state.save(tmp_path / "state")
        twin.reset_states(stepwell.State.load(tmp_path / "state"))
        for time in range(40, 90):
            _close(twin.step(x[1:2, time]), whole[1:2, time])
        np.testing.assert_array_equal(twin.get_state()[name], x[1:2, 58:90])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts the bytes that a process wrote")
@pytest.mark.parametrize("is_shared", [False, True], ids=["disk", "valkey"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_step_writes_at_most_eight_times_what_it_changes(tmp_path: Path, is_shared: bool) -> None:
    """The window has 128 times the bytes of its new element, and a store once wrote all of it with each step."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    inputs = keras.Input((None, 256))
    model = keras.Model(inputs, keras.layers.Conv1D(8, 3, dilation_rate=64, padding="causal")(inputs))
    model.save(tmp_path / "model.keras")
    with ExitStack() as stack:
        valkey = stack.enter_context(Valkey(append="everysec")) if is_shared else None
        server = stack.enter_context(
            ForkedServer(
                {"m": tmp_path / "model.keras"},
                data_dir=None if valkey else tmp_path / "data",
                cache_dir=programs.cache_dir(),
                extra_args=["--store", valkey.url(), "--durability", "async"] if valkey else [],
                start_timeout_s=100,
            )
        )
        client = stack.enter_context(stepwell.connect(server.address))
        info = client.model("m")
        changed = info.changed_state_row_bytes + 4 * 8
        assert info.state_row_bytes == 128 * 256 * 4
        x = np.random.default_rng(3).standard_normal((8, 2, 256)).astype(np.float32)
        group, steps = client.open_sessions("m", 8), 200
        for several in (False, True):
            before = _written(valkey or server)
            for _ in range(steps):
                group.step(x if several else x[:, 0])
            written = (_written(valkey or server) - before) / steps / len(group)
            assert changed * (1 + several) < written < 8 * changed * (1 + several)


def _written(process: Any) -> int:
    """Return the bytes that a process wrote so far, to files and connections."""
    lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])
