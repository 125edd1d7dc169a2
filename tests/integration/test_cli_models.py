"""The commands that load, unload and choose versions of models, against a server whose faults are scripted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

import stepwell
from stepwell.cli import main
from stepwell.v1 import models_pb2
from support.sdk.scripted_admin import ScriptedModels
from support.sdk.scripted_server import FINGERPRINT, MODEL, Fault

Run = Callable[..., Result]


@pytest.fixture
def server() -> Iterator[ScriptedModels]:
    with ScriptedModels() as server:
        yield server


@pytest.fixture
def run(server: ScriptedModels) -> Run:
    def run_one(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["models", *arguments], env={"STEPWELL_SERVER": server.address})

    return run_one


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "next.keras"
    path.write_text("2")
    return str(path)


def said(result: Result) -> str:
    assert result.exit_code == 0, result.stderr
    return result.stdout


def document(result: Result) -> Any:
    assert said(result).count("\n") == 1
    return json.loads(result.stdout)


def refused(result: Result, says: str, exit_code: int = 1) -> None:
    assert says in result.stderr
    assert result.stderr.startswith("stepwell: error: ")
    assert result.stderr.count("\n") == 1
    assert (result.exit_code, result.stdout) == (exit_code, "")


def test_a_version_is_loaded_and_shown(run: Run, server: ScriptedModels, file: str) -> None:
    with stepwell.connect(server.address) as client:
        client.open_session(MODEL)
    options = ["--sessions", "carry", "--label", "canary", "--label", "b", "--unload-previous"]
    assert said(run("load", MODEL, file, *options)) == (
        "loaded sum@2 (the default, label b, label canary, 1 session moved)\n"
    )
    assert server.requests("LoadModel") == [
        models_pb2.LoadModelRequest(
            name=MODEL,
            path=file,
            sessions=models_pb2.SESSION_POLICY_CARRY,
            labels=["canary", "b"],
            unload_previous=True,
        )
    ]
    header, first, second = said(run("--versions")).splitlines()
    assert header.split() == (
        ["MODEL", "VERSION", "STATE", "DEFAULT", "LABELS", "SESSIONS", "FINGERPRINT", "LOADED", "WHY"]
    )
    assert first.split() == [MODEL, "1", "ready", "0", FINGERPRINT]
    assert second.split() == [MODEL, "2", "ready", "yes", "b,", "canary", "0", f"{FINGERPRINT}-2"]
    assert "1; 2* b canary" in said(run())
    shown = document(run("--json"))["models"][0]
    assert shown["version"] == 2
    keys = [text for text, _ in main.commands["models"].load().json_keys if text.startswith("versions.")]  # type: ignore[attr-defined]
    assert [f"versions.{key}" for key in shown["versions"][1]] == keys
    assert [each["is_default"] for each in shown["versions"]] == [False, True]
    assert "2* b canary" in said(run("show", f"{MODEL}:canary"))


def test_load_with_json(run: Run, server: ScriptedModels, file: str) -> None:
    assert document(run("load", f"{MODEL}@7", file, "--no-default", "--json")) == {
        "name": MODEL,
        "version": 7,
        "fingerprint": f"{FINGERPRINT}-7",
        "is_default": False,
        "labels": [],
        "moved_sessions": 0,
    }
    assert document(run("load", MODEL, file, "--version", "8", "--upload", "--json"))["is_default"]
    assert len(server.requests("UploadModel")) == 1
    assert said(run("load", MODEL, os.path.relpath(file), "--no-upload")) == "loaded sum@9 (the default)\n"
    assert server.requests("LoadModel")[-1].path == os.path.relpath(file)


def test_a_file_where_a_name_belongs_shows_the_commands_for_it(run: Run, tmp_path: Path) -> None:
    for name in ("model.keras", str(tmp_path / "m").rpartition("/")[2] + ".keras"):
        result = run("show", name)
        assert f"stepwell check {name}, or stepwell compile {name} -o {name[:-6]}.stepwell" in result.stderr
        assert result.exit_code == 2


def test_what_is_to_be_known_of_a_loaded_version_is_said(run: Run, server: ScriptedModels, file: str) -> None:
    server.reason = "nothing is kept of its file"
    result = run("load", MODEL, file, "--upload")
    assert said(result) == "loaded sum@2 (the default)\n"
    assert "note: nothing is kept of its file\n" in result.stderr


def test_the_default_and_labels_are_chosen(run: Run, server: ScriptedModels, file: str) -> None:
    said(run("load", MODEL, file, "--no-default"))
    assert said(run("default", f"{MODEL}@2", "--sessions", "migrate", "--migration", "f")) == (
        "sum@2 is now the default (0 sessions moved)\n"
    )
    (request,) = server.requests("SetDefault")
    assert (request.sessions, request.migration) == (models_pb2.SESSION_POLICY_MIGRATE, "f")
    assert document(run("default", f"{MODEL}@1", "--json"))["previous_version"] == 2
    assert said(run("label", f"{MODEL}@2", "canary")) == "sum:canary is sum@2\n"
    assert server.labels == {"canary": 2}
    labelled = {"name": MODEL, "label": "canary", "version": 1}
    assert document(run("label", f"{MODEL}@1", "canary", "--json")) == labelled
    assert document(run("label", MODEL, "canary", "--remove", "--json")) == labelled | {"version": None}
    assert not server.labels
    said(run("label", f"{MODEL}@1", "canary"))
    assert said(run("label", MODEL, "canary", "--remove")) == "removed sum:canary\n"


def test_a_version_is_unloaded(run: Run, server: ScriptedModels, file: str) -> None:
    said(run("load", MODEL, file))
    refused(run("unload", f"{MODEL}@2"), "it is the default")
    assert said(run("unload", f"{MODEL}@1")) == "unloaded sum@1\n"
    assert document(run("unload", f"{MODEL}@2", "--force", "--json")) == {"name": MODEL, "version": 2}
    assert not server.widths


def test_what_is_wrong_is_one_line(run: Run, server: ScriptedModels, file: str) -> None:
    folder = os.path.dirname(file)
    for arguments, text, code in (
        (("load", f"{MODEL}@2", file, "--version", "3"), "give the version once", 2),
        (("load", f"{MODEL}@x", file), "must be a whole number of at least 1; got 'sum@x'", 2),
        (("load", MODEL, file, "--version", "0"), "--version", 2),
        (("load", MODEL, file, "--sessions", "drop"), "--sessions", 2),
        (("default", MODEL), "the version must be given, as in sum@2; got 'sum'", 2),
        (("label", MODEL, "canary"), "the version must be given", 2),
        (("--versions", "show", MODEL), "--versions must follow 'show'", 2),
        (("load", MODEL, f"{file}.not"), f"{file}.not: No such file or directory", 1),
        (("load", MODEL, file, "--label", "1"), "a label must be 1 to 64 letters", 1),
    ):
        refused(run(*arguments), text, code)
    assert not server.calls
    for others, text in (
        (("load", MODEL, folder, "--upload"), f"{folder}: Is a directory"),
        (("load", f"{MODEL}@1", file), "version 1 is there"),
        (("unload", f"{MODEL}@5"), "no 'sum@5'"),
    ):
        refused(run(*others), text)


def test_an_answer_that_is_lost_says_where_to_look(run: Run, server: ScriptedModels, file: str) -> None:
    server.fail("LoadModel", Fault(after_work=True))
    refused(
        run("load", MODEL, file),
        "the version may have been loaded; check with 'stepwell models --versions'",
    )
    server.fail("LoadModel", Fault(grpc.StatusCode.FAILED_PRECONDITION, "no layers", "MODEL_LOAD_FAILED"))
    refused(run("load", MODEL, file), "no layers\n")


def test_versions_and_labels_are_completed(server: ScriptedModels, file: str, run: Run) -> None:
    said(run("load", MODEL, file, "--label", "canary"))
    for words, expected in (
        ("stepwell models unload su", ["sum"]),
        ("stepwell models default sum@", ["sum@1", "sum@2"]),
        ("stepwell models show sum:c", ["sum:canary"]),
        ("stepwell models load s", ["sum"]),
    ):
        environment = {
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
            "_MAIN_COMPLETE": "bash_complete",
            "STEPWELL_SERVER": server.address,
        }
        completed = CliRunner(env=environment).invoke(main).stdout.split()
        plain = [one.removeprefix("plain,") for one in completed if one.startswith("plain,")]
        assert (words, plain) == (words, expected)


def test_a_person_sees_the_stages(
    server: ScriptedModels, file: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepwell.cli.toolkit import render

    told: list[str] = []
    monkeypatch.setattr(render, "stages", lambda _: _Told(told))
    said(run("load", MODEL, file))
    assert told == ["waiting", "convert", "warm up", "switch"]


class _Told:
    def __init__(self, told: list[str]) -> None:
        self._told = told

    def __enter__(self) -> Callable[[str], None]:
        return self._told.append

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do."""


def test_sessions_show_their_versions(server: ScriptedModels) -> None:
    server.widths[2] = 2
    environment = {"STEPWELL_SERVER": server.address}
    with stepwell.connect(server.address) as client:
        client.open_session(MODEL, session_id="a")
        client.open_session(f"{MODEL}@2", session_id="b")
    listed = CliRunner().invoke(main, ["sessions", "list"], env=environment).stdout.splitlines()
    assert [line.split()[:3] for line in listed] == [
        ["SESSION", "MODEL", "VERSION"],
        ["a", MODEL, "1"],
        ["b", MODEL, "2"],
    ]
    shown = CliRunner().invoke(main, ["sessions", "show", "b"], env=environment).stdout
    assert "2 (pinned)" in shown
    attached = ["step", "b", "--input", "[[1, 2]]", "--model"]
    assert CliRunner().invoke(main, [*attached, f"{MODEL}@2"], env=environment).exit_code == 0
    refused(
        CliRunner().invoke(main, [*attached, f"{MODEL}@1"], env=environment),
        "--model must be the session's model, sum@2; got sum@1",
    )
