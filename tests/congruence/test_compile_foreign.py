"""Files of Keras 2, and models in other forms than a ``.keras`` file: the refusal names each form and a fix that works."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError
from support.models import programs, zoo
from support.models.warm_compiler import compile_program


def refusal_of(path: Path) -> str:
    from stepwell_server.compile.keras_file.archive import load_model

    with pytest.raises(ModelError) as caught:
        load_model(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said


def as_keras2_writes(layer: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a layer as tf_keras writes it: other names, and what Keras 3 no longer knows."""
    config = dict(layer["config"])
    if "batch_shape" in config:
        config["batch_input_shape"] = config.pop("batch_shape")
    if layer["class_name"] in {"LSTM", "GRU"}:
        config["time_major"] = False
    config["dtype"] = "float32"
    return {**layer, "config": config}


def keras2_file(folder: Path, version: str = "2.15.0") -> Path:
    """A small ``.keras`` file with what tf_keras writes, made from one of Keras 3."""
    old = folder / "old.keras"
    with zipfile.ZipFile(programs.saved("lstm_dense").path) as source, zipfile.ZipFile(old, "w") as target:
        config = json.loads(source.read("config.json"))
        config["config"]["layers"] = [as_keras2_writes(layer) for layer in config["config"]["layers"]]
        config["module"] = "tf_keras.src.engine.functional"
        target.writestr("metadata.json", json.dumps({"keras_version": version, "date_saved": "2024-01-01"}))
        target.writestr("config.json", json.dumps(config))
        target.writestr("model.weights.h5", source.read("model.weights.h5"))
    return old


@pytest.mark.parametrize("version", ["2.15.0", "2.21.0"])
def test_a_file_of_keras_2_is_refused_before_it_is_loaded(version: str, tmp_path: Path) -> None:
    said = refusal_of(keras2_file(tmp_path, version))
    assert f"saved by Keras {version}: Stepwell serves .keras files of Keras 3" in said
    assert "model.load_weights('old.keras')" in said
    assert "time_major" not in said


