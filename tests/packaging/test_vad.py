"""Silero's voice detector from its package, with a session for each microphone: `examples/vad.py` and the page on speech."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import stepwell
from stepwell.testing import LocalServer


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example installs the package; it does so once."""
    return tmp_path_factory.mktemp("silero") / "environment"


@pytest.mark.slow
def test_a_hundred_microphones_share_one_model(
    root: Path, compiled: Path, environment: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, root / "examples" / "vad.py", "--seconds=2", "--environment", environment],
        cwd=tmp_path,
        env={**os.environ, "STEPWELL_CACHE_DIR": str(compiled)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("100 microphones, 62 frames of 32 ms each\n")
    found = re.search(r"^a plain loop over ONNX Runtime differs by at most (\S+)$", done.stdout, re.MULTILINE)
    assert found is not None
    assert float(found[1]) <= 1e-5
    spoken = re.search(r"^they speak in (\d+)% of the frames$", done.stdout, re.MULTILINE)
    assert spoken is not None
    assert 20 < int(spoken[1]) < 80, "the audio must have both speech and pauses"
    assert (tmp_path / "out" / "vad.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_page_on_speech(
    root: Path, compiled: Path, environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its declaration and its function serve two microphones, which have answers of their own."""
    monkeypatch.syspath_prepend(root / "examples")
    example = importlib.import_module("vad")
    text = (root / "docs" / "guides" / "speech.md").read_text()
    shutil.copy(example.silero(environment), tmp_path / "vad.onnx")
    (declaration,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "vad.toml").write_text(declaration)
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102  our own documentation
    audio = [example.speech(1, seed) for seed in (1, 2)]

    async def frames(samples: Any) -> AsyncIterator[Any]:
        for frame in example.frames_of(samples):
            yield frame

    async def heard(address: str) -> list[list[float]]:
        async with stepwell.aio.connect(address) as client:

            async def one(number: int) -> list[float]:
                stream = names["microphone"](client, f"microphone-{number}", frames(audio[number]))
                return [probability async for probability in stream]

            return list(await asyncio.gather(one(0), one(1)))

    with LocalServer({"vad": tmp_path / "vad.onnx"}, cache_dir=compiled) as server:
        found = asyncio.run(heard(server.address))
    runtime = example.onnxruntime.InferenceSession(tmp_path / "vad.onnx", providers=["CPUExecutionProvider"])
    for probabilities, samples in zip(found, audio, strict=True):
        np.testing.assert_allclose(probabilities, example.plain_loop(runtime, samples), atol=1e-5)
