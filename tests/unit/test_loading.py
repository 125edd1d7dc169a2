"""From a file to the program that is served: which way it goes, and what is refused with the way on."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from stepwell_server import loading, program_file
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.limits import Limits
from stepwell_server.engine.executors import trial
from stepwell_server.loading import load_program
from stepwell_server.program import ProofOptions
from support.fake_executor import PLAIN


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "forecast.stepwell"
    program_file.save(dataclasses.replace(PLAIN, files={"program.tflite": b"TFL3"}), path)
    monkeypatch.setattr(
        trial, "settled", lambda program: dataclasses.replace(program, executor_reason="tried")
    )
    return path


def test_a_compiled_model_is_read_and_tried_here_and_nothing_is_compiled(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "compile_program", None)
    stages: list[str] = []
    program = load_program(file, tmp_path / "cache", progress=stages.append)
    assert (program.fingerprint, program.executor_reason) == (PLAIN.fingerprint, "tried")
    assert stages == ["load", "check"]
    renamed = file.rename(tmp_path / "forecast.bin")  # its content says what it is
    assert load_program(renamed, tmp_path / "cache").fingerprint == PLAIN.fingerprint
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"options": ProofOptions(trust=True)},
            ModelError,
            r"is compiled already: --probe-steps and --trust-causality",
        ),
        ({"options": ProofOptions(steps=600)}, ModelError, r"are for stepwell compile, which made it"),
        (
            {"data": Path("x.npy")},
            DataError,
            r"its Keras model is needed to compare with; name the .keras file",
        ),
        ({"limits": Limits(model_bytes=9)}, ModelError, r"must be at most 9 bytes \(--max-model-bytes\)"),
    ],
)
def test_what_can_be_said_only_where_it_is_compiled_is_refused(
    options: dict[str, Any], kind: type[Exception], message: str, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_program(file, tmp_path, **options)
    assert str(file) in str(caught.value)


def test_a_damaged_one_and_one_that_does_something_else_here_are_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_program: Any) -> Any:
        raise trial.TrialError("output 'y' has other values on this processor")

    monkeypatch.setattr(trial, "settled", fails)
    with pytest.raises(ModelError, match=r"forecast\.stepwell: output 'y' has other values"):
        load_program(file, tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"forecast\.stepwell: not a \.stepwell file, or a truncated one"):
        load_program(file, tmp_path)


def test_without_the_frameworks_a_keras_file_is_refused_with_both_ways_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forecast.keras").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name != "h5py" else "there")
    with pytest.raises(ModelError) as caught:
        load_program(tmp_path / "forecast.keras", tmp_path / "cache")
    assert str(caught.value) == (
        f"{tmp_path / 'forecast.keras'}: must be compiled, which needs packages that are not installed (tensorflow, keras): "
        "pip install 'stepwell[server]'; or compile it where they are, by: stepwell compile forecast.keras -o "
        "forecast.stepwell, and serve that file"
    )
