"""What a file may unpack to, and what the compiling process may take: each is refused by its own message."""

from __future__ import annotations

import dataclasses
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host.limits import Limits, default_memory_bytes, memory_of
from stepwell_server.compile.keras_file.sizes import check_sizes
from support.clock import ManualClock
from support.models.warm_compiler import compile_program

MIB = 1 << 20
ANY = Limits()


def with_member(model: Path, folder: Path, name: str, content: bytes, method: int) -> Path:
    """The same model with one more member, or another in its place."""
    file = folder / "other.keras"
    with zipfile.ZipFile(model) as source, zipfile.ZipFile(file, "w") as target:
        for member in source.namelist():
            if member != name:
                target.writestr(member, source.read(member))
        target.writestr(name, content, method)
    return file


def with_weights(model: Path, folder: Path, change: str, method: int = zipfile.ZIP_STORED) -> Path:
    """The same model with something else in its weights."""
    weights = folder / "weights.h5"
    with zipfile.ZipFile(model) as source:
        weights.write_bytes(source.read("model.weights.h5"))
    with h5py.File(weights, "a") as file:
        if change == "gzip":
            file.create_dataset("huge", (1 << 40,), "u1", chunks=(MIB,), compression="gzip")
        elif change == "chunk":
            file.create_dataset("chunk", (1,), "u1", chunks=(64 * MIB,), maxshape=(None,), compression="gzip")
        elif change == "external":
            other = folder / "elsewhere"
            other.write_bytes(b"secret")
            file.create_dataset("external", (6,), "u1", external=[(str(other), 0, 6)])
    return with_member(model, folder, "model.weights.h5", weights.read_bytes(), method)


