"""How the server starts, and how it refuses to."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

import stepwell.testing
from stepwell.cli import main
from support.servers.both_fronts import needs_native
from support.servers.server_process import ServerProcess, forecast, serve

#: The default port may be taken: somebody may have a server of their own.
ANYWHERE = ("--listen", "127.0.0.1:0")


def _refused(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Start a server that cannot be; return the one line it says."""
    if "--listen" not in arguments:
        arguments += ANYWHERE
    with ServerProcess(*arguments, "--log-level", "error", ready=False, environment=environment) as server:
        code, out, err = server.finish()
    assert code == 2, err
    assert out == ""
    assert err.startswith("stepwell: error: ")
    (line,) = err.splitlines()
    return line


@pytest.mark.usefixtures("started_anew")
@pytest.mark.parametrize("front", [pytest.param("native", marks=needs_native), "python"])
def test_it_says_exactly_one_line_when_it_is_ready(front: str) -> None:
    with serve("--front", front) as server:
        assert re.fullmatch(rf"stepwell: {front} front, listening on 127\.0\.0\.1:\d+\n", server.ready_line)
        server.signal()
        code, rest, err = server.finish()
    assert (code, rest) == (0, "")
    assert "model loaded model=forecast version=1 executor=litert" in err


@pytest.mark.usefixtures("started_anew")
def test_each_line_on_stderr_is_one_of_the_log() -> None:
    """Not LiteRT's announcement of its delegate, for one."""
    with serve() as server:
        server.signal()
        _, _, err = server.finish()
    lines = err.splitlines()
    assert len(lines) >= 3
    assert [line for line in lines if not re.match(r"\d{4}-\d\d-\d\dT\S+Z (info|warning) ", line)] == []


@pytest.mark.usefixtures("started_anew")
def test_the_environment_will_do() -> None:
    model = forecast()
    environment = {
        "STEPWELL_MODELS": f"a={model.path},b={model.path}",
        "STEPWELL_CACHE_DIR": str(model.cache_dir),
        "STEPWELL_LISTEN": "localhost:0",
        "STEPWELL_LOG_FORMAT": "json",
    }
    with ServerProcess(environment=environment) as server:
        assert ", listening on localhost:" in server.ready_line
        server.signal()
        code, _, err = server.finish()
    assert code == 0
    assert '"event": "model loaded", "model": "b"' in err


@pytest.mark.usefixtures("started_anew")
def test_tensorflow_stays_out_of_the_process() -> None:
    with serve() as server:
        mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "ai_edge_litert" in mapped
    assert "/tensorflow/" not in mapped


#: What a row's arguments name: see `places`.
MODEL = ("x={model}", "--cache-dir", "{cache}")
SLOW = pytest.mark.slow
LIMITS = ("max-model-bytes", "max-compile-memory-bytes", "compile-timeout-s")
#: Arguments, environment, and what the refusal says.
REFUSED_STARTS = {
    "no models": ((), {}, "STEPWELL_MODELS"),
    "no file": (("x=nowhere.keras",), {}, "does not exist"),
    "rows that are no number": (
        ("x={empty}",),
        {"STEPWELL_RESIDENT_ROWS": "many"},
        "error: Invalid value for STEPWELL_RESIDENT_ROWS: must be N or NAME=N with a whole number ",
    ),
    "options that do not go together": (
        ("x={empty}", "--store", "memory", "--data-dir", "d"),
        {},
        "'--data-dir': cannot be used with '--store' memory",
    ),
    "no room for rows": (
        (*MODEL, "--store", "memory", "--resident-rows", "1" + "0" * 18),
        {},
        f"error: --resident-rows: there is no room for {10**18} rows of model x: ",
    ),
    "a cache below a file": (("x={model}", "--cache-dir", "{empty}/cache"), {}, "error: --cache-dir: "),
    "a cache that is a file": (("x={model}", "--cache-dir", "{empty}"), {}, "error: --cache-dir"),
    "no such import": (
        ("x={model}", "--import", "no_such_module", "--cache-dir", "{folder}/new"),
        {},
        "no_such_module",
    ),
    "an address in use": (
        (*MODEL, "--listen", "{taken}"),
        {},
        "error: --listen: cannot listen on {taken}: Address already in use",
    ),
    "an address of metrics in use": (
        (*MODEL, "--metrics-listen", "{taken}"),
        {},
        "error: --metrics-listen: cannot listen on {taken}: Address already in use",
    ),
    "other machines": (("x={model}", "--listen", "0.0.0.0:0"), {}, "or be given --insecure-listen"),
    "half a file": (("x={half}", "--cache-dir", "{folder}/new"), {}, "error: model x: "),
    **{
        option: (
            ("x={model}", "--cache-dir", "{folder}/new"),
            {"STEPWELL_" + option.replace("-", "_").upper(): value},
            f"(--{option})",
        )
        for option, value in zip(LIMITS, ("1000", "1000", "0.001"), strict=True)
    },
    **{
        f"migration {function}": (
            ("x={model}", "--migration", f"m={function}"),
            {},
            f"error: --migration: m={function}: {why}",
        )
        for function, why in {
            "no_such_module:f": "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
            "own_defect:f": "cannot be imported: ZeroDivisionError: division by zero",
            "own_moves:narrow": "own_moves has no narrow",
            "own_moves:number": "must be a function; it is 5",
        }.items()
    },
}
COMPILES = {"half a file", *LIMITS}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Models, an empty file, an address in use; the current folder has modules of migrations."""
    model, half, empty = forecast(), tmp_path / "half.keras", tmp_path / "empty.keras"
    whole = model.path.read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    empty.touch()
    (tmp_path / "own_moves.py").write_text("number = 5\ndef widen(): ...\n")
    (tmp_path / "own_defect.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    known = {"model": model.path, "cache": model.cache_dir, "half": half, "empty": empty, "folder": tmp_path}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield known | {"taken": f"127.0.0.1:{listener.getsockname()[1]}"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[SLOW] if name in COMPILES else []) for name in REFUSED_STARTS]
)
def test_a_refused_start_says_why_in_one_line(places: dict[str, object], name: str) -> None:
    """What else a file may be, and what is said of it, is for the tests of the compiler."""
    arguments, environment, words = REFUSED_STARTS[name]
    line = _refused(*(one.format_map(places) for one in arguments), environment=environment)
    assert words.format_map(places) in line


@SLOW
def test_a_migration_may_be_of_the_current_folder(places: dict[str, object]) -> None:
    with serve("--migration", "m=own_moves:widen"):
        pass


@SLOW
def test_models_of_a_folder(tmp_path: Path) -> None:
    model = forecast()
    for name in ("forecast/1.keras", "forecast/2/m.keras", "words/7.keras"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.symlink_to(model.path)
    options = ("--models", str(tmp_path), "--cache-dir", str(model.cache_dir), *ANYWHERE)
    assert "holds no model" in _refused(*options)
    for name in ("forecast/1.keras", "forecast/2/m.keras", "words/7.keras"):
        path = tmp_path / name
        path.unlink()
        path.write_bytes(model.path.read_bytes())
    (tmp_path / "forecast/3.keras.tmp").touch()
    with ServerProcess(*options) as server:
        server.signal()
        code, _, err = server.finish()
    assert code == 0
    assert "model loaded model=forecast version=2 " in err
    assert "model=forecast version=1" not in err
    assert "model loaded model=words version=7 " in err
    # a file that cannot be loaded; a compiled model, for whose refusal nobody waits for TensorFlow
    (tmp_path / "forecast/3.stepwell").write_bytes(b"no model")
    assert "model forecast@3: " in _refused(*options)
    with ServerProcess(*options, "--bad-models", "skip") as server:
        server.signal()
        _, _, err = server.finish()
    assert "error a model cannot be loaded model=forecast version=3" in err
    assert "model loaded model=forecast version=2 " in err


@pytest.fixture
def without_module(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that stands for a stepwell-front without its native module."""
    text = "raise ImportError('the installed stepwell-front has no native module: cargo is not installed', name=__name__)"
    (tmp_path / "stepwell_front.py").write_text(text)
    return tmp_path


