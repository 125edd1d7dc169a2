"""Voice detection for many microphones: one shared Silero VAD, and a session with its own state for each microphone.

`python examples/vad.py` installs the package `silero-vad` for its ONNX file, without its dependencies, into an
environment of its own (out/silero). It needs the extras `onnx` and `plot`; TensorFlow is not needed.

The audio is synthetic, from seeds (`voices.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import onnxruntime
from voices import RATE, Floats, speech

import stepwell
from stepwell.aio import AsyncClient
from stepwell.testing import LocalServer

mpl.use("Agg")
import matplotlib.pyplot as plt

PACKAGE = "silero-vad==6.2.3"
FRAME, CONTEXT = 512, 64
"""Samples of a frame of 32 ms; of the frame before it, which Silero expects in front of it."""
DECLARED = f"""
[state]
state = "stateN"
[batch-axis]
state = 1
[constant]
sr = {RATE}
[shape]
input = {FRAME}
[context]
input = {CONTEXT}
[name]
output = "probability"
"""
"""What `stepwell serve vad=vad.onnx` must know, in vad.toml next to the file."""


def main() -> None:
    """Serve the model, listen to all microphones at once, compare with a plain loop, and draw one microphone."""
    parser = argparse.ArgumentParser(description="Serve Silero VAD to many microphones at once.")
    parser.add_argument("--microphones", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=6.0, help="Audio of each.")
    parser.add_argument("--live", action="store_true", help="Send a frame every 32 ms, as microphones do.")
    parser.add_argument("--environment", type=Path, default=Path("out/silero"))
    parser.add_argument("--picture", type=Path, default=Path("out/vad.png"))
    options = parser.parse_args()
    audio = np.stack([speech(options.seconds, seed) for seed in range(options.microphones)])
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "vad.onnx"
        shutil.copy(silero(options.environment), model)
        model.with_suffix(".toml").write_text(DECLARED)
        with LocalServer(models={"vad": model}, start_timeout_s=100) as server:
            served, took_s = asyncio.run(listen(server.address, audio, options.live))
        runtime = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        loops = np.stack([plain_loop(runtime, each) for each in audio])
    print(f"{len(audio)} microphones, {served.shape[1]} frames of 32 ms each")
    print(f"a frame is answered within {np.quantile(took_s, 0.99) * 1e3:.1f} ms in 99 of 100 cases")
    print(f"they speak in {np.mean(served > 0.5):.0%} of the frames")
    difference = float(np.abs(served - loops).max())
    assert difference <= 1e-5, f"a plain loop over ONNX Runtime differs by {difference}"
    print(f"a plain loop over ONNX Runtime differs by at most {difference:.1g}")
    draw(options.picture, audio[0], served[0])
    print(f"The picture is in {options.picture}")


def silero(environment: Path) -> Path:
    """Install the package, unless it is there, and return its ONNX file."""
    if not environment.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        python = str(environment / "bin" / "python")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-compile", PACKAGE], check=True)
    (found,) = environment.glob("lib/python*/site-packages/silero_vad/data/silero_vad.onnx")
    return found


# ------------------------------------------------------------------------------------------------------------ sessions


async def listen(address: str, audio: Floats, live: bool) -> tuple[Floats, Floats]:
    """Step a session for each microphone; return probabilities and times until the answers: (microphones, frames)."""
    async with stepwell.aio.connect(address) as client:
        each = await asyncio.gather(
            *(microphone(client, number, samples, live) for number, samples in enumerate(audio))
        )
    made = np.asarray(each, np.float32)
    return made[..., 0], made[..., 1]


async def microphone(
    client: AsyncClient, number: int, samples: Floats, live: bool
) -> list[tuple[float, float]]:
    """Send the frames of one microphone. Its session keeps the LSTM's state and the context on the server."""
    async with client.open_session("vad", session_id=f"microphone-{number}") as session:
        answers = []
        began = time.monotonic() + number / 1000  # microphones do not begin at the same time
        for index, frame in enumerate(frames_of(samples)):
            if live:
                await asyncio.sleep(began + index * FRAME / RATE - time.monotonic())
            sent = time.monotonic()
            probability = np.asarray(await session.step(frame[None])).item()
            answers.append((probability, time.monotonic() - sent))
        return answers


def frames_of(samples: Floats) -> Floats:
    """Cut into frames; samples that do not fill one are left out."""
    return samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)


def plain_loop(runtime: Any, samples: Floats) -> Floats:
    """Do the same without a server, by the rule of Silero's own Python code."""
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, CONTEXT), np.float32)
    probabilities = []
    for frame in frames_of(samples):
        x = np.concatenate([context, frame[None]], axis=1)
        probability, state = runtime.run(None, {"input": x, "state": state, "sr": np.array(RATE)})
        context = x[:, -CONTEXT:]
        probabilities.append(probability.item())
    return np.asarray(probabilities, np.float32)


# ------------------------------------------------------------------------------------------------------------- picture


def draw(path: Path, samples: Floats, probabilities: Floats) -> None:
    """Draw a waveform and, below it, the probability that it is speech."""
    figure, (above, below) = plt.subplots(2, figsize=(9, 3.6), sharex=True, layout="constrained")
    above.plot(np.arange(len(samples)) / RATE, samples, color="#22262b", linewidth=0.4)
    above.set_ylabel("waveform")
    ends = (1 + np.arange(len(probabilities))) * FRAME / RATE
    below.step(ends, probabilities, where="pre", color="#c1440e", linewidth=1.3)
    below.fill_between(ends, probabilities, step="pre", color="#c1440e", alpha=0.15)
    below.set(ylabel="probability of speech", ylim=(0, 1.05), xlabel="seconds", xlim=(0, len(samples) / RATE))
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
