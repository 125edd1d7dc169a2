"""The notebook of the article runs, and shows what it shows in the repository: the same text, and the same pictures."""

from __future__ import annotations

import base64
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image as mpl_image
import nbclient
import nbformat
import numpy as np
import pytest
from traitlets.config import Config

from support.models import article

PATH = Path(__file__).parents[2] / "examples" / "seed_story.ipynb"
MAX_BYTES, MAX_LINES = 1_000_000, 20

pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def committed() -> Any:
    return nbformat.read(PATH, as_version=4)


@pytest.fixture
def sockets() -> Iterator[str]:
    """Where the kernel listens: names of sockets must be short."""
    folder = tempfile.mkdtemp(prefix="kernel-")
    yield folder
    shutil.rmtree(folder)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(out.text for out in cell.outputs if out.output_type == "stream" and out.name == "stdout")


def pictures(cell: Any) -> list[Any]:
    """The pictures of a cell: pixels from 0 to 1."""
    encoded = [out.data["image/png"] for out in cell.outputs if out.output_type == "display_data"]
    return [mpl_image.imread(io.BytesIO(base64.b64decode(one))) for one in encoded]


def test_the_committed_notebook_is_whole_and_small(committed: Any) -> None:
    assert PATH.stat().st_size < MAX_BYTES
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell.source.count("\n") < MAX_LINES
        kinds = [out.get("name", out.output_type) for out in cell.outputs]
        assert set(kinds) <= {"stdout", "display_data"}, "no errors, and nothing of a framework's log"
    numbers = [article.FIRST, article.SECOND, article.AFTER_ZEROS, article.AFTER_ONES]
    assert all(f"{number:.7f}" in "".join(map(printed, cells)) for number in numbers)
    assert sum(len(pictures(cell)) for cell in cells) >= 6
    nbformat.validate(committed)


@pytest.mark.slow
def test_it_runs_and_shows_the_same(committed: Any, sockets: str, tmp_path: Path) -> None:
    again = nbformat.from_dict(committed)
    for cell in code_cells(again):
        cell.outputs = []
    # not over TCP: Jupyter looks for free ports, and another may take one before the kernel does
    config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/ipc"}})
    environment = {**os.environ, "STEPWELL_CACHE_DIR": str(tmp_path / "cache"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    client = nbclient.NotebookClient(
        again,
        config=config,
        kernel_name="python3",
        timeout=250,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment)
    for cell, wanted in zip(code_cells(again), code_cells(nbformat.read(PATH, as_version=4)), strict=True):
        assert printed(cell) == printed(wanted), cell.source
        assert len(pictures(cell)) == len(pictures(wanted)), cell.source
        for one, other in zip(pictures(cell), pictures(wanted), strict=True):
            assert one.shape == other.shape
            # Another processor may round a value so that a pixel changes.
            assert np.abs(one - other).mean() < 0.01, cell.source