def test_the_fix_for_keras_2_files_works(tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import load_model

    old = keras2_file(tmp_path)
    rebuilt = zoo.build("lstm_dense", seed=1)
    rebuilt.load_weights(old)
    rebuilt.save(tmp_path / "name.keras")
    loaded = load_model(tmp_path / "name.keras")
    for one, two in zip(loaded.get_weights(), zoo.build("lstm_dense").get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_file_that_does_not_say_its_version_is_refused(tmp_path: Path) -> None:
    old = keras2_file(tmp_path)
    with zipfile.ZipFile(programs.saved("lstm_dense").path) as source, zipfile.ZipFile(old, "w") as target:
        for member in source.namelist():
            target.writestr(member, b"[]" if member == "metadata.json" else source.read(member))
    assert "metadata.json does not say keras_version" in refusal_of(old)


def test_a_legacy_hdf5_file_is_refused_with_a_fix(keras: Any, tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import load_model

    file = tmp_path / "model.h5"
    zoo.build("lstm_dense").save(file)
    said = refusal_of(file)
    assert "a legacy HDF5 file: " in said
    assert "keras.models.load_model('model.h5').save('name.keras')" in said
    keras.models.load_model(file, compile=False).save(tmp_path / "name.keras")  # the fix
    load_model(tmp_path / "name.keras")
    with h5py.File(file, "a") as content:
        content.attrs["keras_version"] = "2.15.0"
    said = refusal_of(file)
    assert "a legacy HDF5 file, saved by Keras 2.15.0: " in said
    assert "model.load_weights('model.h5')" in said
    rebuilt = zoo.build("lstm_dense", seed=1)
    rebuilt.load_weights(file)  # the fix
    for one, two in zip(rebuilt.get_weights(), zoo.build("lstm_dense").get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_hdf5_under_the_name_of_a_keras_file_is_to_be_renamed(tmp_path: Path) -> None:
    """Keras 2 wrote such files before 2.12."""
    zoo.build("lstm_dense").save(tmp_path / "old.h5")
    (tmp_path / "old.h5").rename(tmp_path / "old.keras")
    said = refusal_of(tmp_path / "old.keras")
    assert "rename it to old.h5, save it as one: keras.models.load_model('old.h5')" in said


def test_a_file_of_weights_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.weights.h5"
    zoo.build("lstm_dense").save_weights(file)
    said = refusal_of(file)
    assert "an HDF5 file without a model" in said
    assert "model.load_weights('model.weights.h5')" in said
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert "a corrupt HDF5 file: " in refusal_of(file)


def test_a_saved_model_folder_is_refused(tmp_path: Path) -> None:
    zoo.build("lstm_dense").export(tmp_path / "exported", verbose=False)
    assert "is a SavedModel folder, which holds a graph" in refusal_of(tmp_path / "exported")
    with pytest.raises(ModelError, match=r"exported: is a SavedModel folder"):
        compile_program(tmp_path / "exported", tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"is empty; save the model with model\.save"),
        (
            pickle.dumps({"weights": [1, 2]}),
            r"is a Python pickle, which is never loaded.*load it where it was created",
        ),
        (b"abcdTFL3rest", r"is a LiteRT file \(\.tflite\), which holds no Keras model; save the model"),
    ],
    ids=["empty", "pickle", "litert"],
)
def test_other_files_are_called_what_they_are(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(content)
    assert re.search(says, refusal_of(tmp_path / "model.keras"))


def test_a_folder_is_refused_with_a_fix(tmp_path: Path) -> None:
    assert "is a folder; give the file in it that model.save('name.keras') wrote" in refusal_of(tmp_path)


def _edited(folder: Path, config: Any = None, version: str = "") -> Path:
    """A small ``.keras`` file with another configuration or another version of Keras."""
    with (
        zipfile.ZipFile(programs.saved("lstm_dense").path) as source,
        zipfile.ZipFile(folder / "x.keras", "w") as target,
    ):
        for member in source.namelist():
            content: str | bytes = source.read(member)
            if member == "metadata.json" and version:
                content = json.dumps({"keras_version": version})
            if member == "config.json" and config is not None:
                content = config if isinstance(config, str) else json.dumps(config(json.loads(content)))
            target.writestr(member, content)
    return folder / "x.keras"


def _changed(place: int = 1, **options: Any) -> Any:
    """Changes options of a layer; ``kind`` is its class."""

    def change(config: Any) -> Any:
        layer = config["config"]["layers"][place]
        layer["class_name"] = options.pop("kind", layer["class_name"])
        layer["config"] |= options
        return config

    return change


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
@pytest.mark.parametrize(
    ("config", "version", "says"),
    [
        ("{", "", r"corrupt \.keras file: config\.json is not JSON"),
        ("[]", "", r"corrupt \.keras file: config\.json does not say class_name and config"),
        (_changed(kind="LSTMX"), "", r"unknown class 'LSTMX'; register it with .* --import MODULE"),
        (_changed(activation="nope"), "", r"unknown activation 'nope'; register it with"),
        (
            _changed(-1, units=5),
            "",
            r"the weights in the file do not fit: layer 'y' \(Dense\) has one of the shape",
        ),
        (_changed(later=True), "3.99.0", r"it was saved by Keras 3\.99\.0: install that version, or save"),
    ],
    ids=["no_json", "a_list", "class", "activation", "shapes", "newer"],
)
def test_errors_of_keras_are_reported_in_plain_words(
    config: Any, version: str, says: str, tmp_path: Path
) -> None:
    said = refusal_of(_edited(tmp_path, config, version))
    assert re.search(says, said), said
    assert "<class" not in said


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`:UserWarning")
def test_a_lambda_among_the_arguments_of_a_layer_is_code(keras: Any, tmp_path: Path) -> None:
    x = keras.Input((None, 3))
    keras.Model(x, keras.layers.Dense(2, activation=lambda y: y)(x)).save(tmp_path / "model.keras")
    assert "refused by Keras's safe mode: it contains a Lambda layer, a lambda" in refusal_of(
        tmp_path / "model.keras"
    )


def test_weights_that_begin_where_hdf5_looks_make_no_hdf5_file(keras: Any, tmp_path: Path) -> None:
    x = keras.Input((None, 3))
    keras.Model(x, keras.layers.LSTM(2, return_sequences=True)(x)).save(tmp_path / "saved.keras")
    with (
        zipfile.ZipFile(tmp_path / "saved.keras") as saved,
        zipfile.ZipFile(tmp_path / "model.keras", "w") as moved,
    ):
        for info in sorted(saved.infolist(), key=lambda info: info.filename.endswith(".h5")):
            if info.filename.endswith(".h5"):
                assert moved.fp is not None
                headers = 2 * 30 + len("room") + len(info.filename)
                moved.writestr("room", bytes(8192 - moved.fp.tell() - headers))
            moved.writestr(info.filename, saved.read(info))
    assert h5py.is_hdf5(tmp_path / "model.keras")
    from stepwell_server.compile.keras_file.archive import check_archive

    check_archive(tmp_path / "model.keras")
