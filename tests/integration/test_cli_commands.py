"""Every command against a real server."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import stepwell
from stepwell.cli import main
from support.models import programs
from support.servers.fork_server import ForkedServer

MODELS = {"forecast": "lstm_dense", "several": "several_inputs_and_outputs"}
#: Of the server at `address`; it is not the one that most machines take by themselves.
FRONT = "python"
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    paths = {name: programs.saved(kind).path for name, kind in MODELS.items()}
    options = ["--front", FRONT]
    with ForkedServer(
        models=paths, cache_dir=programs.cache_dir(), start_timeout_s=100, extra_args=options
    ) as server:
        yield server.address


@pytest.fixture
def client(address: str) -> Iterator[stepwell.Client]:
    with stepwell.connect(address) as client:
        yield client
        for session in client.sessions():
            client.close_session(session.session_id)


@pytest.fixture
def run(address: str, client: stepwell.Client) -> Run:
    def run_one(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, arguments, input=stdin, env={"STEPWELL_SERVER": address})

    return run_one


def documents(result: Result) -> list[Any]:
    """The documents of JSON lines."""
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def refused(result: Result, says: str, exit_code: int = 1) -> None:
    assert says in result.stderr
    assert result.stderr.startswith("stepwell: error: ")
    assert (result.stderr.count("\n"), result.exit_code) == (1, exit_code)


def test_models_and_sessions_are_completed(address: str, client: stepwell.Client) -> None:
    with client.open_sessions("forecast", 120, session_ids=[f"user-{number:03}" for number in range(120)]):
        asked = {
            "stepwell step a --open ''": ["forecast", "several"],
            "stepwell sessions list --model sev": ["several"],
            "stepwell bench fore": ["forecast"],
            "stepwell sessions show user-11": [f"user-11{number}" for number in range(10)],
            "stepwell state set user-007": ["user-007"],
            "stepwell sessions close user-001 user-": [f"user-{number:03}" for number in range(100)],
            "stepwell step nobody": [],
        }
        for words, expected in asked.items():
            environment = {
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
                "_MAIN_COMPLETE": "bash_complete",
                "STEPWELL_SERVER": address,
            }
            result = CliRunner(env=environment).invoke(main)
            assert (words, result.stdout.split()) == (words, [f"plain,{value}" for value in expected])


def test_models_are_shown(run: Run) -> None:
    lines = run("models").stdout.splitlines()

    assert lines[0].split() == [
        "MODEL",
        "VERSIONS",
        "FINGERPRINT",
        "INPUTS",
        "OUTPUTS",
        "STATE",
        "SESSIONS",
        "PROOF",
        "EXECUTOR",
        "WHY",
    ]
    *records, front = lines[1:]
    assert [line.split()[0] for line in records] == ["forecast", "several"]
    assert "x float32 (B, T, 3)" in lines[1]
    assert "lstm/h float32 (B, 8); lstm/c float32 (B, 8)" in lines[1]
    assert "profile float32 (B, 5)" in lines[2]
    assert all("proven from its graph; compared with Keras over 512 time steps" in line for line in records)
    hint = " (slower; for the native front, run on the server: pip install ./server/front (in a clone of Stepwell))"
    assert front == f"front: {FRONT}" + (hint if FRONT == "python" else "")


def test_models_for_programs_have_every_documented_key(run: Run, client: stepwell.Client) -> None:
    whole = document(run("models", "--json"))
    shown = whole["models"]

    assert whole["front"] == client.server_info().front == FRONT
    texts = [text for text, _ in main.commands["models"].load().json_keys[2:]]  # type: ignore[attr-defined]
    keys = [key for text in texts if not text.startswith("versions.") for key in text.split(", ")]
    within = [f"proof.{key}" for key in shown[0]["proof"]]
    assert [[*model, *within] for model in shown] == [keys, keys]
    assert shown[0]["proof"] == {"compared_steps": 512, "compared_share": 1.0, "rows": "", "unproven": ""}
    assert [model["fingerprint"] for model in shown] == [model.fingerprint for model in client.models()]
    assert shown[0]["inputs"] == [{"name": "x", "dtype": "float32", "shape": [3], "temporal": True}]
    assert shown[0]["executor"] == "litert"


def test_a_model_is_shown_with_all_that_is_known_of_it(run: Run, client: stepwell.Client) -> None:
    info = client.model("forecast")
    assert info.provenance is not None
    lines = run("models", "show", "forecast").stdout.splitlines()
    assert any(line.split() == ["fingerprint", info.fingerprint] for line in lines)
    assert any(line.startswith("source") and info.provenance.source_sha256 in line for line in lines)
    assert any(line.split()[:2] == ["lstm", "LSTM"] for line in lines)

    shown = document(run("models", "show", "forecast", "--json"))
    keys = main.commands["models"].load().commands["show"].json_keys  # type: ignore[attr-defined]
    names = {key for text, _ in keys for key in text.split(", ")}
    within = {f"{outer}.{key}" for outer in ("proof", "provenance") for key in shown[outer]}
    assert {*shown, *within} == names
    assert shown["provenance"]["layers"][1]["kind"] == "LSTM"
    refused(run("models", "show", "nothing"), "nothing")
    refused(run("models", "--json", "show", "forecast"), "--json must follow 'show'", 2)


def test_steps_of_the_command_line_are_those_of_the_sdk(
    run: Run, client: stepwell.Client, tmp_path: Path
) -> None:
    x = np.random.default_rng(5).random((1, 6, 3), dtype=np.float32)
    np.save(tmp_path / "x.npy", x[:, :2])
    (tmp_path / "x.json").write_text(json.dumps(x[:, 2].tolist()))
    (tmp_path / "x.csv").write_text(
        "a,b,c\n" + "\n".join(",".join(map(str, row)) for row in x[0, 3:5].tolist())
    )
    whole, _ = client.predict("forecast", x)

    def step(value: str, **options: str) -> Any:
        return document(run("step", "user-41", "--input", value, "--json", *options.get("more", "").split()))

    answers = [
        step(f"{tmp_path}/x.npy", more="--open forecast"),
        step(f"@{tmp_path}/x.json"),
        step(f"{tmp_path}/x.csv"),
        step(f"x={x[:, 5:].tolist()}", more="--outputs last"),
    ]

    values = [np.asarray(answer["outputs"]["y"]["values"], np.float32).reshape(-1, 2) for answer in answers]
    np.testing.assert_array_equal(np.concatenate(values), np.asarray(whole)[0])
    assert [answer["revision"] for answer in answers] == [1, 2, 3, 4]
    assert [answer["position"] for answer in answers] == [2, 3, 5, 6]
    assert answers[0]["outputs"]["y"]["shape"] == [1, 2, 2]


def test_a_step_for_people_and_without_outputs(run: Run) -> None:
    options = ("--open", "forecast", "--input", "[[1, 2, 3]]")
    lines = run("step", "user-42", *options).stdout.splitlines()
    assert (lines[0], lines[-1]) == ("y float32 (1, 2)", "revision 1, position 1")
    assert document(run("step", "s", *options, "--outputs", "none", "--json"))["outputs"] == {}


def test_several_inputs_and_outputs(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    series, profile = rng.random((2, 4, 3)), rng.random((2, 5))
    np.savez(tmp_path / "both.npz", series=series, profile=profile)

    options = ["--open", "several", "--batch-size", "2", "--input", f"{tmp_path}/both.npz"]
    named = document(run("step", "a", *options, "--input", "token=[[1, 2, 3, 4], [4, 3, 2, 1]]", "--json"))
    whole = {"series": series.tolist(), "profile": profile.tolist(), "token": [[1, 2, 3, 4], [4, 3, 2, 1]]}
    stdin = document(run("step", "b", *options[:4], "--input", "-", "--json", stdin=json.dumps(whole)))

    assert set(named["outputs"]) == {"each", "head", "echo", "same"}
    assert named["outputs"] == stdin["outputs"]
    refused(run("step", "a", "--input", "[[1]]"), "--input needs a name", exit_code=2)


def test_an_input_without_its_first_axis_is_written_as_it_should_be(
    run: Run, client: stepwell.Client
) -> None:
    client.open_session("forecast", session_id="one")
    for given, hint in (
        ("[0.1, 0.2, 0.3]", "did you mean --input '[[0.1, 0.2, 0.3]]'?"),
        ("x=[0.1, 0.2, 0.3]", "did you mean --input 'x=[[0.1, 0.2, 0.3]]'?"),
        ('{"x": [0.1, 0.2, 0.3]}', "did you mean one more pair of brackets around it, [[...]]?"),
    ):
        refused(run("step", "one", "--input", given), hint)


def test_a_session_that_is_not_there_is_never_made(run: Run, client: stepwell.Client) -> None:
    for arguments in (
        ("step", "nobody", "--input", "[[1, 2, 3]]"),
        ("state", "get", "nobody"),
        ("state", "set", "nobody", "--zero"),
        ("sessions", "show", "nobody"),
    ):
        refused(run(*arguments), "'nobody'")
    assert client.sessions() == []


def test_open_continues_a_session_whatever_its_batch_size(run: Run, client: stepwell.Client) -> None:
    client.open_session("forecast", batch_size=2, session_id="pair")
    x = "[[1, 2, 3], [4, 5, 6]]"

    assert document(run("step", "pair", "--open", "forecast", "--input", x, "--json"))["revision"] == 1
    for arguments, text in (
        (("pair", "--open", "forecast", "--batch-size", "3"), "batch_size 2"),
        (("pair", "--open", "several"), "forecast"),
        (("pair", "--model", "several"), "--model must be the session's model"),
        (("new", "--open", "gone"), "gone"),
    ):
        refused(run("step", *arguments, "--input", x), text)


def test_a_session_that_a_step_opens_may_have_an_idle_limit(run: Run, client: stepwell.Client) -> None:
    options = ["--open", "forecast", "--input", "[[1, 2, 3]]"]
    run("step", "short", *options, "--max-idle-s", "1h30m")
    run("step", "short", *options, "--max-idle-s", "5")
    assert client.session_info("short").max_idle_s == 5400.0, "it was there the second time"
    refused(run("step", "other", *options, "--max-idle-s", "0.5"), "max_idle_s must be from 1 to 315360000")


@pytest.mark.parametrize(
    "x", ["[[1, 2]]", "[1, 2, 3]", "[[[[1, 2, 3]]]]", "[[1, 2, NaN]]", "[]", "5", "z=[[1, 2, 3]]"]
)
def test_a_bad_input_is_one_line_and_changes_nothing(run: Run, client: stepwell.Client, x: str) -> None:
    before = client.open_session("forecast", session_id="user-43").revision

    result = run("step", "user-43", "--input", x)

    refused(result, "input")
    assert client.session_info("user-43").revision == before


def test_a_state_is_saved_and_set(run: Run, client: stepwell.Client, tmp_path: Path) -> None:
    file = tmp_path / "saved.safetensors"
    session = client.open_session("forecast", session_id="user-44")
    session.step(np.ones((1, 3), np.float32))
    state = session.get_state()

    shown = document(run("state", "get", "user-44", "-o", str(file), "--json"))
    assert stepwell.State.load(file) == state
    assert (shown["file"], shown["revision"], shown["position"]) == (str(file), 1, 1)
    assert shown["model_fingerprint"] == state.fingerprint
    assert {name: tensor["values"] for name, tensor in shown["state"].items()} == {
        name: array.tolist() for name, array in state.items()
    }

    assert run("state", "set", "user-44", "--zero").stdout == "revision 2, position 0\n"
    assert all(not array.any() for array in session.get_state().values())
    set_again = document(run("state", "set", "user-44", str(file), "--json"))
    assert (set_again["revision"], set_again["position"]) == (3, 1), "the position is the file's"
    assert session.get_state() == state


def test_a_state_for_people(run: Run, client: stepwell.Client, tmp_path: Path) -> None:
    client.open_session("forecast", session_id="user-45")

    lines = run("state", "get", "user-45", "-o", f"{tmp_path}/s.safetensors").stdout.splitlines()

    assert lines[0].split() == ["TENSOR", "DTYPE", "SHAPE", "MIN", "MEAN", "MAX", "ZEROS"]
    assert lines[1].split() == ["lstm/h", "float32", "(1,", "8)", "0", "0", "0", "8", "of", "8"]
    assert lines[-2:] == ["forecast at revision 0, position 0", f"saved to {tmp_path}/s.safetensors"]


def test_a_state_that_cannot_be_saved_names_the_option_and_the_path(
    run: Run, client: stepwell.Client, tmp_path: Path
) -> None:
    client.open_session("forecast", session_id="user-46")
    file = f"{tmp_path}/nowhere/s.safetensors"

    refused(run("state", "get", "user-46", "-o", file), f"cannot write -o {file}: No such file", exit_code=2)


def test_rows_of_a_state_are_set(run: Run, client: stepwell.Client) -> None:
    session = client.open_session("forecast", batch_size=3, session_id="three")
    session.step(np.ones((3, 3), np.float32))
    before = session.get_state()

    document(run("state", "set", "three", "--zero", "--rows", "0,2", "--json"))

    for name, array in session.get_state().items():
        assert not array[[0, 2]].any()
        np.testing.assert_array_equal(array[1], before[name][1])
    refused(run("state", "set", "three", "--zero", "--rows", "3"), "rows")
    refused(run("state", "set", "three", "--zero", "--rows", "1,1"), "rows")


def test_a_state_of_another_model_is_refused(run: Run, client: stepwell.Client, tmp_path: Path) -> None:
    client.open_session("several", session_id="other").get_state().save(tmp_path / "other.safetensors")
    client.open_session("forecast", session_id="user-47")

    refused(run("state", "set", "user-47", f"{tmp_path}/other.safetensors"), "fingerprint")


def test_sessions_are_listed(run: Run, client: stepwell.Client) -> None:
    for name in ("user-2", "user-1", "guest"):
        client.open_session("forecast", session_id=name)
    client.open_session("several", batch_size=4, session_id="user-3")

    lines = run("sessions", "list").stdout.splitlines()
    ids = [
        session["session_id"] for session in documents(run("sessions", "list", "--prefix", "user-", "--json"))
    ]
    of_model = documents(run("sessions", "list", "--model", "several", "--json"))

    headings = ["SESSION", "MODEL", "VERSION", "BATCH", "REVISION", "POSITION", "AGE", "IDLE", "MAX-IDLE"]
    assert lines[0].split() == headings
    cells = [line.split() for line in lines[1:]]
    assert {row[-1] for row in cells} == {"none"}
    assert [[*row[:2], *row[3:6]] for row in cells] == [
        ["guest", "forecast", "1", "0", "0"],
        ["user-1", "forecast", "1", "0", "0"],
        ["user-2", "forecast", "1", "0", "0"],
        ["user-3", "several", "4", "0", "0"],
    ]
    assert ids == ["user-1", "user-2", "user-3"]
    assert [(session["session_id"], session["batch_size"]) for session in of_model] == [("user-3", 4)]


def test_a_long_id_is_whole_in_a_pipe_and_pads_no_other_row(run: Run, client: stepwell.Client) -> None:
    long = "user-" + "x" * 251
    for name in ("user-1", long):
        client.open_session("forecast", session_id=name)

    heading, first, second = run("sessions", "list").stdout.splitlines()

    assert second.split()[:2] == [long, "forecast"]
    assert max(len(heading), len(first)) < 80
    assert heading.index("MODEL") == first.index("forecast")


def test_a_terminal_shows_a_hundred_sessions_and_how_many_more_there_are(
    run: Run, client: stepwell.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.open_sessions("forecast", 103, session_ids=[f"user-{number:03}" for number in range(103)])
    assert len(run("sessions", "list").stdout.splitlines()) == 104, "all, into a pipe"
    monkeypatch.setattr("stepwell.cli.sessions.shows_on_terminal", lambda: True)
    cut = run("sessions", "list")
    assert len(cut.stdout.splitlines()) == 101
    assert cut.stderr == "3 more; use --all to list them, or --limit N\n"
    for options, count in (
        (("--all",), 103),
        (("--limit", "102"), 102),
        (("--prefix", "user-00"), 10),
    ):
        listed = run("sessions", "list", *options)
        assert (len(listed.stdout.splitlines()) - 1, listed.stderr) == (count, "")
    assert len(documents(run("sessions", "list", "--json"))) == 103
    refused(
        run("sessions", "list", "--all", "--limit", "3"), "--all must be given without --limit", exit_code=2
    )


def test_no_sessions_are_an_empty_list(run: Run) -> None:
    assert documents(run("sessions", "list", "--json")) == []
    result = run("sessions", "list")
    assert (result.stdout, result.stderr, result.exit_code) == ("", "no sessions\n", 0)


def test_a_session_is_shown(run: Run, client: stepwell.Client) -> None:
    client.open_session("forecast", session_id="user-48").step(np.ones((1, 5, 3), np.float32))

    shown = document(run("sessions", "show", "user-48", "--json"))
    facts = dict(line.split(maxsplit=1) for line in run("sessions", "show", "user-48").stdout.splitlines())

    assert (shown["revision"], shown["position"], shown["resident"]) == (1, 5, True)
    assert 0 <= shown["idle_s"] <= shown["age_s"] < 60
    assert shown["created_time"].endswith("Z")
    assert (facts["session"], facts["position"]) == ("user-48", "5")
    assert (shown["max_idle_s"], facts["idle"]) == (None, "limit   none")
    unnamed = client.open_session("forecast").id
    assert document(run("sessions", "show", unnamed, "--json"))["max_idle_s"] == 3600.0
    assert re.search(r"^idle limit +1 h$", run("sessions", "show", unnamed).stdout, re.M)


def test_sessions_are_listed_by_id_and_by_how_long_they_were_not_used(
    run: Run, client: stepwell.Client
) -> None:
    for name in ("b", "a", "c"):
        client.open_session("forecast", session_id=name)
    client.open_session("forecast", session_id="b").get_state()

    def listed(*options: str) -> list[str]:
        return [each["session_id"] for each in documents(run("sessions", "list", "--json", *options))]

    assert listed("--limit", "2") == ["a", "b"]
    assert listed("--idle-longer", "1h") == []
    assert listed("--idle-longer", "0s", "--prefix", "c") == ["c"]
    lines = run("sessions", "list", "--limit", "1").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["SESSION", "a"]
    for option, value, text, code in (
        ("--sort", "idle", "No such option '--sort'", 2),
        ("--limit", "0", "--limit", 2),
        ("--idle-longer", "soon", "'soon'", 2),
        ("--model", "nobody", "'nobody'", 1),
    ):
        refused(run("sessions", "list", option, value), text, code)


def test_many_sessions_are_listed_in_the_columns_of_the_first(run: Run, client: stepwell.Client) -> None:
    with client.open_sessions("forecast", 1200) as group:
        lines = run("sessions", "list").stdout.splitlines()
        assert [line.split()[0] for line in lines] == ["SESSION", *sorted(group.ids)]
        assert len({line.index(" forecast ") for line in lines[1:]}) == 1
        assert len(documents(run("sessions", "list", "--json"))) == 1200


def test_sessions_are_closed_by_a_filter_after_a_look(
    run: Run, client: stepwell.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("user-1", "user-2", "guest"):
        client.open_session("forecast", session_id=name)
    client.open_session("several", session_id="user-3")
    shown = run("sessions", "close", "--prefix", "user-", "--model", "forecast", "--dry-run")
    assert shown.stdout == "2 sessions: user-1, user-2\n"
    found = document(run("sessions", "close", "--all", "--dry-run", "--json"))
    assert found == {"would_close": 4, "sample": ["guest", "user-1", "user-2", "user-3"]}
    assert run("sessions", "close", "guest", "--dry-run").stdout == "1 session: guest\n"
    for arguments, text, code in (
        (("nobody", "--dry-run"), "'nobody'", 1),
        (("--prefix", "user-"), "pass --yes", 2),
        (("--prefix", "", "--dry-run"), "--prefix must not be empty", 2),
        (("guest", "--all", "--yes"), "either sessions, a filter", 2),
        (("--yes",), "either sessions, a filter", 2),
    ):
        refused(run("sessions", "close", *arguments), text, code)
    assert run("sessions", "close", "--idle-longer", "1h", "--yes").stdout == "closed 0 sessions\n"
    assert len(client.sessions()) == 4
    monkeypatch.setattr("stepwell.cli.sessions.is_terminal", lambda: True)
    asked = run("sessions", "close", "--prefix", "user-", "--model", "forecast", stdin="y\n")
    assert "2 sessions: user-1, user-2" in asked.stderr
    assert "Delete the state of 2 sessions?" in asked.stderr
    assert asked.stdout == "closed 2 sessions\n"
    assert document(run("sessions", "close", "--all", "--yes", "--json")) == {"closed": 2}
    assert client.sessions() == []


def test_sessions_are_saved_and_come_back(run: Run, client: stepwell.Client, tmp_path: Path) -> None:
    file = tmp_path / "some.sessions"
    for name in ("saved-a", "saved-b", "saved-c"):
        client.open_session("forecast", session_id=name).step(np.ones((1, 2, 3), np.float32))
    saved = run("sessions", "export", "saved-a", "nobody", "saved-b", "-o", str(file), "--json")
    assert json.loads(saved.stdout)["exported"] == 2
    assert list(json.loads(saved.stdout)["failed"]) == ["nobody"]
    refused(saved, "1 sessions could not be exported: session_id must be that of an open session")
    run("sessions", "close", "saved-a", "--yes")
    back = run("sessions", "import", str(file))
    assert back.stdout == "imported 2, replaced 0, skipped 0 sessions\n", "b is there as it is in the file"
    assert client.session_info("saved-a").revision == 1
    client.open_session("forecast", session_id="saved-b").reset_states()
    refused(run("sessions", "import", str(file)), "1 sessions could not be imported: session_id must be new")
    assert client.session_info("saved-b").revision == 2
    assert document(run("sessions", "import", str(file), "--skip-existing", "--json")) == {
        "imported": 1, "replaced": 0, "skipped": 1, "failed": {},
    }  # fmt: skip
    assert document(run("sessions", "import", str(file), "--replace", "--json"))["replaced"] == 1
    assert client.session_info("saved-b").revision == 1
    assert run("sessions", "export", "-o", str(file)).stdout == f"exported 3 sessions to {file}\n"
    file.write_bytes(file.read_bytes()[:-1])
    for arguments, text, code in (
        (("import", str(file)), "unchanged; at byte", 1),
        (("export", "-o", str(tmp_path / "no" / "where")), "cannot write -o", 2),
        (("export", "saved-a", "--prefix", "saved-b", "-o", str(file)), "either", 2),
    ):
        refused(run("sessions", *arguments), text, code)


def test_sessions_are_closed(run: Run, client: stepwell.Client) -> None:
    for name in ("a", "b", "c", "d"):
        client.open_session("forecast", session_id=name)

    assert run("sessions", "close", "a", "--yes").stdout == "closed a\n"
    half_way = run("sessions", "close", "b", "nobody", "c", "--yes", "--json")

    assert json.loads(half_way.stdout) == {"closed": ["b"]}
    refused(half_way, "'nobody'")
    assert [session.session_id for session in client.sessions()] == ["c", "d"]


@pytest.mark.parametrize(("answer", "left", "code"), [("y\n", [], 0), ("n\n", ["a"], 1), ("", ["a"], 130)])
def test_closing_asks_on_a_terminal(
    run: Run,
    client: stepwell.Client,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    left: list[str],
    code: int,
) -> None:
    client.open_session("forecast", session_id="a")
    monkeypatch.setattr("stepwell.cli.sessions.is_terminal", lambda: True)

    result = run("sessions", "close", "a", stdin=answer)

    assert result.exit_code == code
    assert "Delete the state of session a?" in result.stderr
    assert [session.session_id for session in client.sessions()] == left


def test_a_server_that_is_away_is_named(unused_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPWELL_CONNECT_TIMEOUT_S")
    result = CliRunner().invoke(main, ["models", "--server", unused_address, "--timeout-s", "1000"])

    refused(
        result,
        f"no server was reached at {unused_address} (--server) within 1 s (STEPWELL_CONNECT_TIMEOUT_S): Connection "
        "refused; is `stepwell serve` running there?",
    )


@pytest.fixture
def unused_address() -> Iterator[str]:
    """A port that is taken and refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_ctrl_c_is_quiet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "stepwell", "models", "--server", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        connection, _ = silent.accept()  # the command is under way, and gets no answer
        with connection:
            process.send_signal(signal.SIGINT)
            output = process.communicate(timeout=200)

    assert output == (b"", b"")
    assert process.returncode == 130


def test_serve_and_stop(address: str, tmp_path: Path) -> None:
    arguments = [
        f"m={programs.saved(MODELS['forecast']).path}",
        "--listen",
        "127.0.0.1:0",
        "--cache-dir",
        str(programs.cache_dir()),
        "--data-dir",
        str(tmp_path / "data"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "stepwell", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline()
        address = ready.split()[-1]
        shown = CliRunner().invoke(main, ["models", "--server", address, "--json"])
        process.terminate()
        code = process.wait(timeout=200)
    finally:
        process.kill()
        process.stdout.close()

    assert re.match(r"stepwell: (native|python) front\b.*, listening on 127\.0\.0\.1:", ready)
    assert [model["name"] for model in document(shown)["models"]] == ["m"]
    assert code == 0
