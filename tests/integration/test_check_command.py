"""`stepwell check`, and what `stepwell serve` says about the proof of its models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stepwell
from stepwell_server.compile import cache
from support.models import programs, trusted, zoo
from support.models.programs import Saved
from support.servers.server_process import ServerProcess, forecast

# Keras calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sequences that fit the forecast."""
    file = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(file, np.random.default_rng(3).standard_normal((2, 40, 3)))
    return file


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A model in whose place the cache holds the program of another one, as a broken compiler would make it."""
    folder = tmp_path_factory.mktemp("swapped")
    known = forecast()
    zoo.build("lstm_dense", seed=5).save(folder / "other.keras")
    cache.make(folder / "cache")
    entry = cache.entry(folder / "cache", programs.cache_key(folder / "other.keras", ()))
    with cache.unfinished(entry) as file:
        shutil.copyfile(cache.entry(known.cache_dir, programs.cache_key(known.path, ())), file)
        cache.publish(file, entry)
    return Saved(folder / "other.keras", folder / "cache")


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stepwell", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_a_good_model_passes_on_ones_own_data(data: Path) -> None:
    known = forecast()
    done = _check(str(known.path), "--cache-dir", str(known.cache_dir), "--data", str(data))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "proof: proven from its graph, compared with Keras over 512 time steps"
    assert f"compared with Keras on {data}: 2 rows of 40 time steps" in lines
    assert any(line.startswith("output 'y': the largest difference is ") for line in lines)
    assert lines[-1] == "verdict: equal: stepping the model gives what Keras computes on these sequences"
    assert sum(line.split()[0] in {"step", "steps"} for line in lines if line.startswith("   ")) == 14


@pytest.mark.slow
def test_a_model_that_is_not_what_runs_is_found_out(data: Path, swapped: Saved) -> None:
    arguments = (str(swapped.path), "--cache-dir", str(swapped.cache_dir), "--data", str(data))
    done = _check(*arguments)
    assert done.returncode == 1, done.stderr
    assert "STEPPING DOES NOT GIVE WHAT KERAS COMPUTES" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(
        "verdict: differs: stepping the model does NOT give what Keras computes"
    )
    done = _check(*arguments, "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["verdict"] == "differs"
    assert document["proof"] == {"rows": "", "compared_steps": 512, "compared_share": 1.0, "unproven": ""}
    assert [output["is_allowed"] for output in document["outputs"]] == [False]
    assert len(document["outputs"][0]["by_step"]) == 40


@pytest.mark.slow
def test_what_cannot_be_stepped_and_what_cannot_be_read_exit_with_2(tmp_path: Path) -> None:
    zoo.build("convolution_over_time").save(tmp_path / "conv.keras")
    done = _check(str(tmp_path / "conv.keras"), "--cache-dir", str(tmp_path))
    assert done.returncode == 2
    assert "the layer 'conv' (Conv1D) looks ahead" in done.stderr.splitlines()[-1]
    done = _check(str(tmp_path / "gone.keras"), "--cache-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("stepwell: error: refused: ")
    assert done.stderr.endswith("gone.keras: there is no such file\n")
    done = _check(str(tmp_path / "gone.keras"), "--cache-dir", str(tmp_path), "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["verdict"]) == (2, "refused")
    assert document["reason"].endswith("there is no such file")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing argument 'MODEL'"),
        (("m.keras", "--probe-steps", "0"), "'--probe-steps': 0 is not in the range 1<=x<=100000"),
        (("m.keras", "--zigzag"), "No such option '--zigzag'"),
    ],
    ids=["nothing", "steps", "unknown"],
)
def test_a_wrong_command_line_is_told_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = _check(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("stepwell: error: ")
    assert line.endswith(f"{says} (see 'stepwell check --help')")


@pytest.mark.slow
def test_data_that_do_not_fit_are_found_before_the_model_is_compiled(tmp_path: Path) -> None:
    zoo.build("lstm_dense", seed=11).save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", np.zeros((2, 5, 4)))
    arguments = (str(tmp_path / "model.keras"), "--cache-dir", str(tmp_path / "cache"))
    done = _check(*arguments, "--data", str(tmp_path / "x.npy"))
    assert (done.returncode, done.stdout) == (2, "")
    *stages, last = done.stderr.splitlines()
    assert stages == ["load...", "trace..."]
    assert last.startswith(
        f"stepwell: error: not checked: --data: {tmp_path}/x.npy: input 'x' must have the shape (batch, T, 3)"
    )
    (tmp_path / "bad.npy").write_text("1,2,3")
    done = _check(*arguments, "--data", str(tmp_path / "bad.npy"), "--json")
    assert (done.returncode, json.loads(done.stdout)["verdict"]) == (2, "not checked")
    assert len(done.stderr.splitlines()) == 1
    check_with = ("--check-with", f"m={tmp_path}/bad.npy", "--listen", "127.0.0.1:0", *arguments[1:])
    with ServerProcess(f"m={tmp_path}/model.keras", *check_with, ready=False) as server:
        code, _, err = server.finish()
    assert code == 2
    assert err.splitlines()[-1].startswith(
        f"stepwell: error: model m: --check-with: {tmp_path}/bad.npy: must be a NumPy .npy"
    )


@pytest.mark.slow
def test_the_cache_is_that_of_serve_and_an_end_by_signal_leaves_nothing_behind(tmp_path: Path) -> None:
    zoo.build("lstm_dense", seed=9).save(tmp_path / "model.keras")
    environment = os.environ | {"STEPWELL_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "stepwell", "check", str(tmp_path / "model.keras")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "load...\n"
        process.terminate()
        assert process.stderr.read().splitlines()[2:] == []  # after the names of stages
        assert process.wait(200) == 130
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_a_start_checks_with_ones_own_data_and_is_refused_if_they_differ(data: Path, swapped: Saved) -> None:
    known = forecast()
    arguments = ("--listen", "127.0.0.1:0", "--check-with", f"forecast={data}")
    with ServerProcess(f"forecast={known.path}", "--cache-dir", str(known.cache_dir), *arguments) as server:
        server.signal()
        _, _, err = server.finish()
    assert "compared with Keras model=forecast" in err
    with ServerProcess(
        f"forecast={swapped.path}", "--cache-dir", str(swapped.cache_dir), *arguments, ready=False
    ) as server:
        code, out, err = server.finish()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        f"stepwell: error: model forecast: --check-with {data}: output 'y' differs from Keras"
    )


@pytest.mark.slow
def test_trust_is_shown_wherever_the_model_is(tmp_path: Path) -> None:
    trusted.singular_values().save(tmp_path / "svd.keras")
    arguments = (f"svd={tmp_path}/svd.keras", f"strict={tmp_path}/svd.keras", "--bad-models", "skip")
    where = ("--cache-dir", str(tmp_path / "cache"), "--listen", "127.0.0.1:0")
    options = (
        "--import",
        "support.models.custom_layers",
        "--probe-steps",
        "svd=600",
        "--trust-causality",
        "svd",
    )
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with ServerProcess(*arguments, *where, *options, environment=environment) as server:
        with stepwell.connect(server.address) as client:
            proof = client.model("svd").proof
        listed = subprocess.run(
            [sys.executable, "-m", "stepwell", "models", "--server", server.address],
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        ).stdout
        server.signal()
        _, _, err = server.finish()
    (refused,) = (line for line in err.splitlines() if "a model cannot be loaded model=strict" in line)
    assert "--trust-causality NAME serves it" in refused
    assert (proof.is_trusted, proof.compared_steps) == (True, 600)
    assert "Svd" in proof.unproven
    assert "TRUSTED, not proven; compared with Keras over 600 time steps" in listed
    assert "warning the model is served without a proof, as --trust-causality asks model=svd" in err
