"""A program as a file: what is saved is what is loaded, and whatever is wrong with a file is told in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepwell_server import program_file
from stepwell_server.program import (
    Architecture,
    Layer,
    Program,
    Proof,
    Provenance,
    StateSpec,
    TensorSpec,
    Trial,
)
from stepwell_server.program_file import ProgramFileError


def program(seed: int | None = None) -> Program:
    state = (
        StateSpec("a/h", (3,), "float32"),
        StateSpec("b", (2, 2), "int32", window=2),
        StateSpec("c", (), "bfloat16"),
    )
    rng = np.random.default_rng(seed)
    drawn = tuple((rng.standard_normal(spec.shape) * 9).astype(_dtype(spec.dtype)) for spec in state)
    zeros = tuple(np.zeros(spec.shape, _dtype(spec.dtype)) for spec in state)
    return Program(
        fingerprint="f" * 64,
        inputs=(
            TensorSpec("x", (3,), "float32", temporal=True),
            TensorSpec("id", (), "int64", temporal=False),
        ),
        outputs=(TensorSpec("y/ü", (2, 1), "float32", temporal=True),),
        state=state,
        initial=zeros if seed is None else drawn,
        executor="litert",
        executor_reason="because",
        batch_sizes=(1, 4),
        multiply_adds=77,
        files={"program.tflite": b"....TFL3" * 9},
        proof=Proof(512, "", 0.75),
        trial=Trial(
            (rng.standard_normal((5, 3)).astype("float32"), np.arange(5)),
            (rng.standard_normal((2, 2, 1)).astype("float32"),),
            1e-3,
            (1, 2, 4),
        ),
        provenance=Provenance(
            "forecast.keras",
            "a" * 64,
            1_700_000_000,
            {"stepwell": "0.1.0", "keras": "3.15"},
            "x86_64",
            123,
            (Layer("lstm", "LSTM", "(None, None, 8)", 123),),
        ),
        architecture=Architecture("e" * 64, '{"config":{"name":"#0"}}', ("lstm",), (("lstm", "lstm_1"),)),
    )


def _dtype(name: str) -> Any:
    from stepwell_server.program import dtype_of

    return dtype_of(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "forecast.stepwell"
    program_file.save(program(1), path)
    return path


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None], **options: Any) -> None:
    """Write the archive anew, with what ``change`` makes of its members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def in_manifest(path: Path, change: Callable[[Any], None]) -> None:
    def apply(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["stepwell.json"])
        change(manifest)
        members["stepwell.json"] = json.dumps(manifest).encode()

    rewritten(path, apply)


@pytest.mark.parametrize("seed", [None, 1])
def test_what_is_saved_is_loaded(seed: int | None, tmp_path: Path) -> None:
    saved, path = program(seed), tmp_path / "p.stepwell"
    program_file.save(saved, path)
    loaded = program_file.load(path)
    plain = [dataclasses.replace(item, initial=(), trial=None) for item in (saved, loaded)]
    assert plain[0] == plain[1]
    assert [spec.window for spec in loaded.state] == [0, 2, 0]
    assert saved.trial is not None
    assert loaded.trial is not None
    assert (saved.trial.tolerance, saved.trial.sizes) == (loaded.trial.tolerance, loaded.trial.sizes)
    arrays = [
        (*item.initial, *item.trial.inputs, *item.trial.outputs) for item in (saved, loaded) if item.trial
    ]
    for one, two in zip(*arrays, strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes())
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_an_older_compiler_has_no_costs(file: Path) -> None:
    def as_before(manifest: Any) -> None:
        del manifest["multiply_adds"]
        for state in manifest["state"]:
            del state["window"]

    in_manifest(file, as_before)
    loaded = program_file.load(file)
    assert (loaded.multiply_adds, {spec.window for spec in loaded.state}) == (None, {0})


def test_rings_are_kept_in_files_that_older_servers_refuse(tmp_path: Path) -> None:
    saved, path = program(1), tmp_path / "p.stepwell"
    ring = dataclasses.replace(saved.state[0], window=3, gap=2)
    program_file.save(dataclasses.replace(saved, state=(ring, *saved.state[1:])), path)
    assert [spec.gap for spec in program_file.load(path).state] == [2, 0, 0]
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("stepwell.json"))
    assert manifest["version"] == program_file.RING_VERSION
    assert ["gap" in state for state in manifest["state"]] == [True, False, False]


