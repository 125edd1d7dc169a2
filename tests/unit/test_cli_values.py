"""Inputs as a command line gives them: JSON, numpy files, CSV."""

from __future__ import annotations

import io
from pathlib import Path

import click
import numpy as np
import pytest

from stepwell._state.infos import TensorInfo
from stepwell.cli.toolkit import values


def spec(name: str, dtype: str, shape: tuple[int, ...], temporal: bool = True) -> TensorInfo:
    return TensorInfo(name, dtype, shape, temporal)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[0.5, 1.5]]", {None: [[0.5, 1.5]]}),
        ("x=[[1, 2]]", {"x": [[1, 2]]}),
        ('{"x": [[1]], "y": [[2.5]]}', {"x": [[1]], "y": [[2.5]]}),
        ("input_layer_2=[[true]]", {"input_layer_2": [[True]]}),
    ],
)
def test_json_is_read_with_and_without_names(text: str, expected: dict[str | None, object]) -> None:
    found = values.read_input(text)

    assert {name: value.array.tolist() for name, value in found.items()} == expected


def test_json_is_read_from_a_file_and_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a=b.json"
    file.write_text("[[1.0]]")
    monkeypatch.setattr("sys.stdin", io.StringIO("[[2.0]]"))

    assert values.read_input(f"x=@{file}")["x"].array.tolist() == [[1.0]]
    assert values.read_input(f"@{file}")[None].array.tolist() == [[1.0]]
    assert values.read_input("-")[None].array.tolist() == [[2.0]]


def test_numpy_files_are_read(tmp_path: Path) -> None:
    x, y = np.random.default_rng(1).random((2, 1, 5, 3), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "both.npz", x=x, y=y)

    alone = values.read_input(f"{tmp_path}/x.npy")[None].array
    both = values.read_input(f"{tmp_path}/both.npz")

    assert alone.dtype == np.float32
    np.testing.assert_array_equal(alone, x)
    np.testing.assert_array_equal(both["y"].array, y)


@pytest.mark.parametrize("header", ["", "wind,rain\n", "\ufeffwind,rain\n"])
def test_csv_lines_are_time_steps(tmp_path: Path, header: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text(f"{header}1,2.5\n3,4\n\n5,6\n", encoding="utf-8")

    value = values.read_input(str(file))[None]

    assert value.is_csv
    assert value.array.tolist() == [[1, 2.5], [3, 4], [5, 6]]


def test_whole_numbers_of_csv_stay_whole_for_models_that_take_them(tmp_path: Path) -> None:
    file = tmp_path / "tokens.csv"
    file.write_text("token\n17\n4\n")

    given = values.read_input(str(file))
    fitted = values.fit([given], [spec("tokens", "int32", ())])

    assert (fitted["tokens"].dtype.kind, fitted["tokens"].tolist()) == ("i", [[17, 4]])


def save_damaged(folder: Path) -> None:
    np.save(folder / "huge.npy", np.zeros((1, 3)))
    data = (folder / "huge.npy").read_bytes()
    (folder / "huge.npy").write_bytes(data.replace(b"(1, 3)", b"(%d,)" % 10**15)[: len(data)])
    np.savez_compressed(folder / "damaged.npz", x=np.random.default_rng(1).random((50, 50)))
    packed = bytearray((folder / "damaged.npz").read_bytes())
    packed[200:260] = bytes(60)
    (folder / "damaged.npz").write_bytes(packed)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hello", "the value is not JSON"),
        ("[" * 100_000, "the value is not JSON"),
        ("[" * 70 + "1" + "]" * 70, "equal lengths"),
        ("[[1" + "0" * 5000 + "]]", "the value is not JSON"),
        ("[[1" + "0" * 50 + "]]", "numbers only"),
        ("[[1], [2, 3]]", "equal lengths"),
        ('[["a"]]', "numbers only"),
        ("[[null]]", "numbers only"),
        ('{"x": [[1], 2]}', "the value, x must be nested lists"),
        ('y={"x": [[1]]}', "y=... must be one input"),
        ("{folder}/text.npy", "is not a NumPy file"),
        ("{folder}/empty.npy", "is not a NumPy file"),
        ("{folder}/text.npz", "is not a NumPy file"),
        ("{folder}/pickle.npy", "is not a NumPy file"),
        ("{folder}/huge.npy", "is not a NumPy file"),
        ("{folder}/damaged.npz", "is not a NumPy file"),
        ("{folder}/head.csv", "has no line of numbers"),
        ("{folder}/ragged.csv", "ragged.csv: "),
        ("{folder}/words.csv", "words.csv: "),
        ("@{folder}/binary.json", "binary.json is not text"),
        ("{folder}/binary.csv", "binary.csv is not text"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    save_damaged(tmp_path)
    (tmp_path / "head.csv").write_text("wind,rain\n")
    (tmp_path / "ragged.csv").write_text("1,2\n3\n")
    (tmp_path / "words.csv").write_text("1,2\n3,rain\n")
    (tmp_path / "binary.json").write_bytes(b"\xff\x00")
    (tmp_path / "binary.csv").write_bytes(b"\xff\x00")

    with pytest.raises(ValueError, match=r".") as caught:
        values.read_input(text.replace("{folder}", str(tmp_path)))

    assert says in str(caught.value)


def test_whole_numbers_become_floats_where_the_model_has_floats() -> None:
    fitted = values.fit([values.read_input("[[1, 2, 3]]")], [spec("x", "float32", (3,))])

    assert fitted["x"].dtype == np.float32


def test_floats_stay_floats_where_the_model_has_integers() -> None:
    fitted = values.fit([values.read_input("[[1.5]]")], [spec("x", "int32", ())])

    assert fitted["x"].dtype == np.float64


def test_columns_of_csv_are_folded_into_features(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("1,2,3,4\n5,6,7,8\n")
    given = values.read_input(str(file))

    assert values.fit([given], [spec("x", "float32", (2, 2))])["x"].shape == (1, 2, 2, 2)
    assert values.fit([given], [spec("x", "float32", (3,))])["x"].shape == (1, 2, 4)
    assert values.fit([given], [spec("x", "float32", (4,), temporal=False)])["x"].shape == (2, 4)


def test_several_inputs_need_names() -> None:
    specs = [spec("x", "float32", (1,)), spec("y", "float32", (1,))]

    with pytest.raises(click.UsageError, match="the model's inputs are x, y"):
        values.fit([values.read_input("[[1]]")], specs)


def test_an_input_given_twice_is_refused() -> None:
    given = [values.read_input("x=[[1]]"), values.read_input("[[2]]")]

    with pytest.raises(click.UsageError, match="got x twice"):
        values.fit(given, [spec("x", "float32", (1,))])


def test_an_unknown_input_is_left_to_the_server_to_refuse() -> None:
    fitted = values.fit([values.read_input("z=[[1]]")], [spec("x", "float32", (1,))])

    assert list(fitted) == ["z"]
