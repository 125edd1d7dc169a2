"""A program held against Keras on the user's own sequences, and what the user may say about the proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server import program_file
from stepwell_server.compile.comparison import Comparison
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.program import Program, Proof, ProofOptions, TensorSpec
from support.models import programs, trusted, zoo
from support.models.programs import compile_model


@pytest.fixture
def forecast(lstm: Path) -> tuple[Path, Program]:
    """A model's file and its program."""
    return lstm, programs.program("lstm_dense")


def _with(value: float) -> Any:
    array = np.zeros((2, 5, 3))
    array[1, 3, 0] = value
    return array


def _sampler(size: int) -> Any:
    """Knows that the first input is an index into a table of ``size``."""
    from stepwell_server.compile.graph.interface import Interface
    from stepwell_server.compile.graph.samples import Sampler

    return Sampler(Interface(None, (), lambda _tensors: ((), {}), None), {0: size}, ())


def _saved(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


SPECS = [TensorSpec("x", (3,), "float32", temporal=True)]


def read(file: Path, specs: Sequence[TensorSpec] = SPECS, *sampler: Any) -> Any:
    from stepwell_server.compile.probe.own_data import read

    return read(file, specs, *sampler)


@pytest.mark.slow
def test_a_program_equals_the_model_it_was_made_from(forecast: tuple[Path, Program], tmp_path: Path) -> None:
    from stepwell_server.compile.probe.own_data import compare

    file, program = forecast
    np.save(tmp_path / "x.npy", np.random.default_rng(1).standard_normal((4, 30, 3)))
    found = compare(file, program, tmp_path / "x.npy")
    assert (found.rows, found.steps, [output.output for output in found.outputs]) == (4, 30, ["y"])
    assert len(found.outputs[0].by_step) == 30
    assert found.worst is not None
    assert found.worst.is_allowed
    assert found.outputs[0].largest[0] < 2e-6
    assert compare(file, program, None).steps == 512


def test_a_program_of_other_weights_is_found_out(forecast: tuple[Path, Program], tmp_path: Path) -> None:
    from stepwell_server.compile.probe.own_data import compare

    zoo.build("lstm_dense", seed=1).save(tmp_path / "other.keras")
    found = compare(tmp_path / "other.keras", forecast[1], None)
    assert found.worst is not None
    assert not found.worst.is_allowed
    assert "stepping does not compute what Keras does" in str(found.worst)
    assert Comparison.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros((1, 2, 3))}, r"must hold the inputs 'x'; got 'y'"),
        (
            {"x": np.zeros((2, 5, 4))},
            r"'x' must have the shape \(batch, T, 3\), none of them 0; got \(2, 5, 4\)",
        ),
        (
            {"x": np.zeros((0, 5, 3))},
            r"array 'x' must have the shape \(batch, T, features\.\.\.\), none of them 0; got \(0, 5, 3\)",
        ),
        ({"x": np.array([[["a", "b", "c"]]])}, r"array 'x' must be of real numbers; got <U1"),
        ({"x": _with(np.nan)}, r"array 'x' must be finite; got nan at \(1, 3, 0\)"),
        ({"x": np.zeros((2, 5, 3), complex)}, r"array 'x' must be of real numbers; got complex128"),
        ({"x": np.float32(3)}, r"array 'x' must have the shape .*; got \(\)"),
        ({"x": np.zeros((4, 1, 3))}, r"must have at least 2 time steps, so that a state is carried; got 1"),
        ({"x": _with(1e300)}, r"'x' must be finite float32; got 1e\+300 at row 1, time step 3"),
    ],
)
def test_data_that_do_not_fit_are_refused(arrays: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        read(_saved(tmp_path, **arrays))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 5, 4)), r"x\.npy: input 'x' must have the shape \(batch, T, 3\).*got \(2, 5, 4\)"),
        (np.zeros((2, 1, 3)), r"x\.npy: must have at least 2 time steps"),
    ],
)
def test_data_are_looked_at_before_the_model_is_compiled(
    array: Any, says: str, lstm: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", array)
    stages: list[str] = []
    with pytest.raises(DataError, match=says):
        compile_model(lstm, progress=stages.append, data=tmp_path / "x.npy")
    assert stages == ["load", "trace"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        (b"1,2,3\n", r"must be a NumPy \.npy or \.npz file of numbers"),
        (b"", r"must be a NumPy \.npy or \.npz file of numbers"),
    ],
    ids=["missing", "text", "empty"],
)
def test_files_that_hold_no_arrays_are_refused_before_a_process_starts(
    content: bytes | None, says: str, tmp_path: Path
) -> None:
    from support.models.warm_compiler import compile_program

    if content is not None:
        (tmp_path / "x.npy").write_bytes(content)
    with pytest.raises(DataError, match=says):
        compile_program(tmp_path / "none.keras", tmp_path / "cache", data=tmp_path / "x.npy")