def test_the_same_program_gives_the_same_bytes_and_any_tool_finds_the_flatbuffer(tmp_path: Path) -> None:
    one, two = tmp_path / "one.stepwell", tmp_path / "two.stepwell"
    program_file.save(program(1), one)
    program_file.save(program_file.load(one), two)
    assert one.read_bytes() == two.read_bytes()
    with zipfile.ZipFile(one) as archive:
        assert archive.read("program.tflite") == program(1).files["program.tflite"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    assert program_file.is_program(one)
    renamed = one.rename(tmp_path / "other")
    assert program_file.is_program(renamed)


def test_a_file_that_cannot_be_written_leaves_what_was_there(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match=r"no space"):
        program_file.save(program(2), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_every_byte_that_is_changed_or_cut_off_is_noticed_or_changes_nothing(file: Path) -> None:
    content, whole = file.read_bytes(), program_file.load(file)
    rng = np.random.default_rng(5)
    for place in (*rng.integers(len(content), size=150), *range(0, len(content), 211)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        for tried in (bytes(damaged), content[:place]):
            file.write_bytes(tried)
            with contextlib.suppress(ProgramFileError):
                found = program_file.load(file)
                # a time stamp or a flag of the archive, which nobody reads
                assert (found.files, found.fingerprint) == (whole.files, whole.fingerprint)
                assert [x.tobytes() for x in found.initial] == [x.tobytes() for x in whole.initial]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(version=5),
            r"is of version 5 of its format, and this Stepwell reads 2 to 4: use a newer",
        ),
        (lambda m: m.update(version=1), r"is of version 1 .*: compile the model again"),
        (lambda m: m.update(version="1"), r"is of version '1'"),
        (lambda m: m.update(version="1" * 999), r"^is of version '1{39} of its format"),
        (lambda m: m["proof"].update(compared=math.nan), r"a number from 0 to 1 was expected; got nan"),
        (lambda m: m["state"].append(m["state"][0]), r"tensors must have different names; got '"),
        (lambda m: m.update(format="other"), r"does not say that its format is 'stepwell-program'"),
        (
            lambda m: m.pop("fingerprint"),
            r"corrupt .stepwell file: stepwell.json: it does not say 'fingerprint'",
        ),
        (lambda m: m.update(fingerprint=5), r"a text was expected; got 5"),
        (lambda m: m.update(inputs=None), r"corrupt .stepwell file: stepwell.json"),
        (lambda m: m["state"][0].update(shape=[-3]), r"a whole number from 0 to .* was expected; got -3"),
        (lambda m: m["state"][0].update(shape=[10**15]), r"its tensors are too large"),
        (lambda m: m["state"][0].update(shape=[4]), r"cannot reshape|reshape"),
        (lambda m: m["state"][0].update(gap=4), r"a ring must be a window of at least as many"),
        (lambda m: m["state"][0].update(dtype="object"), r"there is no type 'object'"),
        (
            lambda m: m["state"][1].update(window=3),
            r"a window of 3 time steps does not fit the shape \[2, 2\]",
        ),
        (lambda m: m["state"][2].update(window=1), r"a window of 1 time steps does not fit the shape \[\]"),
        (lambda m: m["state"][1].update(window=-1), r"a whole number from 0 to .* was expected; got -1"),
        (lambda m: m.update(multiply_adds=1.5), r"a whole number from 0 to .* was expected; got 1.5"),
        (lambda m: m["state"][0].update(dtype="U9"), r"there is no type 'U9'"),
        (
            lambda m: m["batch_sizes"].append(0),
            r"batch sizes must be at most 1024 from 1 to 1024; got \[1, 4, 0\]",
        ),
        (lambda m: m["trial"]["sizes"].append(10**9), r"batch sizes must be at most 1024 from 1 to 1024"),
        (lambda m: m.update(executor="tensorflow"), r"executor 'tensorflow' does not fit the files"),
        (lambda m: m.update(executor="python"), r"executor 'python' does not fit the files"),
        (lambda m: m["trial"].update(rows=0), r"a trial needs rows"),
        (lambda m: m["provenance"].update(source="\ud800"), r"surrogates not allowed"),
        (lambda m: m["provenance"].update(compiled_time=2**60), r"a whole number from 0 to 253402300799"),
        (lambda m: m["architecture"].update(structure=5), r"a text was expected; got 5"),
        (lambda m: m["architecture"]["ambiguous"].append([5]), r"a text was expected; got 5"),
        (lambda m: m.pop("architecture"), r"it does not say 'architecture'"),
        (lambda m: m["members"].pop("program.tflite"), r"its members are not those that stepwell.json names"),
        (lambda m: m["members"].update(more={}), r"its members are not those that stepwell.json names"),
        (
            lambda m: m["members"]["program.tflite"].update(sha256="0"),
            r"program.tflite does not match its digest",
        ),
        (lambda m: m["members"].update({"program.tflite": 5}), r"program.tflite does not match its digest"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    change: Callable[[Any], None], message: str, file: Path
) -> None:
    in_manifest(file, change)
    with pytest.raises(ProgramFileError, match=message):
        program_file.load(file)


def test_another_file_is_refused_with_a_fix(tmp_path: Path) -> None:
    path = tmp_path / "forecast.stepwell"
    with pytest.raises(ProgramFileError, match=r"there is no such file"):
        program_file.load(path)
    path.write_bytes(b"\x80\x05pickle")
    with pytest.raises(
        ProgramFileError, match=r"not a .stepwell file, or a truncated one; make it with: stepwell compile"
    ):
        program_file.load(path)
    for name, message in (
        ("config.json", r"contains a Keras model that is not compiled: .*stepwell compile NAME.keras"),
        ("other", r"it has no stepwell.json"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "{}")
        with pytest.raises(ProgramFileError, match=message):
            program_file.load(path)
    for text in ("[" * 100_000, "{", "[1]"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("stepwell.json", text)
        with pytest.raises(ProgramFileError, match=r"stepwell\.json"):
            program_file.load(path)
    assert not program_file.is_program(tmp_path / "nothing.keras")


def test_what_inflates_or_is_too_large_is_refused_before_it_is_read(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ProgramFileError, match=r"must be at most 100 bytes \(--max-model-bytes\); it is"):
        program_file.load(file, 100)
    rewritten(file, lambda _members: None, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ProgramFileError, match=r"stepwell.json must be stored without compression"):
        program_file.load(file)
    program_file.save(program(1), file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name == "program.tflite" else None)
    with pytest.raises(ProgramFileError, match=r"program.tflite must be stored without compression"):
        program_file.load(file)


def test_a_graph_for_tensorflow_is_loaded_by_the_cache_only(tmp_path: Path) -> None:
    path = tmp_path / "p.stepwell"
    on_tensorflow = dataclasses.replace(
        program(), executor="tensorflow", files={"saved_model/saved_model.pb": b"pb"}, trial=None
    )
    program_file.save(on_tensorflow, path)
    assert program_file.load(path, is_own=True).files == on_tensorflow.files
    with pytest.raises(ProgramFileError, match=r"must contain a LiteRT model: serve the .keras file instead"):
        program_file.load(path)


@pytest.mark.parametrize("name", ["../out", "/abs", "saved_model/../../out"])
def test_a_member_never_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.stepwell"
    hostile = dataclasses.replace(program(), executor="tensorflow", files={name: b"x"}, trial=None)
    program_file.save(hostile, path)
    with pytest.raises(ProgramFileError):
        program_file.load(path, is_own=True)


def test_sizes_in_bytes() -> None:
    assert [spec.row_bytes for spec in program().state] == [12, 16, 2]
    assert program().state_row_bytes == 30


def test_the_digests_are_those_of_the_members(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        manifest = json.loads(archive.read("stepwell.json"))
        for name, told in manifest["members"].items():
            content = archive.read(name)
            assert told == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
