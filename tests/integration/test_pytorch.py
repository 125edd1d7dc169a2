"""A step function that PyTorch exported (tests/data/pytorch), served to sessions as the page of PyTorch says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

from support.models import programs
from support.servers.fork_server import ForkedServer

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "pytorch"
PAGE = (ROOT / "docs" / "guides" / "pytorch.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_sessions_give_the_numbers_of_pytorch(tmp_path: Path) -> None:
    """The page's declaration and its last block, for the four rows that PyTorch ran."""
    shutil.copy(DATA / "step.onnx", tmp_path)
    (declaration,) = blocks("toml")
    (tmp_path / "step.toml").write_text(declaration)
    with (
        ForkedServer({"step": tmp_path / "step.onnx"}, cache_dir=programs.cache_dir()) as server,
        np.load(DATA / "expected.npz") as expected,
    ):
        for row in range(4):
            names: dict[str, Any] = {"x": expected["x"][:, row]}
            exec(blocks("python")[-1].replace("127.0.0.1:50051", server.address), names)  # noqa: S102  our own documentation
            np.testing.assert_allclose(np.concatenate(names["ys"]), expected["y"][:, row], atol=1e-6)
            for name in ("h", "c"):
                np.testing.assert_allclose(names["state"][name][0], expected[name][:, row], atol=1e-6)


def test_the_page_shows_what_made_the_file() -> None:
    """Each line of the page's export stands in the script, whatever their types and indents."""
    script = (DATA / "export.py").read_text()
    lines = {re.sub(r": Any| -> Any|  # type.*", "", line).strip() for line in script.splitlines()}
    shown = [line.strip() for line in blocks("python")[0].splitlines() if line.strip()]
    assert [line for line in shown if line not in lines | {'"step.onnx",'}] == []
