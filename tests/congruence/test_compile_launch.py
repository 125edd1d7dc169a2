"""The compiling process as the server sees it: cache, progress, errors; no TensorFlow in the caller."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import stepwell_server
from stepwell_server import program_file
from stepwell_server.compile import cache
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.host.limits import Limits
from stepwell_server.program import FLATBUFFER, Program
from support.models import programs
from support.models.warm_compiler import compile_program

STAGES = ["load", "trace", "probe", "convert", "check"]
NOISY_MODULE = """
import sys
print("a module that prints")
print('{"stage": "not a stage"}', flush=True)
sys.path.insert(0, __TESTS__)
import support.models.custom_layers
"""


@pytest.fixture
def custom() -> Path:
    return programs.saved("accumulator").path


@pytest.mark.slow
def test_two_processes_compile_one_model_and_the_rest_read_the_cache(lstm: Path, tmp_path: Path) -> None:
    stages: list[list[str]] = [[], []]
    compilers = [WarmCompiler(tmp_path / "cache") for _ in range(2)]
    with compilers[0], compilers[1], ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda i: compilers[i].compile(lstm, stages[i].append), (0, 1)))
    assert both[0].fingerprint == both[1].fingerprint
    assert STAGES in stages
    again: list[str] = []
    copy = tmp_path / "copy.keras"
    copy.write_bytes(lstm.read_bytes())
    found = compile_program(copy, tmp_path / "cache", progress=again.append)
    assert found.files == both[0].files
    assert found.provenance is not None
    assert (found.provenance.source, len(found.provenance.source_sha256)) == ("copy.keras", 64)
    assert again == []
    entry = cache.entry(tmp_path / "cache", programs.cache_key(lstm, ()))
    assert sorted((tmp_path / "cache").iterdir()) == [tmp_path / "cache" / ".key", entry]


@pytest.mark.slow
def test_a_damaged_entry_is_compiled_again(lstm: Path, tmp_path: Path) -> None:
    entry = cache.entry(tmp_path, programs.cache_key(lstm, ()))
    entry.write_text("{}")
    stages: list[str] = []
    program = compile_program(lstm, tmp_path, progress=stages.append)
    assert stages == STAGES
    found = cache.load(entry)
    assert found is not None
    assert found.files == program.files
    _check_seal(entry, found)
    entry.write_bytes(entry.read_bytes().replace(b"TFL3", b"TFL4"))
    assert cache.load(entry) is None


def _check_seal(entry: Path, program: Program) -> None:
    """Only what was published under this very name, in this very cache, is an entry."""
    whole = entry.read_bytes()
    # Other weights, with digests that fit: the fingerprint is that of the model's all the same.
    content = program.files[FLATBUFFER]
    other = dataclasses.replace(program, files={FLATBUFFER: content[:-1] + bytes([content[-1] ^ 1])})
    program_file.save(other, entry)
    assert program_file.load(entry, is_own=True).fingerprint == program.fingerprint
    assert cache.load(entry) is None
    with zipfile.ZipFile(entry, "a") as changed, zipfile.ZipFile(io.BytesIO(whole)) as source:
        changed.comment = source.comment
    assert cache.load(entry) is None
    moved = entry.with_name(f"{'0' * 64}{program_file.SUFFIX}")
    moved.write_bytes(whole)
    assert cache.load(moved) is None
    moved.unlink()
    entry.write_bytes(whole)
    assert cache.load(entry) is not None
    (entry.parent / ".key").write_bytes(b"another")
    assert cache.load(entry) is None


def test_a_custom_layer_needs_its_module(
    custom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"unknown class 'Accumulator'; .* --import MODULE"):
        compile_program(custom, tmp_path / "cache")
    tests = str(Path(__file__).parents[1])
    (tmp_path / "noisy_layers.py").write_text(NOISY_MODULE.replace("__TESTS__", repr(tests)))
    monkeypatch.chdir(tmp_path)
    stages: list[str] = []
    program = compile_program(custom, tmp_path / "cache", ["noisy_layers"], stages.append)
    assert stages == STAGES
    assert program.state[0].name == "sum/state"


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCompiler]:
    with WarmCompiler(tmp_path_factory.mktemp("cache"), ["ending"]) as compiler:
        yield compiler


BREAK_THE_COMPILER = """
import stepwell_server.compile.keras_file.archive
stepwell_server.compile.keras_file.archive.fingerprint = None
"""
FAIL_IN_A_MODULE = """
import stepwell_server.compile.keras_file.archive

def broken(*_given):
    raise LookupError("first line\\nsecond line")

