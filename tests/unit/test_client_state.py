"""A state is a value: compared, saved whole or not at all, loaded elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stepwell._state.file import write_atomically
from stepwell._state.state import State
from stepwell._state.tensors import Array


def state(value: float = 1.0, fingerprint: str = "f00d") -> State:
    tensors: dict[str, Array] = {
        "lstm/h": np.full((2, 4), value, np.float32),
        "a/count": np.arange(2),
        "b": np.ones((2, 1), "f2"),
    }
    return State(tensors, model="m", fingerprint=fingerprint, batch_size=2, revision=7, position=9)


def test_it_is_a_mapping_in_the_models_order() -> None:
    one = state()
    assert (list(one), len(one), one["a/count"].tolist()) == (["lstm/h", "a/count", "b"], 3, [0, 1])
    assert "lstm/h" in repr(one)


def test_equality_is_of_bytes_and_fingerprint() -> None:
    assert state() == state()
    assert state(float("nan")) == state(float("nan"))
    assert state(0.0) != state(-0.0)
    assert state() != state(fingerprint="beef")
    assert state() != dict(state())


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "user-42.safetensors"
    state().save(path)
    back = State.load(str(path))
    assert (back, list(back)) == (state(), list(state()))
    for name in ("model", "fingerprint", "batch_size", "revision", "position"):
        assert getattr(back, name) == getattr(state(), name)
    assert {name: array.dtype for name, array in back.items()} == {
        name: array.dtype for name, array in state().items()
    }


def test_a_state_without_tensors_is_saved_and_loaded(tmp_path: Path) -> None:
    """That of a model without recurrent layers."""
    empty = State({}, model="m", fingerprint="f", batch_size=2, revision=3, position=4)
    empty.save(tmp_path / "s")
    loaded = State.load(tmp_path / "s")
    assert loaded == empty
    assert (loaded.model, loaded.batch_size, loaded.revision, loaded.position) == ("m", 2, 3, 4)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4.0)[:, None],
        np.arange(8.0).reshape(1, 8)[:, ::2],
        np.asfortranarray(np.arange(6.0).reshape(1, 6)),
        np.broadcast_to(np.float32(3), (3, 1)),
        np.arange(6.0)[::-1].reshape(6, 1)[::2],
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
    ],
    ids=["column", "row", "row_of_fortran", "column_of_one_number", "column_backwards", "transposed"],
)
def test_an_array_is_saved_as_it_reads_whatever_its_strides(array: Array, tmp_path: Path) -> None:
    one = State({"h": array}, model="m", fingerprint="f", batch_size=len(array))
    one.save(tmp_path / "s")
    assert State.load(tmp_path / "s") == one


def test_an_old_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    state(1.0).save(path)
    state(2.0).save(path)
    assert State.load(path) == state(2.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_an_error_of_a_file_is_pythons_and_names_the_callers_path(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere" / "s")
    with pytest.raises(FileNotFoundError) as caught:
        state().save(nowhere)
    assert caught.value.filename == nowhere
    with pytest.raises(FileNotFoundError) as caught:
        State.load(nowhere)
    assert caught.value.filename == nowhere
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as moved:
        state().save(tmp_path / "folder")
    assert moved.value.filename == str(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    state(1.0).save(path)

    def full(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(str(path), b"half")
    assert State.load(path) == state(1.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
