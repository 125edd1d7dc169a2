"""A model that is built and trained again in one process: its sessions go on, under the names that clients know."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stepwell
from stepwell import errors
from stepwell.cli import main
from support.models import programs
from support.servers.fork_server import ForkedServer

pytestmark = pytest.mark.plain("it loads models, for which a secured server wants an admin")
LIMIT_S = 200.0
_numbers = itertools.count(1)
PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "notebooks.md"


def unnamed(units: int = 4, *, depth: int = 1, rate: float = 0.0) -> Any:
    """What people write: no layer has a name."""
    import keras

    x = keras.Input((None, 3))
    y = keras.layers.LSTM(units, return_sequences=True, dropout=rate)(x)
    for _ in range(depth):
        y = keras.layers.Dense(2)(y)
    return keras.Model(x, y)


def branches() -> Any:
    """Two branches of which only names say which is which."""
    import keras

    x = keras.Input((None, 3))
    both = [keras.layers.LSTM(4, return_sequences=True)(x) for _ in range(2)]
    return keras.Model(x, keras.layers.Add()(both))


def two_sources(order: str, joined: str, width: int = 2) -> Any:
    """Two recurrent layers without names; each reads, and is read by, a layer that the user named."""
    import keras

    x = keras.Input((None, 3))
    layers = {one: keras.layers.LSTM(4, return_sequences=True) for one in order}
    sources = {"a": keras.layers.Dense(2, name="price")(x), "b": keras.layers.Dense(2, name="volume")(x)}
    y = keras.layers.Concatenate()([layers[one](sources[one]) for one in joined])
    return keras.Model(x, keras.layers.Dense(width, name="y")(y))


def expected(models: list[Any], inputs: list[Any]) -> list[Any]:
    """What Keras gives where each model runs one time step from the state that the one before left."""
    import keras

    state, outputs = None, []
    for model, x in zip(models, inputs, strict=True):
        lstm, dense = model.layers[1], model.layers[2]
        state = state or [np.zeros((len(x), lstm.units), np.float32)] * 2
        y, state = lstm.cell(x, state)
        outputs.append(keras.ops.convert_to_numpy(dense(y)))
    return outputs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedServer]:
    path = tmp_path_factory.mktemp("base") / "base.keras"
    unnamed().save(path)
    with ForkedServer({"base": path}, cache_dir=programs.cache_dir()) as server:
        yield server


@pytest.fixture
def client(server: ForkedServer) -> Iterator[stepwell.Client]:
    with stepwell.connect(server.address, timeout_s=LIMIT_S) as client:
        yield client


@pytest.fixture
def load(client: stepwell.Client) -> Iterator[Callable[[Any], tuple[str, stepwell.ModelInfo]]]:
    """Serve a model under a name that is nobody else's."""
    name = f"m-{next(_numbers)}"

    def loaded(model: Any) -> tuple[str, stepwell.ModelInfo]:
        return name, client.load_model(name, model)

    yield loaded
    client.unload_model(name, force=True)


