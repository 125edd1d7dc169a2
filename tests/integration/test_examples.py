"""The programs in examples/, each run against a server as its own first lines say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import stepwell
from stepwell_server.compile.graph.tensorflow_setup import keras
from support.models import programs
from support.samples import ALL
from support.servers.fork_server import ForkedServer

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # Keras's own, when saving

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def models() -> dict[str, Path]:
    """The demo's model, not trained: what the examples show does not depend on that. And that of the policies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        builders = {
            "temperature": importlib.import_module("forecaster").build_model,
            "memory": importlib.import_module("memory").build_model,
        }
    models = {}
    for name, build in builders.items():
        keras.utils.set_random_seed(1)
        models[name] = programs.saved(name, build).path
    return models


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[ForkedServer]:
    with ForkedServer(models, cache_dir=programs.cache_dir(), start_timeout_s=100) as server:
        yield server


def run(example: str, server: ForkedServer, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments],
        cwd=folder,
        env={**os.environ, "STEPWELL_SERVER": server.address},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart(server: ForkedServer, tmp_path: Path) -> None:
    said = run("quickstart.py", server, tmp_path)
    assert re.findall(r"^hour (\d): .* °C in an hour$", said, re.MULTILINE) == list("123456789")
    state = stepwell.State.load(tmp_path / "user-42.safetensors")
    assert (state.model, state.position, list(state)) == ("temperature", 9, ["lstm/h", "lstm/c"])


