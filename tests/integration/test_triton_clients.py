"""Triton's own clients, unchanged, against a real server."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell.testing import LocalServer
from support.models import programs
from support.secured import Server
from support.servers.both_fronts import FRONTS
from support.servers.server_process import retrained
from support.triton import triton_clients

# The clients' environment is made on first use. What they send is asked without it in test_fronts_triton.
pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with triton_clients.serve() as running:
        yield running


@pytest.mark.parametrize(
    "scenario",
    ["server", "unary", "callbacks", "stream", "aio", "outputs", "unsupported"],
)
def test_scenario(server: LocalServer, scenario: str) -> None:
    triton_clients.run_scenario(scenario, server.address)


def test_the_numbers_are_those_of_keras(server: LocalServer, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 6, 1, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    triton_clients.run_scenario("floats", server.address, str(tmp_path / "x"))
    whole = triton_clients.keras_model("lstm").predict(x[:, :, 0], verbose=0)
    with np.load(tmp_path / "x-out.npz") as out:
        np.testing.assert_allclose(out["each"][:, :, 0], whole, atol=1e-6)
        np.testing.assert_array_equal(out["several"][:, 0], out["each"][:, :, 0])
        np.testing.assert_array_equal(out["alone"], out["each"][:, :, 0])
        np.testing.assert_array_equal(out["batch"].swapaxes(0, 1), out["each"][:, :, 0])


def test_a_step_function_equals_a_plain_loop(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx")
    from support.models import step_function_kinds

    kind = step_function_kinds.KINDS["plain"]
    x = np.random.default_rng().standard_normal((4, 6, 1, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    files = {"plain": step_function_kinds.saved(tmp_path)["plain"]}
    with Server(models=files, cache_dir=programs.cache_dir()) as server:
        triton_clients.run_scenario("floats", server.address, str(tmp_path / "x"), "plain")
    with np.load(tmp_path / "x-out.npz") as out:
        for each, several, alone, sequence in zip(out["each"], out["several"], out["alone"], x, strict=True):
            wanted = np.stack([made["y"] for made in kind.loop([{"x": given} for given in sequence])])
            np.testing.assert_array_equal(each, wanted)
            np.testing.assert_array_equal(several[0], wanted[:, 0])
            np.testing.assert_array_equal(alone, wanted[:, 0])


def test_models_of_other_types(server: LocalServer) -> None:
    triton_clients.run_scenario(
        "datatypes", server.address, *(f"acc_{dtype}" for dtype in triton_clients.DTYPES)
    )


def test_what_models_are_said_to_be(server: LocalServer) -> None:
    said = triton_clients.run_scenario("descriptions", server.address)
    metadata, configs = said["metadata"], said["configs"]
    assert metadata["acc"]["inputs"] == [{"name": "x", "datatype": "INT32", "shape": ["-1", "3"]}]
    assert metadata["acc"]["versions"] == ["1"]
    assert metadata["tokens"]["inputs"][0]["shape"] == ["-1", "1"]
    assert configs["tokens"]["input"][0]["reshape"] == {}
    assert configs["acc"]["max_batch_size"] == 1024
    (state,) = configs["acc"]["sequence_batching"]["state"]
    assert (state["data_type"], state["dims"], state["initial_state"][0]["zero_data"]) == (
        "TYPE_INT32", ["3"], True,
    )  # fmt: skip
    assert "sequence_batching" not in configs["plain"]
    assert "dynamic_batching" in configs["plain"]
    shapes = {tensor["name"]: tensor["shape"] for tensor in metadata["multi"]["inputs"]}
    assert shapes == {"series": ["-1", "3"], "token": ["-1", "1"], "profile": ["-1", "5"]}


@pytest.mark.plain("statistics are of all tenants, and the caller is no admin")
def test_statistics_count_requests_and_passes(server: LocalServer) -> None:
    said = triton_clients.run_scenario("statistics", server.address)
    before, after = said["before"], said["after"]
    assert said["names"] == sorted(triton_clients.NAMES)

    def grown(*path: str) -> int:
        def number(value: Any) -> int:
            for key in path:
                value = value.get(key, {})
            return int(value or 0)

        return number(after) - number(before)

    assert grown("inference_count") == 20
    assert grown("execution_count") == 10
    for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert grown("inference_stats", part, "count") == 10
    for part in ("success", "compute_input", "compute_infer", "compute_output", "fail"):
        assert grown("inference_stats", part, "ns") > 0
    assert grown("inference_stats", "fail", "count") == 3
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert sum(grown("inference_stats", part, "ns") for part in parts) == grown(
        "inference_stats", "success", "ns"
    )
    assert int(after["last_inference"]) > 0
    (batch,) = after["batch_stats"]
    assert (batch["batch_size"], batch["compute_infer"]["count"]) == ("2", "10")


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.plain("it starts a server, and its caller must be an admin")
def test_versions_by_the_repository(tmp_path: Path, front: str) -> None:
    for version, one in enumerate(
        (triton_clients.saved("lstm"), retrained(), triton_clients.saved("lstm")), 1
    ):
        (tmp_path / "lstm").mkdir(exist_ok=True)
        (tmp_path / "lstm" / f"{version}.keras").write_bytes(Path(one.path).read_bytes())
    arguments = ["--models", str(tmp_path), "--version-policy", "lstm=1,2", "--front", front]
    with Server(
        models={}, cache_dir=programs.cache_dir(), extra_args=arguments, start_timeout_s=100
    ) as server:
        triton_clients.run_scenario("triton_version_scenarios.versions", server.address)
        assert "internal error" not in server.logs()


def test_both_clients_in_one_process(server: LocalServer) -> None:
    client_folder = Path(__file__).parents[2] / "client"
    triton_clients.run_scenario("both_clients", server.address, str(client_folder))


@pytest.mark.slow
def test_a_sequence_outlives_the_server(tmp_path: Path) -> None:
    with triton_clients.serve(only=("acc",), data_dir=tmp_path / "data") as server:
        triton_clients.run_scenario("begin", server.address, "kept")
        server.kill()
        server.restart()
        assert triton_clients.run_scenario("go_on", server.address, "kept") == [[2, 2, 2]]
        server.kill()
        server.restart()
        for _ in range(2):
            assert triton_clients.run_scenario("end", server.address, "kept", "2") == [[3, 3, 3]]
        server.kill()
        server.restart()
        message = triton_clients.run_scenario("end", server.address, "kept", "2")
        assert "the last one ended with this very request" in message
        triton_clients.run_scenario("is_gone", server.address, "kept")


@pytest.mark.slow
def test_every_request_counts_once_though_the_server_is_killed(tmp_path: Path) -> None:
    kills = 0
    with (
        triton_clients.serve(only=("acc",), data_dir=tmp_path / "data") as server,
        triton_clients.scenario("survive", server.address, "60") as process,
    ):
        while process.poll() is None and kills < 5:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.3)  # for as long the client works
                break
            server.kill()
            server.restart()
            kills += 1
        again = triton_clients.result_of(process)
        with stepwell.connect(server.address) as client:
            assert client.sessions() == []
    assert kills > 0
    assert again > 0


def test_the_page_for_those_who_come_from_triton(server: LocalServer) -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "coming-from-triton.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    for model in ("lstm", "tokens", "acc_int64"):
        client = 'triton.InferenceServerClient("127.0.0.1:50051")'
        assert client in code
        served = code.replace(client, triton_clients.new_client(server.address)).replace("forecast", model)
        assert len(triton_clients.run_code(served).splitlines()) == 3


def test_a_sequence_numbered_0_is_refused_by_a_model_that_keeps_state(server: LocalServer) -> None:
    """As the page says: tritonclient sends nothing of it, so it would begin anew each time."""
    said = triton_clients.run_code(
        "import numpy as np, tritonclient.grpc as triton\n"
        f"client = {triton_clients.new_client(server.address)}\n"
        "x = triton.InferInput('x', [1, 3], 'FP32')\n"
        "x.set_data_from_numpy(np.ones((1, 3), np.float32))\n"
        "def ask(**given):\n"
        "    try:\n"
        "        print('stepwell_revision' in client.infer(inputs=[x], **given).get_response().parameters)\n"
        "    except Exception as error:\n"
        "        print('sequence_id is missing' in str(error))\n"
        "for number in (0, '', 1):\n"
        "    ask(model_name='lstm', sequence_id=number, sequence_start=True, sequence_end=True)\n"
        "ask(model_name='lstm', parameters={'stepwell_stateless': True})\n"
        "x = triton.InferInput(client.get_model_metadata('plain').inputs[0].name, [1, 3], 'FP32')\n"
        "x.set_data_from_numpy(np.ones((1, 3), np.float32))\n"
        "ask(model_name='plain')\n"
    )
    assert said.split() == ["True", "True", "True", "False", "False"]


@pytest.mark.slow
@pytest.mark.plain("perf_analyzer sends no token over gRPC")
@pytest.mark.parametrize(
    "mode", [["--async"], ["--streaming"], ["--streaming", "--sequence-id-range", "1:9"]]
)
def test_perf_analyzer_runs_sequences(server: LocalServer, mode: list[str]) -> None:
    command = [
        *(str(triton_clients.perf_analyzer()), "-m", "lstm", "-u", server.address, "-i", "grpc", *mode),
        *("--concurrency-range", "4", "--sequence-length", "8", "--measurement-mode", "count_windows"),
        *("--measurement-request-count", "200", "--stability-percentage", "999"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: int(count) for name, count in re.findall(r"(\w+ count): (\d+)", done.stdout)}
    assert counts["Sequence count"] > 0
    # its window ends at any time: what has run by then may not be answered yet, of each of the four
    assert 0 < counts["Execution count"] <= counts["Inference count"] + 4
    assert "error" not in done.stderr.lower()
