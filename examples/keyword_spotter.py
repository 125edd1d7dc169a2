"""A keyword spotter for many microphones: convolutions and a GRU, trained here, with a session for each microphone.

`python examples/keyword_spotter.py` takes about a minute. It makes synthetic speech from seeds (`voices.py`), trains a
small Keras model to notice two words of two syllables each, and serves the model as Keras saved it. Then microphones
send frames of 20 ms, and hear at once when a word was spoken.

A frame is raw audio. The model itself looks back: it joins each frame with the one before it, takes their spectrum, and
its convolutions and its GRU follow. The server keeps what all of these need, so that no client sends a sample twice.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from quiet import keras
from voices import RATE, VOWELS, Floats, consonant, syllable

import stepwell
from stepwell.testing import LocalServer

mpl.use("Agg")
import matplotlib.pyplot as plt

FRAME = 320  # samples of 20 ms
BANDS, HIGHEST_HZ = 24, 4000
Word = tuple[tuple[int, int], ...]
"""The vowels at the beginning and at the end of each syllable, as rows of `VOWELS`: a, i, u, e, o."""
WORDS: dict[str, Word] = {"aio": ((0, 1), (4, 4)), "uia": ((2, 2), (1, 0))}
COLORS = ("#c1440e", "#2a6f97")
NOTICED_FRAMES = 12
"""The number of frames after the end of a word in which the model is trained to report it."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """Audio, cut into frames, and the words that are spoken in it."""

    frames: Floats
    """(frames, samples)"""
    words: list[tuple[int, int]]
    """The frame in which each word ends, and which word it is, from 1 on."""

    def labels(self) -> npt.NDArray[np.int32]:
        """Return what the model is to report at each frame: 0, or a word for a while after it ended."""
        found = np.zeros(len(self.frames), np.int32)
        for end, word in self.words:
            found[end : end + NOTICED_FRAMES] = word
        return found


def record(seconds: float, seed: int) -> Recording:
    """Make a recording of one random voice: the two words, others like them, and pauses."""
    random = np.random.default_rng(seed)
    audio = random.standard_normal(int(seconds * RATE)) * 0.002
    pitch, tract = random.uniform(90, 220), random.uniform(0.9, 1.2)
    known = list(WORDS.values())
    words, at = [], int(random.uniform(0.2, 0.6) * RATE)
    while at < len(audio) - RATE:
        word = int(random.integers(0, len(known) + 2))
        if 0 < word <= len(known):
            syllables = known[word - 1]
        else:
            syllables = _other(random, known)
            word = 0
        for first, last in syllables:
            if random.random() < 0.3:
                at = consonant(audio, at, random)
            at = syllable(audio, at, pitch * random.uniform(0.9, 1.2), VOWELS[[first, last]] * tract, random)
            at += int(random.uniform(0.01, 0.04) * RATE)
        if word:
            words.append((at // FRAME, word))
        at += int(random.uniform(0.3, 0.7) * RATE)
    frames = audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME)
    return Recording(frames.astype(np.float32), words)


def _other(random: np.random.Generator, known: list[Word]) -> Word:
    """Choose a word that has none of the two in it; about half of them have one of their syllables."""
    while True:
        drawn = [(int(a), int(b)) for a, b in random.integers(0, len(VOWELS), (random.integers(1, 4), 2))]
        if random.random() < 0.5:
            place, word = int(random.integers(len(drawn))), known[int(random.integers(len(known)))]
            drawn[place] = word[int(random.integers(len(word)))]
        found = tuple(drawn)
        if not any(found[i : i + 2] == word for word in known for i in range(len(found))):
            return found


# --------------------------------------------------------------------------------------------------------------- model


def build_model() -> keras.Model:
    """Build an ordinary Keras model: any number of rows and frames, nothing about sessions in it."""
    layers = keras.layers
    frames = keras.Input((None, FRAME), name="frame")
    before = layers.Cropping1D((0, 1))(layers.ZeroPadding1D((1, 0), name="previous")(frames))
    window = layers.Concatenate(name="window")([before, frames])
    cosine = layers.Dense(_spectrum()[0].shape[1], use_bias=False, trainable=False, name="cosine")(window)
    sine = layers.Dense(_spectrum()[1].shape[1], use_bias=False, trainable=False, name="sine")(window)
    power = keras.ops.square(cosine) + keras.ops.square(sine)
    bands = layers.Dense(BANDS, use_bias=False, trainable=False, name="bands")(power)
    x = keras.ops.log(bands + 1e-2) / 4
    x = layers.Conv1D(32, 5, padding="causal", activation="relu", name="short")(x)
    x = layers.Conv1D(32, 5, padding="causal", dilation_rate=2, activation="relu", name="long")(x)
    x = layers.GRU(48, return_sequences=True, name="gru")(x)
    outputs = layers.Dense(1 + len(WORDS), activation="softmax", name="word")(x)
    model = keras.Model(frames, outputs)
    for name, kernel in zip(("cosine", "sine", "bands"), _spectrum(), strict=True):
        model.get_layer(name).set_weights([kernel])
    return model


def _spectrum() -> tuple[Floats, Floats, Floats]:
    """Return kernels of dense layers: a windowed Fourier transform of two frames, and bands as wide as ears hear them."""
    hertz = np.arange(1, HIGHEST_HZ * 2 * FRAME // RATE) * RATE / (2 * FRAME)
    angles = 2 * np.pi * np.arange(2 * FRAME)[:, None] * hertz / RATE
    shape = np.hanning(2 * FRAME)[:, None]
    edges = 700 * (np.exp(np.linspace(0, np.log1p(HIGHEST_HZ / 700), BANDS + 2)) - 1)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hertz[:, None] - low) / (middle - low), (high - hertz[:, None]) / (high - middle)
    bands = np.clip(np.minimum(rising, falling), 0, None)
    kernels = (np.cos(angles) * shape, np.sin(angles) * shape, bands)
    cosine, sine, triangles = (kernel.astype(np.float32) for kernel in kernels)
    return cosine, sine, triangles


def train(recordings: list[Recording], epochs: int) -> keras.Model:
    """Fit the model; frames after a word are rare, so they count more."""
    keras.utils.set_random_seed(33)
    labels = np.stack([recording.labels() for recording in recordings])
    model, batch_size = build_model(), 16
    steps = epochs * -(-len(recordings) // batch_size)
    rate = keras.optimizers.schedules.CosineDecay(0.006, steps)
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), loss="sparse_categorical_crossentropy")
    model.fit(
        np.stack([recording.frames for recording in recordings]),
        labels,
        sample_weight=np.where(labels > 0, 3, 1).astype(np.float32),
        batch_size=batch_size,
        epochs=epochs,
        verbose=0,
    )
    return model


# ------------------------------------------------------------------------------------------------------------ sessions


def listen(client: stepwell.Client, recordings: list[Recording]) -> Floats:
    """Step a session for each microphone, frame by frame; return (microphones, frames, probabilities)."""
    frames = np.stack([recording.frames for recording in recordings])
    with client.open_sessions("spotter", len(recordings)) as microphones:
        heard = [microphones.step(frames[:, number]) for number in range(frames.shape[1])]
    return np.stack(heard, axis=1)


def detections(probabilities: Floats) -> list[tuple[int, int]]:
    """Return the frames at which a word becomes likelier than all else, and the word; each is reported once."""
    found, until = [], -1
    for number, word in enumerate(probabilities.argmax(axis=-1).tolist()):
        if word and number > until:
            found.append((number, word))
            until = number + 2 * NOTICED_FRAMES
    return found


def hits(recording: Recording, found: list[tuple[int, int]]) -> int:
    """Count the words that were noticed within half a second of their end."""
    return sum(
        any(word == other and -6 <= number - end <= 25 for number, other in found)
        for end, word in recording.words
    )


def main() -> None:
    """Train, serve, listen, compare, draw."""
    parser = argparse.ArgumentParser(description="Serve a keyword spotter to many microphones at once.")
    parser.add_argument("--microphones", type=int, default=16)
    parser.add_argument("--recordings", type=int, default=320, help="Of 4 seconds, to train with.")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--model", type=Path, default=Path("out/spotter.keras"))
    parser.add_argument("--picture", type=Path, default=Path("out/keyword_spotter.png"))
    options = parser.parse_args()
    print(f"Training on {options.recordings} recordings of 4 seconds, with the words {' and '.join(WORDS)}")
    model = train([record(4, seed) for seed in range(options.recordings)], options.epochs)
    options.model.parent.mkdir(parents=True, exist_ok=True)
    model.save(options.model)
    recordings = [record(12, 10_000 + number) for number in range(options.microphones)]
    with (
        LocalServer({"spotter": options.model}, start_timeout_s=100) as server,
        stepwell.connect(server.address) as client,
    ):
        info = client.model("spotter")
        streamed = listen(client, recordings)
    print(f"a session keeps {info.state_row_bytes:,} bytes: {', '.join(spec.name for spec in info.state)}")
    whole = model.predict(np.stack([recording.frames for recording in recordings]), verbose=0)
    difference = float(np.abs(streamed - whole).max())
    assert difference < 1e-4, f"one call of Keras over each whole recording differs by {difference}"
    found = [detections(each) for each in streamed]
    assert found == [detections(each) for each in whole]
    print(
        f"one call of Keras over each whole recording: the same detections; differs by at most {difference:.1g}"
    )
    spoken = sum(len(recording.words) for recording in recordings)
    noticed = sum(hits(*pair) for pair in zip(recordings, found, strict=True))
    seconds = sum(len(recording.frames) for recording in recordings) * FRAME / RATE
    others = sum(map(len, found)) - noticed
    print(f"{noticed} of {spoken} words noticed in {seconds:.0f} seconds of audio; false alarms: {others}")
    draw(options.picture, recordings[0], streamed[0], found[0])
    print(f"The picture is in {options.picture}")


def draw(path: Path, recording: Recording, probabilities: Floats, found: list[tuple[int, int]]) -> None:
    """Draw a waveform with the spoken words and, below it, their probabilities and what was detected."""
    figure, (above, below) = plt.subplots(2, figsize=(9, 3.6), sharex=True, layout="constrained")
    samples = recording.frames.reshape(-1)
    above.plot(np.arange(len(samples)) / RATE, samples, color="#22262b", linewidth=0.3)
    above.set_ylabel("waveform")
    seconds = FRAME / RATE
    names = list(WORDS)
    for end, word in recording.words:
        above.axvspan((end - 20) * seconds, end * seconds, color=COLORS[word - 1], alpha=0.2, linewidth=0)
    for number, name in enumerate(names, 1):
        ends = (1 + np.arange(len(probabilities))) * seconds
        below.plot(ends, probabilities[:, number], color=COLORS[number - 1], linewidth=1.2, label=f"“{name}”")
    for number, word in found:
        below.plot((1 + number) * seconds, 1.08, marker="v", color=COLORS[word - 1], clip_on=False)
    below.set(ylabel="probability", ylim=(0, 1.05), xlabel="seconds", xlim=(0, len(samples) / RATE))
    below.legend(frameon=False, loc="center right")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