def test_sessions_go_on_under_the_served_names(
    client: stepwell.Client, load: Callable[[Any], Any], tmp_path: Path
) -> None:
    models = [unnamed() for _ in range(3)]
    inputs = [np.random.default_rng(i).standard_normal((2, 3)).astype(np.float32) for i in range(4)]
    name, first = load(models[0])
    session = client.open_session(name, batch_size=2)
    told = [session.step(inputs[0])]
    before = session.get_state()
    before.save(tmp_path / "state.safetensors")
    second = client.update_model(name, models[1])
    assert (second.version, second.moved_sessions) == (2, 1)
    told.append(session.step(inputs[1]))
    third = client.load_model(name, models[2], sessions="carry")
    told.append(session.step(inputs[2]))
    for one, other in zip(told, expected(models, inputs[:3]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert first.state == second.state == third.state
    assert (first.inputs, first.outputs) == (third.inputs, third.outputs)
    assert first.structure == third.structure != ""
    assert first.fingerprint != third.fingerprint
    # a state of an earlier version fits, also from a file
    for state in (before, stepwell.State.load(tmp_path / "state.safetensors")):
        session.reset_states(state)
        y = session.step(inputs[3])
        _, wanted = expected([models[0], models[2]], [inputs[0], inputs[3]])
        np.testing.assert_allclose(y, wanted, atol=1e-5)
        with client.open_session(name, batch_size=2, state=state) as other:
            np.testing.assert_array_equal(other.step(inputs[3]), y)
    group = client.open_sessions(name, 2)
    group.reset_states(before)
    read = group.get_states()
    assert read.structure == third.structure
    for part in before:
        np.testing.assert_array_equal(read[part], before[part])


@pytest.mark.slow
def test_a_file_of_another_naming_fits(client: stepwell.Client, load: Callable[[Any], Any]) -> None:
    first, again = unnamed(), unnamed()
    again.set_weights(first.get_weights())
    name, info = load(first)
    state = client.predict(name, np.ones((2, 1, 3), np.float32))[1]
    other = f"{name}-again"
    second = client.load_model(other, again)
    try:
        assert second.fingerprint == info.fingerprint
        assert [spec.name for spec in second.state] != [spec.name for spec in info.state]
        session = client.open_session(other, batch_size=2, state=state)
        for one, value in zip(session.get_state().values(), state.values(), strict=True):
            np.testing.assert_array_equal(one, value)
        trained = client.update_model(other, unnamed())
        session.reset_states(session.get_state())
        with pytest.raises(
            errors.ModelMismatchError, match=r"of fingerprint .* or to a version of it with the same"
        ):
            session.reset_states(state)  # of other weights under another name
        assert trained.state == second.state
    finally:
        client.unload_model(other, force=True)


@pytest.mark.slow
def test_four_refused_tries_use_no_number(
    client: stepwell.Client, load: Callable[[Any], Any], tmp_path: Path
) -> None:
    name, info = load(unnamed())
    session = client.open_session(name)
    y = session.step(np.ones((1, 3), np.float32))
    broken = tmp_path / "broken.keras"
    broken.write_text("no model")
    for wrong, says in (
        (unnamed(5), r"\(LSTM\): units was 4 and is 5; .*sessions=keep or sessions=reset"),
        (
            unnamed(depth=2),
            r"layer 'dense_\d+' \(Dense\) is new; .*Give the layers the names that are served",
        ),
        (branches(), r"layer 'dense_?\d*' \(Dense\) is not there"),
    ):
        with pytest.raises(errors.ModelMismatchError, match=says) as caught:
            client.update_model(name, wrong)
        assert "migrate" not in caught.value.message
    with pytest.raises(errors.ModelLoadError, match="a new version of model"):
        client.update_model(name, broken)
    assert [one.version for one in client.model(name).versions] == [1]
    assert client.update_model(name, unnamed(rate=0.5)).version == 2
    assert session.step(np.ones((1, 3), np.float32)).shape == y.shape
    assert client.model(name).state == info.state


@pytest.mark.slow
def test_equal_names_of_layers_that_are_connected_in_another_way_are_no_proof(
    client: stepwell.Client, load: Callable[[Any], Any]
) -> None:
    import keras

    keras.backend.clear_session()
    name, info = load(two_sources("ab", "ab"))
    keras.backend.clear_session()
    exchanged = two_sources(
        "ba", "ba"
    )  # as a script that builds its branches in another order, in a process of its own
    assert [layer.name for layer in exchanged.layers if layer.name.startswith("lstm")] == ["lstm", "lstm_1"]
    with pytest.raises(
        errors.ModelMismatchError,
        match=r"Keras made up the names of the layers 'lstm' and 'lstm_1', and these layers are connected in another way,"
        r" .*; layer 'lstm' \(LSTM\) was called on 'price' and is called on 'volume' now; .*Give each of these layers the"
        r" name of the served layer that it stands for",
    ):
        client.update_model(name, exchanged)
    assert client.model(name).version == info.version == 1
    keras.backend.clear_session()
    deeper = two_sources("ab", "ab")
    y = keras.layers.Dense(2, name="z")(keras.layers.Dense(3)(deeper.output))
    with pytest.raises(errors.ModelMismatchError, match=r"output 'y' is missing; output 'z' is new"):
        client.update_model(name, keras.Model(deeper.input, y))
    y = keras.layers.Rescaling(0.5, name="y")(deeper.get_layer("y").input[..., :2])
    assert client.update_model(name, keras.Model(deeper.input, y)).version == 2  # the same connections


@pytest.mark.slow
def test_layers_that_could_change_places_are_named(
    client: stepwell.Client, load: Callable[[Any], Any]
) -> None:
    name, info = load(branches())
    with pytest.raises(errors.ModelMismatchError) as caught:
        client.update_model(name, branches())
    assert re.search(
        r"layers 'lstm_\d+' and 'lstm_\d+' are interchangeable: .*Give the layers the names that are served"
        r" \(name=\.\.\.\), or copy the weights into the first model \(old\.set_weights\(new\.get_weights\(\)\)\), or call"
        r" keras\.backend\.clear_session\(\)",
        caught.value.message,
    )
    assert client.model(name).version == info.version == 1


@pytest.mark.slow
def test_the_command_line_says_what_stays(
    client: stepwell.Client, server: ForkedServer, load: Callable[[Any], Any], tmp_path: Path
) -> None:
    name, _ = load(unnamed())
    for version in (2, 3):
        unnamed().save(tmp_path / f"{version}.keras")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["models", *arguments, "--server", server.address])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    client.open_session(name, session_id=f"{name}-a")
    assert (
        run("load", name, str(tmp_path / "2.keras")) == f"loaded {name}@2 (the default, 1 stay on {name}@1)\n"
    )
    assert run("load", name, str(tmp_path / "3.keras"), "--sessions", "carry") == (
        f"loaded {name}@3 (the default, 0 sessions moved, 1 stay on {name}@1)\n"
    )
    assert run("default", f"{name}@1") == f"{name}@1 is now the default\n"
    assert json.loads(run("default", f"{name}@1", "--json"))["is_default"]
    client.close_session(f"{name}-a")


@pytest.mark.slow
def test_names_stay_over_a_restart(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.keras" for name in ("first", "second", "third"))
    x = np.ones((1, 3), np.float32)
    for path in (first, second, third):
        unnamed().save(path)
    options: dict[str, Any] = {"cache_dir": programs.cache_dir(), "data_dir": tmp_path / "data"}
    with ForkedServer({"m": first}, **options) as server, stepwell.connect(server.address) as client:
        names = client.model("m").state
        session = client.open_session("m", session_id="a")
        session.step(x)
        assert client.update_model("m", second, timeout_s=LIMIT_S).state == names
        session.step(x)
        state = session.get_state()
    # The first version is gone, and the second one is on the command line, with names of its own.
    with ForkedServer({"m@2": second}, **options) as server, stepwell.connect(server.address) as client:
        assert client.model("m").state == names
        session = client.open_session("m", session_id="a")
        assert (session.revision, session.get_state()) == (2, state)
        assert client.update_model("m", third, timeout_s=LIMIT_S).state == names
        session.step(x)
        assert session.model_version == 3


@pytest.mark.slow
def test_the_model_of_the_page_is_updated_when_its_cell_is_run_again(client: stepwell.Client) -> None:
    cell = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    models = []
    for _ in range(2):
        scope: dict[str, Any] = {}
        exec(compile(cell, str(PAGE), "exec"), scope)  # noqa: S102 (the page's own code)
        models.append(scope["model"])
    info = client.load_model("forecast", models[0])
    try:
        session = client.open_session("forecast", batch_size=4)
        session.step(np.ones((4, 10, 3), np.float32))
        updated = client.update_model("forecast", models[1])
        assert (updated.version, updated.moved_sessions) == (2, 1)
        assert [spec.name for spec in updated.outputs] == ["y"]
        assert updated.outputs == info.outputs
        session.step(np.ones((4, 10, 3), np.float32))
    finally:
        client.unload_model("forecast", force=True)