def test_without_the_native_front_it_says_how_to_get_it(without_module: Path) -> None:
    """In the log, in the line that says it is ready, and to `stepwell models`; the SDK finds the address all the same."""
    reason = "the installed stepwell-front has no native module: cargo is not installed"
    model = forecast()
    with stepwell.testing.LocalServer(
        {"forecast": model.path},
        cache_dir=model.cache_dir,
        env={"PYTHONPATH": str(without_module), "STEPWELL_FRONT": "auto"},
    ) as server:
        logs = server.logs()
        models = CliRunner().invoke(main, ["models", "--server", server.address])
    assert (
        f"warning the server uses the Python front, which is slower: {reason}; for the native front, install cargo"
        in logs
    )
    assert re.search(
        r"^stepwell: python front \(slower, this machine only; for the native one: pip install \./server/front, in a clone of"
        r" Stepwell\), listening on 127\.0\.0\.1:\d+$",
        logs,
        re.MULTILINE,
    )
    assert models.stdout.splitlines()[-1] == (
        "front: python (slower; for the native front, run on the server: pip install ./server/front (in a clone of"
        " Stepwell))"
    )


def test_the_front_in_python_is_reached_from_elsewhere_only_if_it_is_asked_for(without_module: Path) -> None:
    line = _refused(
        f"x={forecast().path}",
        *("--listen", "0.0.0.0:0", "--insecure-listen"),
        environment={"PYTHONPATH": str(without_module), "STEPWELL_FRONT": "auto"},
    )
    assert line.startswith(
        "stepwell: error: --listen: without the native front it must be a loopback address"
    )
    assert "cargo is not installed; for the native front, install cargo" in line
    assert (
        "run: pip install ./server/front (in a clone of Stepwell); or accept that with --front python" in line
    )
    assert line.endswith("got 0.0.0.0:0")
    # a data folder that is none ends this start before anything listens
    asked = (
        f"x={forecast().path}",
        "--front",
        "python",
        "--data-dir",
        str(without_module / "stepwell_front.py"),
    )
    with ServerProcess(*asked, "--listen", "0.0.0.0:0", "--insecure-listen", ready=False) as server:
        _, _, err = server.finish()
    assert "warning --insecure-listen: other machines reach this server, and it does not use TLS" in err
    assert "warning the Python front does not limit the resources that clients use" in err
    assert "--listen: " not in err


@SLOW
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_model_is_compiled_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    cache = tmp_path / "cache"
    model = f"x={forecast().path}"
    with ServerProcess(model, *ANYWHERE, "--cache-dir", str(cache), ready=False) as server:
        server.wait_for_log("stage=load")
        tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
        children = [child for task in tasks for child in task.read_text().split()]
        server.signal(number)
        code, out, err = server.finish()
    assert children
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "stepwell: error: stopped before it was ready"
    assert "model refused" not in err
    assert not any(Path(f"/proc/{child}").exists() for child in children)
