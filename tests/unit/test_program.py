"""The compiled artefact on disk: what is saved is what is loaded, and damage is noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from stepwell_server.program import Program, StateSpec, TensorSpec


def _program(path: Path, seed: int | None = None) -> Program:
    state = (
        StateSpec("a/h", (3,), "float32"),
        StateSpec("b", (2, 2), "int32"),
        StateSpec("c", (), "float16"),
    )
    rng = np.random.default_rng(seed)
    drawn = tuple((rng.standard_normal(spec.shape) * 9).astype(spec.dtype) for spec in state)
    zeros = tuple(np.zeros(spec.shape, spec.dtype) for spec in state)
    return Program(
        fingerprint="f" * 64,
        inputs=(
            TensorSpec("x", (3,), "float32", temporal=True),
            TensorSpec("id", (), "int64", temporal=False),
        ),
        outputs=(TensorSpec("y/ü", (2, 1), "float32", temporal=True),),
        state=state,
        initial=zeros if seed is None else drawn,
        executor="tensorflow",
        executor_reason="because",
        batch_sizes=(1, 4),
        path=path,
    )


@pytest.mark.parametrize("seed", [None, 1])
def test_what_is_saved_is_loaded(seed: int | None, tmp_path: Path) -> None:
    program = _program(tmp_path, seed)
    program.save()
    assert (tmp_path / "initial.npz").exists() == (seed is not None)
    loaded = Program.load(tmp_path)
    plain = [dataclasses.replace(item, initial=()) for item in (program, loaded)]
    assert plain[0] == plain[1]
    for one, two in zip(program.initial, loaded.initial, strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        assert one.tobytes() == two.tobytes()


def test_sizes_in_bytes(tmp_path: Path) -> None:
    program = _program(tmp_path)
    assert [spec.row_bytes for spec in program.state] == [12, 16, 2]
    assert program.state_row_bytes == 30


def test_another_layout_version_is_refused(tmp_path: Path) -> None:
    _program(tmp_path).save()
    document = json.loads((tmp_path / "program.json").read_text())
    (tmp_path / "program.json").write_text(json.dumps(document | {"format": 999}))
    with pytest.raises(ValueError, match=r"format must be .*; got 999"):
        Program.load(tmp_path)


def test_a_missing_or_cut_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"program\.json"):
        Program.load(tmp_path)
    _program(tmp_path).save()
    text = (tmp_path / "program.json").read_text()
    (tmp_path / "program.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"."):
        Program.load(tmp_path)
