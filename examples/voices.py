"""Speech-like audio, made from seeds: for examples that need voices, and no recordings.

A voice is a train of glottal pulses with a falling pitch. Each pulse adds three damped sine waves, the formants, which
move from one vowel to the next within a syllable. Bursts of noise stand for consonants. There are pauses, and faint
noise everywhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

RATE = 16_000
"""Samples per second."""
VOWELS = np.array(
    [(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)]
)
"""Frequencies of the first three formants, in Hz."""
LOUDNESS = np.array([1.0, 0.6, 0.3])
TIMES = np.arange(400) / RATE
"""Of the samples of a pulse, in seconds."""
DECAYS = np.exp(-np.pi * np.array([[80], [100], [140]]) * TIMES)
"""By the bandwidths of the formants, in Hz."""


def speech(seconds: float, seed: int) -> Floats:
    """Make speech-like audio: syllables of a random voice, and pauses."""
    random = np.random.default_rng(seed)
    audio = random.standard_normal(int(seconds * RATE)) * 0.002
    pitch, tract = random.uniform(90, 220), random.uniform(0.9, 1.2)
    at = int(random.uniform(0.2, 0.8) * RATE)
    while at < len(audio):
        if random.random() < 0.5:
            at = consonant(audio, at, random)
        formants = VOWELS[random.integers(len(VOWELS), size=2)] * tract
        at = syllable(audio, at, pitch * random.uniform(0.9, 1.2), formants, random)
        pause_s = random.uniform(0.5, 1.2) if random.random() < 0.2 else random.uniform(0.01, 0.05)
        at += int(pause_s * RATE)
    return audio.astype(np.float32)


def consonant(audio: npt.NDArray[np.float64], at: int, random: np.random.Generator) -> int:
    """Add a burst of high-pass noise; return where it ends."""
    length = int(random.uniform(0.04, 0.1) * RATE)
    add(audio, at, np.diff(random.standard_normal(length + 1)) * np.hanning(length) * 0.03)
    return at + length


def syllable(
    audio: npt.NDArray[np.float64],
    at: int,
    pitch: float,
    formants: npt.NDArray[np.float64],
    random: np.random.Generator,
) -> int:
    """Add pulses that ring at formants which move from the first row to the second; return where they end."""
    begin, length = at, int(random.uniform(0.12, 0.3) * RATE)
    while at < min(begin + length, len(audio)):
        share = (at - begin) / length
        now = formants[0] + (formants[1] - formants[0]) * share
        pulse = LOUDNESS @ (DECAYS * np.sin(2 * np.pi * now[:, None] * TIMES))
        add(audio, at, pulse * 0.2 * np.sqrt(np.sin(np.pi * max(share, 0.02))))
        at += int(RATE / (pitch * (1.1 - 0.2 * share) * random.normal(1, 0.01)))
    return at


def add(audio: npt.NDArray[np.float64], at: int, sound: npt.NDArray[np.float64]) -> None:
    """Add a sound, as far as the audio reaches."""
    place = audio[at : at + len(sound)]
    place += sound[: len(place)]
