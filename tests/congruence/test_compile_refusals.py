"""What cannot be served is refused with one line that names the reason; the model object stays whole."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError, NotCausalError
from support.models import zoo
from support.models.programs import compile_model

# Keras calls numpy in a way that numpy 2 deprecates, and warns of weights it does not restore.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Model 'never_built.*' had a build config:UserWarning"),
]


@pytest.mark.parametrize("name", list(zoo.REFUSED))
def test_a_model_that_cannot_be_stepped_is_refused(name: str, tmp_path: Path) -> None:
    zoo.build(name).save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match=zoo.REFUSED[name][1]) as caught:
        compile_model(tmp_path / "model.keras")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model.keras") in str(caught.value)
    said = str(caught.value)
    assert isinstance(caught.value, NotCausalError) == ("not causal" in said or "step by step" in said)


@pytest.mark.parametrize("name", ["seed_model", "bidirectional", "nested_sequential_fixed_time"])
def test_the_model_is_as_it_was_after_tracing(name: str) -> None:
    from stepwell_server.compile.probe.probe import trace_and_probe

    model = zoo.build(name)
    before = [dict(vars(layer)) for layer in model._flatten_layers()]
    try:
        trace_and_probe(model)
    except NotCausalError:
        assert name == "bidirectional"
    after = [dict(vars(layer)) for layer in model._flatten_layers()]
    for one, two in zip(before, after, strict=True):
        for patched in ("inner_loop", "call", "_assert_input_compatibility", "_maybe_config_dropout_masks"):
            assert one.get(patched) is two.get(patched), patched
        assert (one.get("stateful"), one.get("unroll")) == (two.get("stateful"), two.get("unroll"))


def _saved(tmp_path: Path) -> Path:
    zoo.build("lstm_dense").save(tmp_path / "whole.keras")
    return tmp_path / "whole.keras"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import load_model

    with pytest.raises(ModelError, match="there is no such file"):
        load_model(tmp_path / "none.keras")


@pytest.mark.parametrize("content", [np.random.default_rng(1).bytes(5000), b"hello\n" * 100])
def test_a_file_of_anything_is_refused(content: bytes, tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import load_model

    file = tmp_path / "noise.keras"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"not a \.keras file"):
        load_model(file)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import load_model

    content = _saved(tmp_path).read_bytes()
    file = tmp_path / "cut.keras"
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"truncated|corrupt"):
        load_model(file)


def test_a_file_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import load_model

    file = _saved(tmp_path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match="corrupt"):
        load_model(file)


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import load_model

    file = tmp_path / "other.keras"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_model(file)


def test_the_fingerprint_is_of_architecture_and_weights_not_of_the_file(tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import fingerprint

    model = zoo.build("deep_with_normalization")
    model.save(tmp_path / "one.keras")
    model.compile("adam", "mse", metrics=["mae"])
    model.save(tmp_path / "two.keras")
    assert fingerprint(tmp_path / "one.keras") == fingerprint(tmp_path / "two.keras")
    weight = model.weights[1]
    value = np.array(weight)
    value.flat[0] = np.nextafter(value.flat[0], np.float32(9))
    weight.assign(value)
    model.save(tmp_path / "three.keras")
    assert fingerprint(tmp_path / "one.keras") != fingerprint(tmp_path / "three.keras")
