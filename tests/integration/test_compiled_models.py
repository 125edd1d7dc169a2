"""Compile once, serve anywhere: the file that `stepwell compile` makes, served, checked and shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import stepwell
from stepwell.cli import main
from stepwell_server import program_file
from stepwell_server.engine.executors import load_executor, trial
from support.models import programs
from support.servers.fork_server import ForkedServer

CACHE = {"STEPWELL_CACHE_DIR": str(programs.cache_dir())}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env=CACHE)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "seq.stepwell"
    done = run("compile", str(programs.saved("lstm_dense").path), "-o", str(path))
    assert done.exit_code == 0, done.stderr
    return path


def test_it_is_told_where_it_went_and_what_was_done(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("compile", str(programs.saved("lstm_dense").path))
    assert done.stdout.splitlines() == [
        "proof: proven from its graph, compared with Keras over 512 time steps",
        "executor: litert (LiteRT converts every operation of the model)",
        "bits: the same for a row at every batch size (23 sizes up to 256 compared)",
        f"fingerprint: {program_file.load(file).fingerprint}",
        f"written: lstm_dense.stepwell, {file.stat().st_size} bytes, from the cache",
        "serve it: stepwell serve lstm_dense=lstm_dense.stepwell",
    ]
    assert Path("lstm_dense.stepwell").read_bytes() == file.read_bytes()
    document = json.loads(run("compile", str(programs.saved("lstm_dense").path), "--json").stdout)
    keys = [key for text, _ in main.commands["compile"].load().json_keys for key in text.split(", ")]  # type: ignore[attr-defined]
    assert list(document) == keys
    assert (document["bytes"], document["batch_sizes"], document["cached"]) == (file.stat().st_size, [], True)


def test_refusals_leave_nothing_behind(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stepwell_server.cli import compile as command

    model, target = str(programs.saved("lstm_dense").path), tmp_path / "out.stepwell"
    for arguments, says in (
        ((str(file),), "is already compiled; serve it, or show it with: stepwell models show"),
        ((model, "-o", "x.keras"), "'-o' must be a file that ends in .stepwell; got 'x.keras'"),
        (
            (model, "-o", str(tmp_path / "gone" / "x.stepwell")),
            "cannot be written: No such file or directory",
        ),
        ((str(tmp_path / "gone.keras"), "-o", str(target)), "refused: "),
    ):
        done = run("compile", *arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert says in done.stderr.splitlines()[-1]
    on_tensorflow = dataclasses.replace(
        program_file.load(file),
        executor="tensorflow",
        executor_reason="LiteRT cannot run this model: its sin is wrong for large numbers; TensorFlow runs it",
    )
    monkeypatch.setattr(command, "load_program", lambda *_arguments, **_options: on_tensorflow)
    done = run("compile", model, "-o", str(target))
    assert done.exit_code == 2
    assert (
        "its sin is wrong for large numbers, only TensorFlow can; a .stepwell file is for servers without TensorFlow"
        in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sessions_go_on_from_the_keras_file_to_the_compiled_one(file: Path, tmp_path: Path) -> None:
    """And the second server serves both kinds."""
    saved, other = programs.saved("lstm_dense"), programs.saved("gru_reset_after")
    x = np.random.default_rng(5).standard_normal((2, 6, 3)).astype(np.float32)
    options: dict[str, Any] = {"data_dir": tmp_path, "cache_dir": saved.cache_dir, "start_timeout_s": 100}

    with (
        ForkedServer(models={"seq": saved.path}, **options) as server,
        stepwell.connect(server.address) as client,
    ):
        whole, _ = client.predict("seq", x)
        before = client.model("seq")
        session = client.open_session("seq", session_id="user", batch_size=2)
        first = session.step(x[:, :3])
    models = {"seq": file, "other": other.path}
    with ForkedServer(models=models, **options) as server, stepwell.connect(server.address) as client:
        after = client.model("seq")
        session = client.open_session("seq", session_id="user", batch_size=2)
        assert session.position == 3
        second = session.step(x[:, 3:])
        client.open_session("other").step(np.zeros((1, 3), np.float32))

    assert np.concatenate([first, second], 1).tobytes() == whole.tobytes()
    told = [dataclasses.replace(info, sessions=0, versions=()) for info in (before, after)]
    assert told[0] == told[1]
    assert after.versions[0].fingerprint == before.versions[0].fingerprint
    assert after.provenance is not None
    assert [layer.kind for layer in after.provenance.layers] == ["InputLayer", "LSTM", "Dense"]


def test_check_tries_it_here_and_keeps_to_what_it_can_say(file: Path, tmp_path: Path) -> None:
    done = run("check", str(file))
    assert done.exit_code == 0, done.stderr
    assert (
        done.stdout.splitlines()[0] == "proof: proven from its graph, compared with Keras over 512 time steps"
    )
    assert done.stdout.splitlines()[-1].startswith(
        "verdict: same: the model computes the same here as where it was compiled"
    )
    np.save(tmp_path / "x.npy", np.ones((1, 5, 3)))
    done = run("check", str(file), "--data", str(tmp_path / "x.npy"))
    assert done.exit_code == 2
    assert "not checked: --data: " in done.stderr
    assert "name the .keras file" in done.stderr


def test_what_computes_something_else_than_it_did_is_found_out(file: Path, tmp_path: Path) -> None:
    """As on a processor whose kernels are wrong; here it is the known answers that are."""
    program = program_file.load(file)
    assert program.trial is not None
    answers = tuple(np.add(value, 0.01, dtype="float32") for value in program.trial.outputs)
    changed = dataclasses.replace(program, trial=dataclasses.replace(program.trial, outputs=answers))
    program_file.save(changed, tmp_path / "seq.stepwell")
    done = run("check", str(tmp_path / "seq.stepwell"), "--json")
    assert done.exit_code == 2
    document = json.loads(done.stdout)
    assert document["verdict"] == "refused"
    assert (
        "output 'y' has other values on this processor than where the program was compiled"
        in document["reason"]
    )


def test_specs_that_do_not_fit_the_flatbuffer_are_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_file.load(file)
    assert program.trial is not None
    (x,), (y,) = program.inputs, program.trial.inputs
    wider = dataclasses.replace(
        program,
        inputs=(dataclasses.replace(x, shape=(4,)),),
        trial=dataclasses.replace(program.trial, inputs=(np.zeros((len(y), 4), np.float32),)),
    )
    program_file.save(wider, tmp_path / "seq.stepwell")
    done = run("check", str(tmp_path / "seq.stepwell"))
    assert done.exit_code == 2
    assert (
        "seq.stepwell: LiteRT cannot run it here: it takes 'x' with the shape (3,) of a row; got (4,)"
        in done.stderr
    )
    huge = tuple(dataclasses.replace(spec, shape=(2**28,)) for spec in program.state)  # 16 rows are 16 GB
    zeros = tuple(np.zeros((2**28,), spec.dtype) for spec in huge)
    wider = dataclasses.replace(program, state=huge, initial=zeros)
    monkeypatch.setattr(trial, "initial_rows", None)  # it would take them
    with pytest.raises(trial.TrialError, match=r"^LiteRT cannot run it here: it takes '.*' with the shape"):
        trial.sizes_here(wider)
    with pytest.raises(ValueError, match=r"."):
        load_executor(dataclasses.replace(program, files={"program.tflite": b"nonsense"}))


def test_a_file_is_shown_without_a_server(file: Path, tmp_path: Path) -> None:
    lines = run("models", "show", str(file)).stdout.splitlines()
    shown = {line.split("  ")[0]: line.split("  ", maxsplit=1)[1].strip() for line in lines if "  " in line}
    assert shown["model"] == str(file)
    assert shown["inputs"] == "x float32 (B, T, 3)"
    assert shown["proof"] == "proven from its graph; compared with Keras over 512 time steps"
    assert shown["source"].startswith("lstm_dense.keras (SHA-256 ")
    assert shown["state size"] == "64 bytes per row; a time step replaces 64"
    assert shown["cost"] == "368 multiply-adds per row and time step"
    assert "stepwell 0" in shown["compiled"]
    assert "keras 3" in shown["compiled"]
    assert any(line.split()[:2] == ["lstm", "LSTM"] and line.split()[-1] == "384" for line in lines)
    document = json.loads(run("models", "show", str(file), "--json").stdout)
    assert document["sessions"] is None
    assert document["provenance"]["parameters"] == 402
    for path, says in ((tmp_path / "gone.stepwell", "there is no such file"), (tmp_path, "is a folder")):
        done = run("models", "show", str(path))
        assert done.exit_code == 2
        assert f"{path}: {says}" in done.stderr
