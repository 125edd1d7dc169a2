"""What cannot be served is refused with one line that names the reason; the model object stays whole."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("seed_model", marks=pytest.mark.slow),
        "bidirectional",
        pytest.param("nested_sequential_fixed_time", marks=pytest.mark.slow),
    ],
)
def test_the_model_is_as_it_was_after_tracing(trace_and_probe: Any, name: str) -> None:
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


def _flipped(whole: bytes) -> bytes:
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


def _other_archive(_whole: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return file.getvalue()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda _: np.random.default_rng(1).bytes(5000), r"not a \.keras file"),
        (lambda _: b"hello\n" * 100, r"not a \.keras file"),
        (lambda whole: whole[: len(whole) // 10], r"truncated|corrupt"),
        (lambda whole: whole[: len(whole) // 2], r"truncated|corrupt"),
        (lambda whole: whole[: int(len(whole) * 0.99)], r"truncated|corrupt"),
        (_flipped, "corrupt"),
        (_other_archive, r"it has no config\.json"),
        (None, "there is no such file"),
    ],
    ids=["noise", "text", "a tenth", "half", "almost all", "a flipped bit", "another archive", "no file"],
)
def test_a_damaged_file_is_refused(
    damage: Callable[[bytes], bytes] | None, says: str, lstm: Path, tmp_path: Path
) -> None:
    from stepwell_server.compile.keras_file.archive import load_model

    file = tmp_path / "damaged.keras"
    if damage is not None:
        file.write_bytes(damage(lstm.read_bytes()))
    with pytest.raises(ModelError, match=says):
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
