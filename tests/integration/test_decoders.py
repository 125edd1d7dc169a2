"""A decoder with state inputs, on a real server: its states are those of a session, under the names of its inputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import stepwell
from stepwell.cli import main
from support.models import decoders, programs
from support.servers.fork_server import ForkedServer

pytestmark = [
    pytest.mark.slow,
    # Keras calls numpy in a way that numpy 2 deprecates, when it saves a model.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_PAGE = Path(__file__).parents[2] / "docs" / "guides" / "decoders.md"


def _close(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def _drawn(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_states_of_a_decoder_are_set_read_forked_and_outlive_a_kill(tmp_path: Path) -> None:
    model: Any = decoders.build("tutorial")
    model.save(tmp_path / "m.keras")
    (tmp_path / "m.toml").write_text('[state]\nstate_h = "lstm"\n[initial]\nstate_c = 0.25\n')
    x, h, c = _drawn(2, 12, 5), _drawn(2, 6, seed=2), _drawn(2, 6, seed=3)
    whole, last_h, last_c = (np.asarray(value) for value in model([x, h, c]))
    server = ForkedServer(
        {"m": tmp_path / "m.keras"},
        data_dir=tmp_path / "data",
        cache_dir=programs.cache_dir(),
        start_timeout_s=100,
    )
    with server, stepwell.connect(server.address) as client:
        assert [spec.name for spec in client.model("m").inputs] == ["x"]
        assert [spec.name for spec in client.model("m").outputs] == ["out"]
        session = client.open_session("m", batch_size=2, state={"state_h": h, "state_c": c}, session_id="one")
        _close(session.step(x[:, :5]), whole[:, :5])
        twin = session.fork()
        server.kill()
        server.restart()
        _close(session.step(x[:, 5]), whole[:, 5])
        _close(session.step(x[:, 6:]), whole[:, 6:])
        state = session.get_state()
        assert set(state) == {"state_h", "state_c"}
        _close(state["state_h"], last_h)
        _close(state["state_c"], last_c)
        _close(twin.step(x[:, 5:]), whole[:, 5:])

        session.reset_states({"state_h": h[1:], "state_c": c[1:]}, rows=[0])
        _close(session.step(x[[1, 1], :3])[0], whole[1, :3])
        session.reset_states()
        begun = [np.zeros((2, 6), np.float32), np.full((2, 6), 0.25, np.float32)]
        _close(session.step(x), np.asarray(model([x, *begun])[0]))
        with pytest.raises(stepwell.InvalidInputError, match="state_h"):
            client.open_session("m", batch_size=2, state={"state_h": h})


def test_a_decoder_gets_new_weights_and_its_sessions_continue(tmp_path: Path) -> None:
    """From a file of Keras; then from an upload of a compiled one, which brings initial values of states with it."""
    models: list[Any] = [decoders.build("tutorial", seed) for seed in (1, 2, 3)]
    for seed, model in enumerate(models):
        model.save(tmp_path / f"{seed}.keras")
    with_initial = tmp_path / "2.stepwell"
    made = _run("compile", str(tmp_path / "2.keras"), "-o", str(with_initial), "--initial", "state_h=0.5")
    assert made.exit_code == 0, made.output
    x, zero = _drawn(1, 9, 5), np.zeros((1, 6), np.float32)
    with (
        ForkedServer(
            {"m": tmp_path / "0.keras"},
            cache_dir=programs.cache_dir(),
            extra_args=["--allow-model-upload"],
            start_timeout_s=100,
        ) as server,
        stepwell.connect(server.address, timeout_s=100) as client,
    ):
        session, states = client.open_session("m"), [zero, zero]
        files = [None, tmp_path / "1.keras", with_initial]
        for first, model, file in zip((0, 3, 6), models, files, strict=True):
            if file is not None:
                client.update_model("m", file, upload=file is with_initial)
            now = x[:, first : first + 3]
            y, *states = (np.asarray(value) for value in model([now, *states]))
            _close(session.step(now), y)
            _close(session.get_state()["state_h"], states[0])
        begun = client.open_session("m").step(x)
        _close(begun, models[2]([x, np.full((1, 6), 0.5, np.float32), zero])[0])


def test_the_page_for_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of an encoder begin a session of a decoder, whose steps equal a loop over Keras."""
    models, session, loop = re.findall(r"^```python\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(models, names)  # noqa: S102  our own documentation
    with ForkedServer({"decoder": tmp_path / "decoder.keras"}, start_timeout_s=100) as server:
        exec(session.replace("127.0.0.1:50051", server.address), names)  # noqa: S102
    exec(loop, names)  # noqa: S102
    assert len(names["answers"]) == 10


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"STEPWELL_CACHE_DIR": str(programs.cache_dir())})


def test_the_command_that_inspects_shows_the_states(tmp_path: Path) -> None:
    file = tmp_path / "decoder.keras"
    decoders.build("tutorial").save(file)
    shown = _run("compile", str(file), "--inspect")
    assert shown.exit_code == 0, shown.output
    assert "state_h: float32[?, 6], the state before a step: lstm holds it after the step" in shown.stdout
    assert "lstm_1: float32[?, 6], the state 'state_c' after a step" in shown.stdout
    assert f"stepwell compile {file} --state state_h:lstm --state state_c:lstm_1" in shown.stdout
    shown = _run("compile", str(file), "--inspect", "--initial", "state_c=0.25")
    assert shown.stdout.endswith(" --state state_h:lstm --state state_c:lstm_1 --initial state_c=0.25\n")
    command = ("compile", str(file), "--inspect", "--json", "--state", "state_h:out")
    shown = _run(*command)
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["states"] == {"state_h": "lstm", "state_c": "lstm_1"}
    assert found["outputs"][0] == {"name": "out", "dtype": "float32", "shape": [None, None, 4]}
    assert found["problem"].startswith("--state state_h:out: must name the output that holds this state")
    refused = _run("compile", str(file), "--state", "state_h:out", "-o", str(tmp_path / "x.stepwell"))
    assert refused.exit_code == 2
    assert "that is 'lstm': --state state_h:lstm" in refused.stderr
    other = _run("compile", str(file), "--context", "x=3")
    assert "--context: is for a step function (.onnx)" in other.stderr
