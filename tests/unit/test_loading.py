"""From a file to a served program: how each file is loaded, and which files are refused with a fix."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepwell_server import program_file
from stepwell_server.catalog.files.programs import load_program
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.host.job import Progress
from stepwell_server.compile.host.limits import Limits
from stepwell_server.compile.host.source import opened
from stepwell_server.program import Program, ProofOptions
from support.engine.fake_executor import PLAIN


class Known(WarmCompiler):
    """Starts no process: it knows what comes of the one file."""

    def __init__(self, agreeing: tuple[int, ...] = (1, 2)) -> None:
        super().__init__(Path("cache"))
        self._agreeing = agreeing

    def settle(
        self, model: Path, progress: Progress | None = None, limits: Limits | None = None
    ) -> tuple[Program, tuple[int, ...], tuple[int, ...]]:
        assert progress is not None
        progress("load")
        progress("check")
        return program_file.load(model), (1, 2, 4), self._agreeing


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "forecast.stepwell"
    program_file.save(dataclasses.replace(PLAIN, files={"program.tflite": b"TFL3"}), path)
    return path


def test_a_compiled_model_is_read_and_tried_here_and_nothing_is_compiled(file: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    program = load_program(file, Known(), progress=stages.append)
    assert (program.fingerprint, program.batch_sizes) == (PLAIN.fingerprint, (1, 2))
    assert stages == ["load", "check"]
    renamed = file.rename(tmp_path / "forecast.bin")  # its content says what it is
    assert load_program(renamed, Known(), stages.append).fingerprint == PLAIN.fingerprint
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ModelError, match=r"forecast\.bin: no batch size gives a row the same bits"):
        load_program(renamed, Known(()), stages.append)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"options": ProofOptions(trust=True)},
            ModelError,
            r"is already compiled: --probe-steps and --trust-causality",
        ),
        ({"options": ProofOptions(steps=600)}, ModelError, r"are for stepwell compile, which made it"),
        (
            {"data": Path("x.npy")},
            DataError,
            r"its Keras model is needed to compare with; name the .keras file",
        ),
    ],
)
def test_what_can_be_said_only_where_it_is_compiled_is_refused(
    options: dict[str, Any], kind: type[Exception], message: str, file: Path
) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_program(file, Known(), **options)
    assert str(file) in str(caught.value)


def _folder(path: Path) -> None:
    path.mkdir()


def _dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize("suffix", [".keras", ".stepwell", ""])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (None, r"there is no such file"),
        (_folder, r"is a folder; give the file in it"),
        (_dangling, r"is a symbolic link to /.*/gone, and there is no such file"),
        (_loop, r"is a symbolic link that leads back to itself"),
        (os.mkfifo, r"must be a file; it is a pipe \(FIFO\)"),
        (_socket, r"must be a file; it is a socket"),
    ],
)
def test_what_is_no_file_is_refused_at_once(
    make: Callable[[Path], None] | None, says: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"model{suffix}"
    if make is not None:
        make(path)
    with pytest.raises(ModelError, match=f"^{re.escape(str(path))}: {says}"):
        load_program(path, Known())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all files")
def test_what_must_not_be_read_is_refused(file: Path) -> None:
    file.chmod(0)
    with pytest.raises(ModelError, match=r"forecast\.stepwell: cannot be read: Permission denied"):
        load_program(file, Known())


def test_an_empty_file_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    (tmp_path / "empty.keras").touch()
    with pytest.raises(ModelError, match=r"empty\.keras: is empty; save the model with model\.save"):
        load_program(tmp_path / "empty.keras", Known())


def test_a_copy_is_of_what_was_read(tmp_path: Path) -> None:
    file = tmp_path / "model.keras"
    file.write_bytes(b"x" * 3_000_000)
    with opened(file) as source:
        assert source.sha256() == hashlib.sha256(file.read_bytes()).digest()
        source.copy(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == file.read_bytes()
    with opened(file) as source:
        source.sha256()
        with file.open("r+b") as changed:
            changed.write(b"y")
        with pytest.raises(
            ModelError, match=r"model\.keras: the file changed while it was read; write a model"
        ):
            source.copy(tmp_path / "other")
    with opened(file) as source:
        first = source.sha256()
        other = tmp_path / "renamed.keras"
        other.write_bytes(b"another")
        other.replace(file)  # what is open stays as it was
        source.copy(tmp_path / "whole")
    assert hashlib.sha256((tmp_path / "whole").read_bytes()).digest() == first


def test_a_file_that_changes_in_the_middle_of_reading_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.keras"
    file.write_bytes(b"x" * 3_000_000)
    read = os.pread

    def changing(descriptor: int, size: int, place: int) -> bytes:
        if place:
            with file.open("ab") as changed:
                changed.write(b"y")
        return read(descriptor, size, place)

    monkeypatch.setattr(os, "pread", changing)
    with opened(file) as source, pytest.raises(ModelError, match="the file changed while it was read"):
        source.sha256()


def test_a_copy_for_which_there_is_no_room_is_refused(file: Path) -> None:
    with (
        opened(file) as source,
        pytest.raises(ModelError, match=r"cannot be copied to /dev for the compiler: .+"),
    ):
        source.copy(Path("/dev/full"))


def test_without_the_frameworks_a_keras_file_is_refused_with_two_fixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forecast.keras").write_bytes(b"PK")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name != "h5py" else "there")
    with pytest.raises(ModelError) as caught:
        load_program(tmp_path / "forecast.keras", Known())
    assert str(caught.value) == (
        f"{tmp_path / 'forecast.keras'}: must be compiled, but the required packages are not installed (tensorflow, keras): "
        "pip install '.[server]' ./server/front (in a clone of Stepwell); or compile it where they are, by: stepwell compile forecast.keras -o "
        "forecast.stepwell, and serve that file"
    )