def test_hidden_state(
    models: dict[str, Path], server: ForkedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(programs.cache_dir()))
    said = run("hidden_state.py", server, tmp_path, str(models["temperature"]), "made/hidden-state.png")
    assert said == "The picture is in made/hidden-state.png\n"
    assert (tmp_path / "made" / "hidden-state.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_async_users(server: ForkedServer, tmp_path: Path) -> None:
    said = run("async_users.py", server, tmp_path)
    assert "200 users came, made 48 steps each and went" in said
    assert "bit for bit" in said
    with stepwell.connect(server.address) as client:
        assert client.sessions(model="temperature") == []


@pytest.mark.slow
def test_environments(server: ForkedServer, tmp_path: Path) -> None:
    said = run("environments.py", server, tmp_path)
    episodes = re.findall(r"thermostat at (\d+) °C: reward +(-[\d.]+) an hour, (\d+) episodes", said)
    assert [celsius for celsius, _, _ in episodes] == ["10", "17", "20"]
    rewards = [float(reward) for _, reward, _ in episodes]
    assert rewards[2] == max(rewards), "heating to the comfortable temperature must pay"
    # 16 houses, 400 hours, episodes of at most 72: at least 5 whole ones in each house
    assert all(int(ended) >= 5 * 16 for _, _, ended in episodes)


@pytest.mark.slow
def test_recurrent_policy(server: ForkedServer, tmp_path: Path) -> None:
    """It learns, and what it learns needs the memory."""
    said = run("recurrent_policy.py", server, tmp_path, "--generations", "4", "--picture", "returns.png")
    returns = [int(one) for one in re.findall(r"generation \d: return (\d+)", said)]
    remembering, forgetting = returns[:4], returns[4:]
    assert remembering[-1] > 2 * remembering[0]
    assert remembering[-1] > 1.3 * max(forgetting)
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_policy_gradient(server: ForkedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New weights are played at once, and the episodes go on. A soak has enough updates to make them longer."""
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(tmp_path / "cache"))
    updates = 10 if ALL else 3
    said = run("policy_gradient.py", server, tmp_path, f"--updates={updates}", "--picture", "learning.png")
    assert said.startswith("Loading TensorFlow, "), "people see at once that it has begun"
    told = re.findall(
        rf"^update (\d+) of {updates}, \d+ s: version (\d+) played, episodes last (\d+) steps$",
        said,
        re.MULTILINE,
    )
    assert [update for update, _, _ in told] == [str(update) for update in range(1, updates + 1)]
    assert all(update == version for update, version, _ in told)
    assert not ALL or int(told[-1][2]) > 1.5 * int(told[0][2])
    assert (tmp_path / "learning.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tcn_forecaster(server: ForkedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares with Keras itself, and fails if it does not beat the forecasts that need no network."""
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(tmp_path / "cache"))
    said = run("tcn_forecaster.py", server, tmp_path)
    assert "A session keeps 12,096 bytes, of which an hour replaces 576" in said
    means = {
        name.strip(): [float(one) for one in row.split("│")]
        for name, row in re.findall(r"^│ ([\w ]+?) +│ ([\d.│ ]+) │$", said, re.MULTILINE)
    }
    assert list(means) == ["TCN", "as now", "as a day before"]
    assert means["TCN"][1] < 0.9 * min(means["as now"][1], means["as a day before"][1])


@pytest.mark.slow
@pytest.mark.soak  # 40 processor seconds; CI runs the other network that looks back
def test_keyword_spotter(server: ForkedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares its detections with those of Keras itself."""
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(tmp_path / "cache"))
    said = run("keyword_spotter.py", server, tmp_path)
    assert "a session keeps 2,880 bytes: gru/h, window/last, short/last, long/last" in said
    assert "one call of Keras over each whole recording: the same detections" in said
    heard = re.search(r"^(\d+) of (\d+) words noticed in .*; false alarms: (\d+)$", said, re.MULTILINE)
    assert heard is not None
    noticed, spoken, others = map(int, heard.groups())
    assert spoken > 50
    assert noticed > 0.9 * spoken
    assert others < 0.1 * spoken
    assert (tmp_path / "out" / "keyword_spotter.png").read_bytes().startswith(b"\x89PNG")


def _blocks_of_reinforcement_learning() -> list[str]:
    text = (EXAMPLES.parent / "docs" / "guides" / "reinforcement-learning.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_a_trainer_that_is_killed_continues_when_it_is_started_again(
    server: ForkedServer, tmp_path: Path
) -> None:
    """The trainer of the page, killed twice: each environment's steps are applied exactly once, in their order."""
    (block,) = (each for each in _blocks_of_reinforcement_learning() if "def train(" in each)
    trainer, observations = tmp_path / "trainer.py", tmp_path / "observations.npy"
    function = block[: block.index("states = train(")]
    trainer.write_text(
        "import sys\nimport numpy as np\nimport stepwell\n"
        f"{function}train(sys.argv[1], np.load(sys.argv[2])).save(sys.argv[3])\n"
    )
    inputs = np.random.default_rng(9).normal(size=(8, 40, 2)).astype(np.float32)
    np.save(observations, inputs)
    command = [
        sys.executable,
        str(trainer),
        server.address,
        str(observations),
        str(tmp_path / "end.safetensors"),
    ]
    said = []
    for kill_after in (5, 10, None):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            said.append(running.stdout.readline())
            if kill_after is not None:
                for _ in range(kill_after):
                    running.stdout.readline()
                running.kill()
            running.communicate(timeout=200)
        assert running.returncode == (0 if kill_after is None else -9)
    assert [line.split(" sessions")[0] for line in said] == ["0", "8", "8"]
    with stepwell.connect(server.address) as client:
        _, expected = client.predict("memory", inputs)
        assert client.sessions(prefix="env-") == []
    found = stepwell.State.load(tmp_path / "end.safetensors")
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in expected.items()
    }


@pytest.mark.slow
def test_the_page_of_reinforcement_learning(server: ForkedServer) -> None:
    """Its blocks run in order, in one namespace."""
    blocks = _blocks_of_reinforcement_learning()
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        source = block.replace("127.0.0.1:50051", server.address)
        exec(compile(source, "reinforcement-learning.md", "exec", dont_inherit=True), names)  # noqa: S102  our own documentation
