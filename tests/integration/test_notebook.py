"""`stepwell.local` in a real Jupyter kernel: cells run again, the stop button, restarts. No server is left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell._admin import model_files
from support.models import programs, zoo
from support.sdk.notebook import Notebook, Watched, notebook

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux ties a child's life to its parent's"
)

START = "client = stepwell.local(MODEL)\nprint(client.server.pid)"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    folder = tmp_path_factory.mktemp("notebook")
    saved = programs.saved("lstm_dense")
    with notebook(folder, {"STEPWELL_CACHE_DIR": str(saved.cache_dir)}) as running:
        yield running


@pytest.fixture
def cells(kernel: Notebook) -> Notebook:
    """The kernel with what each test begins with."""
    path, gru = programs.saved("lstm_dense").path, programs.saved("gru_reset_after").path
    kernel.run(f"import numpy as np, stepwell, threading\nMODEL, OTHER = {str(path)!r}, {str(gru)!r}")
    return kernel


def pid_of(cells: Notebook, code: str = START, cell: str | None = None) -> int:
    return int(cells.run(code, cell).out)


@pytest.mark.slow
def test_a_cell_that_runs_again_leaves_nothing_behind(cells: Notebook) -> None:
    first = pid_of(cells, cell="one")
    cells.run("session = client.open_session('lstm_dense', session_id='mine')\nbefore = client")
    assert pid_of(cells, cell="one") == first
    cells.run("assert client is before and client.session_info('mine')")
    shown = (
        cells.run("client").html + cells.run("client.models()").html + cells.run("session.get_state()").html
    )
    assert shown.count("<table>") == 3
    assert "image/png" in shown
    # another file in the same cell, so under another name
    watched = Watched(first)
    second = pid_of(cells, "client = stepwell.local(OTHER)\nprint(client.server.pid)", cell="one")
    watched.wait()
    # the same name in another cell, with something else
    watched = Watched(second)
    third = pid_of(
        cells,
        "client = stepwell.local(OTHER, extra_args=['--max-batch-rows', '64'])\nprint(client.server.pid)",
        "two",
    )
    watched.wait()
    assert cells.descendants() == [third]
    watched = Watched(third)
    cells.run("client.close()")
    watched.wait()


def test_the_stop_button_interrupts_the_cell_and_not_the_server(cells: Notebook) -> None:
    pid = pid_of(cells)
    # `x` has whatever width the model wants
    cells.run(
        "x = np.zeros((1, *client.models()[0].inputs[0].shape), np.float32)\n"
        "session = client.open_session('lstm_dense')\nsession.step(x)"
    )
    # not in a step: an interrupt inside gRPC may leave its channel locked
    forever = "session.step(x)\nprint('on', flush=True)\nthreading.Event().wait()"
    assert cells.run(forever, fails=True, at=lambda ran: "on" in ran.out).error.startswith(
        "KeyboardInterrupt"
    )
    after = cells.run(
        "session.step(x)\nprint(client.server.pid, session.revision, client.server.logs().count('stopping'))"
    )
    assert after.out.split() == [str(pid), "3", "0"]
    cells.run("client.close()")


@pytest.mark.slow
def test_the_stop_button_while_a_model_is_compiled_ends_the_compilation(
    cells: Notebook, tmp_path: Path
) -> None:
    begun: list[int] = []

    def compiling(ran: Any) -> bool:
        begun[:] = cells.descendants() if "compiling 'lstm_dense'" in ran.err else []
        return bool(begun)

    ran = cells.run(f"stepwell.local(MODEL, cache_dir={str(tmp_path)!r})", fails=True, at=compiling)
    assert ran.error.startswith("KeyboardInterrupt")
    assert ran.err.count("stepwell: compiling") == 1
    assert begun
    assert cells.descendants() == []
    assert list(tmp_path.iterdir()) == []
    assert pid_of(cells) > 0
    cells.run("client.close()")


@pytest.mark.slow
def test_no_server_outlives_its_kernel(cells: Notebook) -> None:
    watched = Watched(
        pid_of(cells), pid_of(cells, "print(stepwell.local(OTHER, data_dir='kept').server.pid)")
    )
    cells.restart()
    watched.wait()
    kept = f"import stepwell\nclient = stepwell.local({str(programs.saved('gru_reset_after').path)!r}, data_dir='kept')\n"
    watched = Watched(pid_of(cells, f"{kept}print(client.server.pid)"))
    cells.kill()
    watched.wait()
    cells.restart()


SCRIPT = """
import os, sys, stepwell
client = stepwell.local(sys.argv[1], cache_dir=sys.argv[2])
if os.fork() == 0:
    # What is registered for the end of the process; gRPC's own end may hang in a child.
    stepwell._local._places.end_all()
    os._exit(0)
os.wait()
assert client.models()
print(client.server.pid, flush=True)
sys.stdin.read()
"""


def test_a_server_ends_with_its_script_and_not_with_a_fork_of_it() -> None:
    saved = programs.saved("lstm_dense")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(saved.path), str(saved.cache_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        watched = Watched(int(script.stdout.readline()))
        script.communicate()
        watched.wait()
    assert script.returncode == 0


class _Normal:
    """What `stepwell.local` makes of a model, for `programs`: saved under any name."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def save(self, path: Path) -> None:
        Path(model_files.file_of("made", self._model, str(path.parent)).path).rename(path)


@pytest.mark.slow
def test_a_keras_model_is_served_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    model = zoo.build("lstm_dense")
    programs.saved("local_object", lambda: _Normal(model))
    with stepwell.local(model, cache_dir=programs.cache_dir()) as client:
        (info,) = client.models()
        x = np.random.default_rng().standard_normal((2, 5, *info.inputs[0].shape)).astype(np.float32)
        y: Any = client.predict("model", x)[0]
        np.testing.assert_allclose(y, model(x).numpy(), rtol=1e-5, atol=1e-5)
        assert stepwell.local(model, cache_dir=programs.cache_dir()) is client
    # the same model saved at another time is the same file, so it was in the cache
    assert "compiling" not in capfd.readouterr().err