def test_inputs_of_unlike_lengths_and_objects_are_refused(tmp_path: Path) -> None:
    specs = [TensorSpec(name, (3,), "float32", temporal=True) for name in ("x", "z")]
    file = _saved(tmp_path, x=np.zeros((2, 5, 3)), z=np.zeros((2, 6, 3)))
    with pytest.raises(ModelError, match="all inputs must have the same rows and time steps"):
        read(file, specs)
    np.save(tmp_path / "x.npy", np.zeros((2, 5, 3)))
    with pytest.raises(ModelError, match=r"the model has the inputs 'x', 'z': give an \.npz file"):
        read(tmp_path / "x.npy", specs)
    np.save(tmp_path / "objects.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(ModelError, match="must be a NumPy"):
        read(tmp_path / "objects.npy", specs[:1])


def test_indices_that_no_table_has_are_refused(tmp_path: Path) -> None:
    specs = [TensorSpec("tokens", (), "int32", temporal=True)]
    np.save(tmp_path / "x.npy", np.array([[0, 9], [3, 10]]))
    with pytest.raises(
        ModelError, match=r"'tokens' must be indices from 0 to 9; got 10 at row 1, time step 1"
    ):
        read(tmp_path / "x.npy", specs, _sampler(10))
    assert read(tmp_path / "x.npy", specs, _sampler(11))[1] == 2
    assert read(tmp_path / "x.npy", specs, dataclasses.replace(_sampler(10), is_guessed=True))[1] == 2


@pytest.mark.parametrize("content", [b"PK\x03\x04junk", b"", b"\x93NUMPY\x01"])
def test_a_damaged_file_is_its_users_affair(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.npz: must be a NumPy"):
        read(tmp_path / "x.npz")


def test_a_comparison_of_nothing_is_not_conclusive() -> None:
    from stepwell_server.compile.comparison import Difference

    nothing = Difference("y", 0.0, 0.0, 1.0, 0, 0, (0.0,), skipped=1.0)
    assert not Comparison(1, 1, (nothing,)).is_conclusive
    assert Comparison(1, 1, (dataclasses.replace(nothing, skipped=0.5),)).is_conclusive


def test_one_sequence_may_leave_out_the_batch(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 3)))
    arrays, steps = read(tmp_path / "x.npy")
    assert (arrays[0].shape, arrays[0].dtype.name, steps) == ((1, 5, 3), "float32", 5)


@pytest.mark.slow
def test_an_unknown_operation_needs_trust_and_is_then_shown_everywhere(tmp_path: Path) -> None:
    trusted.singular_values().save(tmp_path / "model.keras")
    with pytest.raises(
        ModelError,
        match=r"the model is not proven to be steppable: the layer 'svd' \(SingularValues\) uses the operation "
        r"Svd, which is not known .*--trust-causality NAME",
    ):
        compile_model(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras", options=ProofOptions(steps=700, trust=True))
    assert program.proof.steps == 700
    assert "Svd" in program.proof.unproven
    assert str(program.proof) == "trusted by --trust-causality, compared with Keras over 700 time steps"
    program_file.save(program, tmp_path / "program.stepwell")
    assert program_file.load(tmp_path / "program.stepwell", is_own=True).proof == program.proof


def test_the_proof_of_a_known_model_is_of_its_graph(forecast: tuple[Path, Program]) -> None:
    assert forecast[1].proof == Proof(steps=512)
    assert dataclasses.asdict(forecast[1].proof) == {
        "steps": 512,
        "unproven": "",
        "compared": 1.0,
        "rows": "",
    }