def lying_size(file: Path, name: str, size: int) -> None:
    """Let a deflated member say that it is smaller than it is, with the checksum of its beginning."""
    with zipfile.ZipFile(file) as archive:
        checksum = zlib.crc32(archive.read(name)[:size])
    content = bytearray(file.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    while content[central + 46 : central + 46 + len(name)] != name.encode():
        central = content.rindex(b"PK\x01\x02", 0, central)
    struct.pack_into("<I", content, central + 16, checksum)
    struct.pack_into("<I", content, central + 24, size)
    file.write_bytes(content)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_file_is_judged_by_what_it_unpacks_to(method: int, lstm: Path, tmp_path: Path) -> None:
    file = with_member(lstm, tmp_path, "assets/zeros", bytes(8 * MIB), method)
    check_sizes(file, 9 * MIB)
    with pytest.raises(
        ModelError, match=r"at most 1048576 bytes .*\(--max-model-bytes\); it is 84\d{5} bytes"
    ):
        check_sizes(file, MIB)


def test_a_size_that_is_too_small_is_found(lstm: Path, tmp_path: Path) -> None:
    file = with_member(lstm, tmp_path, "assets/zeros", bytes(8 * MIB), zipfile.ZIP_DEFLATED)
    lying_size(file, "assets/zeros", 1000)
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None  # zipfile itself is content
    with pytest.raises(
        ModelError, match=r"corrupt \.keras file: assets/zeros does not have its declared size"
    ):
        check_sizes(file, MIB)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("change", ["gzip", "chunk"])
def test_arrays_are_judged_by_what_they_unpack_to(
    change: str, method: int, lstm: Path, tmp_path: Path
) -> None:
    file = with_weights(lstm, tmp_path, change, method)
    assert file.stat().st_size < MIB
    with pytest.raises(ModelError, match=r"at most 33554432 bytes .*\(--max-model-bytes\)"):
        check_sizes(file, 32 * MIB)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model, folder: with_member(
                model, folder, "assets/zeros", bytes(8 * MIB), zipfile.ZIP_LZMA
            ),
            "assets/zeros is compressed by a method that Keras does not use",
        ),
        (
            lambda model, folder: with_weights(model, folder, "external"),
            r"must contain its weights itself; 'external' is in another file",
        ),
        (
            lambda model, folder: with_member(
                model, folder, "model.weights.h5", b"no HDF5", zipfile.ZIP_STORED
            ),
            r"corrupt .keras file: model\.weights\.h5: ",
        ),
    ],
    ids=["compression", "external weights", "damaged weights"],
)
def test_invalid_members_are_refused(
    make: Callable[[Path, Path], Path], message: str, lstm: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        check_sizes(make(lstm, tmp_path), 9 * MIB)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_file_is_refused_and_nothing_worse(method: int, lstm: Path, tmp_path: Path) -> None:
    from stepwell_server.compile.keras_file.archive import check_archive

    file = tmp_path / "damaged.keras"
    with zipfile.ZipFile(lstm) as source, zipfile.ZipFile(file, "w", method) as target:
        for member in source.namelist():
            target.writestr(member, source.read(member))
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    said: list[str] = []
    for _ in range(400):
        content = bytearray(whole)
        for place in rng.choice([len(content), 400], 3):  # anywhere, or in the directory at the end
            content[-1 - int(rng.integers(place))] = int(rng.integers(256))
        file.write_bytes(content)
        for check in (check_archive, lambda path: check_sizes(path, 16 * MIB)):
            try:
                check(file)
            except ModelError as error:
                said.append(str(error))
    assert len(said) > 400
    assert not any("\n" in message for message in said)


def test_the_limit_holds_where_models_are_compiled(lstm: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"at most 1000 bytes when unpacked \(--max-model-bytes\)"):
        compile_program(lstm, tmp_path / "cache", limits=dataclasses.replace(ANY, model_bytes=1000))
    assert list((tmp_path / "cache").iterdir()) == []


def test_0_seconds_are_no_limit(lstm: Path, tmp_path: Path) -> None:
    clock = ManualClock()
    limits = dataclasses.replace(ANY, timeout_s=0.0)
    compile_program(lstm, tmp_path, (), lambda _stage: clock.advance(1e9), limits=limits, clock=clock)


WAITS = "import threading\nthreading.Event().wait()\n"
GREEDY = f"kept = b'x' * (1 << 30)\n{WAITS}"
FILLS = """
import os, tempfile, threading
kept = []
for number in range(70):
    make = (tempfile.NamedTemporaryFile, tempfile.TemporaryFile)[number % 2]
    file = make(dir=os.environ["TMPDIR"])
    os.posix_fallocate(file.fileno(), 0, 1 << 20)
    kept.append(file)
threading.Event().wait()
"""
SAYS = """
import os
for fd in os.listdir("/dev/fd"):
    if os.path.lexists(f"/dev/fd/{fd}") and "socket:" in os.readlink(f"/dev/fd/{fd}"):
        os.write(int(fd), b'x' * (1 << 21))
import threading
threading.Event().wait()
"""
STALLS = SAYS.replace("b'x' * (1 << 21)", """b'{"stage": "trace"}\\n{"stage": "pr'""")


linux_only = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux shows what a process has"
)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Write code into a module, and return what imports it into the compiling process."""

    def write(code: str) -> list[str]:
        (tmp_path / "hostile.py").write_text(code)
        monkeypatch.chdir(tmp_path)
        return ["hostile"]

    return write


@pytest.mark.parametrize(
    ("code", "stage"), [(WAITS, "load"), pytest.param(STALLS, "trace", marks=linux_only)]
)
def test_a_compilation_that_takes_too_long_is_ended(
    lstm: Path, tmp_path: Path, hostile: Callable[[str], list[str]], code: str, stage: str
) -> None:
    """Also in the middle of a message."""
    clock, limits = ManualClock(), dataclasses.replace(ANY, timeout_s=60.0)

    def report(begun: str) -> None:
        clock.advance(61 if begun == stage else 0)

    with pytest.raises(
        ModelError, match=rf"at most 60 s \(--compile-timeout-s\); it was ended in stage {stage}"
    ):
        compile_program(lstm, tmp_path / "cache", hostile(code), report, limits=limits, clock=clock)
    assert list((tmp_path / "cache").iterdir()) == []


@linux_only
@pytest.mark.parametrize(
    ("code", "limit", "says"),
    [
        (
            GREEDY,
            {"memory_bytes": 900 * MIB},
            r"at most 943718400 bytes of memory \(--max-compile-memory-bytes\)",
        ),
        # a disk that many files fill
        (FILLS, {"model_bytes": MIB}, "must write at most 69206016 bytes, twice --max-model-bytes and 67"),
        # code that speaks for the compiler
        (SAYS, {}, "sent an invalid message in stage load and was ended"),
    ],
)
def test_a_compilation_that_takes_or_says_too_much_is_ended(
    lstm: Path, tmp_path: Path, hostile: Callable[[str], list[str]], code: str, limit: Any, says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        compile_program(lstm, tmp_path / "cache", hostile(code), limits=dataclasses.replace(ANY, **limit))


@linux_only
def test_memory_that_is_used_counts() -> None:
    kept = np.ones(64 * MIB, np.uint8)
    assert memory_of(os.getpid()) > kept.nbytes
    assert memory_of(0) == 0
    assert default_memory_bytes() > 0