stepwell_server.compile.keras_file.archive.fingerprint = broken
"""


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            "import os\nos.abort()",
            r"the compiler crashed on this model in stage load \(SIGABRT\): .*Report it",
        ),
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            r"was killed in stage load \(SIGKILL\), as the system does when memory runs out",
        ),
        ("import os\nos._exit(0)", r"ended without an answer in stage load \(exit code 0\)\. Does a module"),
        ("import os\nos._exit(7)", r"ended without an answer in stage load \(exit code 7\)\. Does a module"),
        (
            "import sys\nsys.exit('bye')",
            r"code loaded by --import failed on this model \(SystemExit: bye\) at .*ending\.py:4$",
        ),
        (
            BREAK_THE_COMPILER,
            (
                r"the compiler failed on this model \(TypeError: 'NoneType' object is not callable\): a defect of "
                r"Stepwell, not of the model\. Report it with the config\.json"
            ),
        ),
        (
            FAIL_IN_A_MODULE,
            r"code loaded by --import failed on this model \(LookupError: first line\) at .*ending\.py:7$",
        ),
        (FAIL_IN_A_MODULE.replace("Lookup", "Memory"), r"the compiling process ran out of memory"),
    ],
    ids=["abort", "kill", "exit 0", "exit 7", "sys.exit", "defect", "module", "memory"],
)
def test_failures_of_the_compiler_are_one_line_and_details(
    module: str,
    expected: str,
    lstm: Path,
    ending: WarmCompiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "ending.py").write_text(
        f"import sys\nprint('last words', file=sys.stderr, flush=True)\n{module}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=expected) as caught:
        ending.compile(lstm)
    assert "\n" not in str(caught.value)
    assert "last words" in caught.value.details or "Traceback" in caught.value.details


def test_a_module_that_does_not_exist_or_raises(
    lstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="--import no_such_module: there is no module 'no_such_module'"):
        compile_program(lstm, tmp_path, ["no_such_module"])
    (tmp_path / "raising.py").write_text("raise KeyError('broken')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="--import raising: KeyError: broken") as caught:
        compile_program(lstm, tmp_path / "cache", ["raising"])
    assert "raising.py" in caught.value.details


def test_the_key_is_of_content_and_of_the_modules_source(
    lstm: Path, custom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.keras"
    copy.write_bytes(lstm.read_bytes())
    assert programs.cache_key(copy, ()) == programs.cache_key(lstm, ())
    assert programs.cache_key(custom, ()) != programs.cache_key(lstm, ())
    package = tmp_path / "layers_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported for the key')\n")
    (package / "cells.py").write_text("A = 1\n")
    monkeypatch.chdir(tmp_path)
    before = programs.cache_key(lstm, ["layers_of_mine.cells"])
    assert before != programs.cache_key(lstm, ())
    (package / "cells.py").write_text("A = 2\n")
    assert programs.cache_key(lstm, ["layers_of_mine.cells"]) != before


def test_the_caller_never_loads_tensorflow() -> None:
    saved, program = programs.saved("lstm_dense"), programs.program("lstm_dense")
    code = f"""
import sys
sys.path.insert(0, {str(Path(stepwell_server.__file__).parents[1])!r})
from pathlib import Path
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.engine.executors import load_executor
program = WarmCompiler(Path({str(saved.cache_dir)!r})).compile(Path({str(saved.path)!r}))
assert program.fingerprint == {program.fingerprint!r}
load_executor(program).bind(3)
print(sorted(name for name in ("tensorflow", "keras", "h5py") if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=250
    )
    assert done.stdout.strip() == "[]"


LOOK_AROUND = """
import json, os, resource
def attempt(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"
found = {
    "fork": attempt(lambda: os.fork() or os._exit(0)),
    "write": attempt(lambda: open("here", "w")),
    "home": attempt(lambda: open(os.path.expanduser("~/mine"), "w")),
    "environment": sorted(set(os.environ) & {"STEPWELL_TOKEN", "AWS_SECRET_ACCESS_KEY", "HOME", "PATH"}),
    "folders": len({os.environ[name] for name in ("HOME", "TMPDIR")}),
    "home at": os.environ["HOME"],
    "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
    "file bytes": resource.getrlimit(resource.RLIMIT_FSIZE)[1],
    "processor s": resource.getrlimit(resource.RLIMIT_CPU)[0] > 60,
}
raise ValueError(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it is the kernel of Linux that takes these away")
def test_it_has_a_folder_of_its_own_limits_and_no_secrets(
    lstm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "looking.py").write_text(LOOK_AROUND)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    limits = Limits(model_bytes=1 << 20, timeout_s=99)
    with (
        WarmCompiler(tmp_path / "cache", ["looking"], limits) as compiler,
        pytest.raises(ModelError, match=r"--import looking: ValueError: ") as caught,
    ):
        compiler.compile(lstm)
    found = json.loads(str(caught.value).partition("ValueError: ")[2])
    folder = Path(found.pop("home at"))
    assert not folder.exists()
    assert found == {
        "fork": "PermissionError",
        "write": "PermissionError",
        "home": "done",
        "environment": ["HOME", "PATH"],
        "folders": 1,
        "core": 0,
        "file bytes": (2 << 20) + (64 << 20),
        "processor s": True,
    }
    assert not (tmp_path / "here").exists()
