"""`stepwell.local` gives the same server for the same call, and puts another in its place for another."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import threading
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import stepwell
from stepwell import _local
from stepwell.errors import ClosedError, InvalidInputError
from stepwell.testing import LocalServer, ServerStartError


class FakeServer:
    """A server that only counts: it has a number while it runs."""

    made: ClassVar[list[FakeServer]] = []
    refuses_http = False

    def __init__(self, models: Any, data_dir: Any, extra_args: Any, **options: Any) -> None:
        self.models, self.data_dir, self.extra_args, self.options = models, data_dir, extra_args, options
        self.address = "127.0.0.1:1"
        self.pid: int | None = None
        self.ended = ""
        self.refuses = False

    def start(self) -> None:
        self.contents = {name: Path(path).read_bytes() for name, path in self.models.items()}
        FakeServer.made.append(self)
        if self.refuses_http and "--http-listen" in self.extra_args:
            refusal = "--http-listen: only the native front serves HTTP"
            raise ServerStartError(f"the server ended with exit code 2: {refusal}", refusal=refusal)
        if b"bad" in self.contents.values():
            refusal = f"model m: {self.models['m']}: it is bad"
            raise ServerStartError(f"the server ended with exit code 2: {refusal}", refusal=refusal)
        for name in self.models:
            self.options["on_log"](f"2026 info loading model model={name} stage=load")
            self.options["on_log"](json.dumps({"event": "loading model", "model": name, "stage": "trace"}))
        self.pid = len(FakeServer.made)

    def kill(self) -> None:
        self.ended, self.pid = "killed", None

    def stop(self, timeout_s: float) -> None:
        self.ended, self.pid = "stopped", None


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeServer]]:
    """The servers that were started."""
    monkeypatch.setattr(_local, "LocalServer", FakeServer)
    monkeypatch.setattr(_local, "_places", _local._Places())
    monkeypatch.setattr(FakeServer, "made", [])
    # without the native front, unless a test says otherwise
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    yield FakeServer.made
    _local._places.end_all()
    assert not any(server.pid for server in FakeServer.made)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "m.keras"
    file.write_bytes(b"one")
    return file


def test_the_same_call_gives_the_same_client(
    path: Path, made: list[FakeServer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stepwell.local(path, extra_args=["--import", "x"])
    monkeypatch.chdir(path.parent)
    assert stepwell.local("m.keras", extra_args=("--import", "x")) is first
    assert stepwell.local({"m": path}, extra_args=["--import", "x"]) is first
    assert len(made) == 1
    assert (made[0].models, made[0].extra_args) == ({"m": str(path)}, ("--import", "x"))
    assert capsys.readouterr().err.count("compiling") == 1
    compiled = path.rename(path.with_suffix(".stepwell"))
    other = compiled.with_suffix(".keras")
    other.write_bytes(b"two")
    stepwell.local({"a": compiled, "b": other})
    assert [line[:23] for line in capsys.readouterr().err.splitlines()] == ["stepwell: compiling 'b'"]


@pytest.mark.parametrize(
    ("options", "variable", "wanted"),
    [
        ([], "", ("--http-listen", "127.0.0.1:0")),
        (["--http-listen=127.0.0.1:8080"], "", ("--http-listen=127.0.0.1:8080",)),
        (["--front", "python"], "", ("--front", "python")),
        ([], "STEPWELL_FRONT", ()),
    ],
)
def test_it_serves_http_if_the_native_front_is_there_and_the_caller_chose_nothing_else(
    options: list[str],
    variable: str,
    wanted: tuple[str, ...],
    path: Path,
    made: list[FakeServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: "found")
    if variable:
        monkeypatch.setenv(variable, "python")
    stepwell.local(path, extra_args=options)
    assert [server.extra_args for server in made] == [wanted]


def test_it_does_without_http_if_the_server_refuses_it(
    path: Path, made: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: "found, but of no use")
    monkeypatch.setattr(FakeServer, "refuses_http", True)
    stepwell.local(path)
    assert [server.extra_args for server in made] == [("--http-listen", "127.0.0.1:0"), ()]


@pytest.mark.parametrize(
    "change",
    ["content", "options", "data_dir", "cache_dir", "variable", "path", "dead"],
)
def test_anything_else_takes_its_place(
    change: str, path: Path, made: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stepwell.local(path)
    more: dict[str, Any] = {}
    if change == "content":
        path.write_bytes(b"two")
    elif change == "options":
        more = {"extra_args": ["--max-batch-rows", "4"]}
    elif change == "variable":
        monkeypatch.setenv("STEPWELL_MAX_BATCH_ROWS", "4")
    elif change == "path":
        path = path.rename(path.parent / "other.keras")
        more = {"name": "m"}
    elif change == "dead":
        made[0].pid = None
    else:
        more = {change: path.parent / "folder"}
    second = stepwell.local(path, **more)
    assert second is not first
    assert [server.pid is None for server in made] == [True, False]
    with pytest.raises(ClosedError):
        first.models()
    first.close()  # it is no longer its server
    assert made[1].pid is not None
    assert stepwell.local(path, **more) is second


def test_a_client_with_other_options_has_the_same_server(path: Path, made: list[FakeServer]) -> None:
    first = stepwell.local(path)
    second = stepwell.local(path, timeout_s=5.0, max_message_bytes=4096, coalesce=False)
    assert second is not first
    assert second.server is first.server
    with pytest.raises(ClosedError):
        first.models()
    assert len(made) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": -1},
        {"max_message_bytes": "x"},
        {"coalesce": "no"},
        {"extra_args": "--import"},
        {"extra_args": ["--resident-rows", 5]},
    ],
    ids=repr,
)
def test_what_is_wrong_is_refused_before_anything_is_started_or_ended(
    path: Path, made: list[FakeServer], wrong: dict[str, Any]
) -> None:
    """A server without a client would run on until the process ends."""
    (name,) = wrong
    with pytest.raises(InvalidInputError, match=f"^{name} must be"):
        stepwell.local(path, **wrong)
    assert not made
    client = stepwell.local(path)
    with pytest.raises(InvalidInputError):
        stepwell.local(path, **wrong)
    assert stepwell.local(path) is client
    assert "closed" not in client._repr_html_()


def test_other_names_are_another_server(path: Path, made: list[FakeServer]) -> None:
    clients = [stepwell.local(path), stepwell.local(path, name="n"), stepwell.local({"m": path, "n": path})]
    assert len({client.server for client in clients}) == 3
    assert all(server.pid for server in made)


def test_closing_ends_the_server(path: Path, made: list[FakeServer]) -> None:
    with stepwell.local(path) as client:
        assert made[0].pid
        assert "process 1" in client._repr_html_()
    client.close()
    assert made[0].ended == "killed"
    with stepwell.local(path, data_dir=path.parent):
        pass
    assert made[1].ended == "stopped"  # what it keeps on disk is finished first


def test_a_server_that_refuses_leaves_none(path: Path, made: list[FakeServer]) -> None:
    stepwell.local(path)
    path.write_bytes(b"bad")
    for _ in range(2):
        # the path is the caller's own
        with pytest.raises(
            stepwell.ServerStartError, match=f"^model m: {path}: it is bad \\(the server did not start"
        ):
            stepwell.local(path)
    assert [server.pid for server in made] == [None] * 3
    path.write_bytes(b"one")
    assert stepwell.local(path).server.pid


def test_many_threads_get_one_client(path: Path, made: list[FakeServer]) -> None:
    clients: list[stepwell.LocalClient] = []
    threads = [threading.Thread(target=lambda: clients.append(stepwell.local(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(clients)) == len(made) == 1


class Sequential:
    """As Keras's: named by itself or by people, saved with the time of saving."""

    def __init__(self, weights: str, name: str = "sequential_3") -> None:
        self.weights, self.name = weights, name

    def save(self, filepath: str) -> None:
        saves.append(len(saves))
        with zipfile.ZipFile(filepath, "w") as archive:
            metadata = {"keras_version": "3", "date_saved": f"2026-11-26@{saves[-1]}"}
            archive.writestr("metadata.json", json.dumps(metadata))
            archive.writestr(zipfile.ZipInfo("weights", (2026, 1, 1 + saves[-1], 0, 0, 0)), self.weights)


saves: list[int] = []
Sequential.__module__ = "keras.src.models.sequential"


def test_an_object_is_the_same_if_its_content_is(made: list[FakeServer]) -> None:
    first = stepwell.local(Sequential("w"))
    assert stepwell.local(Sequential("w", name="sequential_4")) is first
    assert stepwell.local(Sequential("v")) is not first
    assert [list(server.models) for server in made] == [["model"]] * 2
    assert made[0].contents != made[1].contents
    # the file was there when the server started, and is gone
    assert not any(os.path.exists(file) for server in made for file in server.models.values())


def test_a_refusal_of_an_object_begins_with_the_reason(
    made: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an exit code nor the path of a temporary file says anything in a notebook."""

    def refuse(server: FakeServer) -> None:
        refusal = f"model model: {server.models['model']}: it looks ahead"
        raise ServerStartError(f"the server ended with exit code 2: {refusal}", refusal=refusal)

    monkeypatch.setattr(FakeServer, "start", refuse)
    with pytest.raises(stepwell.ServerStartError) as caught:
        stepwell.local(Sequential("w"))
    assert str(caught.value) == "model model: it looks ahead (the server did not start)"


@pytest.mark.parametrize(
    ("kind", "name", "served"),
    [
        ("Sequential", "sequential", "model"),
        ("Sequential", "forecast", "forecast"),
        ("Functional", "functional_12", "model"),
        ("MyLSTMModel", "my_lstm_model_1", "model"),
        ("Sequential", "sequential_a", "sequential_a"),
    ],
)
def test_an_object_has_the_name_that_people_gave_it(
    kind: str, name: str, served: str, made: list[FakeServer]
) -> None:
    own = type(kind, (Sequential,), {})
    stepwell.local(own("w", name))
    assert list(made[0].models) == [served]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"models": 5}, InvalidInputError, "models must be the path of a model's file, .*; got 5"),
        ({"models": {"m": None}}, InvalidInputError, "got None"),
        ({"models": {}}, InvalidInputError, "models must have at least one model"),
        (
            {"models": {"a b": "x"}},
            InvalidInputError,
            "a name in models must be 1 to 128 letters, .*; got 'a b'",
        ),
        ({"models": {5: "x"}}, InvalidInputError, "got 5"),
        ({"models": "my model.keras"}, InvalidInputError, "name must be .*; got 'my model'"),
        ({"models": "x", "name": ""}, InvalidInputError, "name must be .*; got ''"),
        (
            {"models": {"m": "x"}, "name": "m"},
            InvalidInputError,
            "name must be None if models is a mapping",
        ),
        (
            {"models": "x", "extra_args": "--import x"},
            InvalidInputError,
            "extra_args must be a list of strings",
        ),
        ({"models": "nothing.keras"}, FileNotFoundError, "the model 'nothing': 'nothing.keras'"),
    ],
    ids=lambda one: repr(one)[:40],
)
def test_arguments_that_break_a_rule(
    arguments: dict[str, Any], error: type[Exception], message: str, made: list[FakeServer]
) -> None:
    with pytest.raises(error, match=message):
        stepwell.local(**arguments)
    assert made == []


class Shell:
    """What is used of IPython: the request that is carried out, and the end of cells."""

    def __init__(self) -> None:
        self.parent: dict[str, Any] = {}
        self.ends: list[Any] = []
        self.events = types.SimpleNamespace(
            register=lambda _event, call: self.ends.append(call),
            unregister=lambda _event, call: self.ends.remove(call),
        )

    def get_parent(self) -> dict[str, Any]:
        return self.parent

    def run(self, run: int, cell: str, *calls: Path, success: bool = True) -> None:
        self.parent = {"metadata": {"cellId": cell}, "header": {"msg_id": str(run)}}
        for path in calls:
            stepwell.local(path)
        for end in list(self.ends):
            end(types.SimpleNamespace(success=success))
        assert self.ends == []


def test_a_cell_ends_what_it_does_not_ask_for_any_more(
    path: Path, made: list[FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    a, b, c = path, path.parent / "b.keras", path.parent / "c.keras"
    for file in (b, c):
        file.write_bytes(b"one")
    running: Any = lambda: sorted(next(iter(server.models)) for server in made if server.pid)  # noqa: E731
    shell.run(1, "one", a, b)
    shell.run(2, "two", c)
    shell.run(3, "one", a, b)
    assert len(made) == 3
    shell.run(4, "one", b, success=False)  # half a cell says nothing of the rest
    assert running() == ["b", "c", "m"]
    shell.run(5, "one", b)
    assert running() == ["b", "c"]
    shell.parent = {}  # a front end that names no cells
    stepwell.local(a)
    assert running() == ["b", "c", "m"]
    assert shell.ends == []


def test_a_server_that_cannot_be_started_says_why_at_once() -> None:
    with pytest.raises(InvalidInputError, match="start_timeout_s must be above 0"):
        LocalServer({}, start_timeout_s=-1.0)
    with pytest.raises(InvalidInputError, match="extra_args must be a list of strings; got 5"):
        LocalServer({}, extra_args=["--resident-rows", 5])  # type: ignore[list-item]
    variables: Any = {"STEPWELL_RESIDENT_ROWS": 5}
    server = LocalServer({}, env=variables, start_timeout_s=math.inf)
    with pytest.raises(ServerStartError, match=r"process cannot be started: expected str, .* not int"):
        server.start()
    assert server.pid is None


def test_the_packages_that_serving_needs_are_named(tmp_path: Path) -> None:
    """In an interpreter that cannot import the server: a package of that name comes first, and fails as it would."""
    package = tmp_path / "stepwell_server"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import no_such_package_anywhere\n")
    with pytest.raises(ServerStartError) as caught:
        LocalServer({}, env={"PYTHONPATH": str(tmp_path)}).start()
    assert str(caught.value) == (
        "the server ended with exit code 1: serving needs a package that is not installed "
        "(no_such_package_anywhere): pip install '.[server]' ./server/front (in a clone of Stepwell)"
    )
