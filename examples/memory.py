"""The model of `recurrent_policy.py`: a memory of what a cart and its pole did, with random weights.

`python examples/memory.py` saves it as out/memory.keras, `stepwell serve memory=out/memory.keras` serves it.
"""

from __future__ import annotations

from pathlib import Path

from quiet import keras

UNITS = 32


def build_model() -> keras.Model:
    """Build a GRU over positions: 32 traces of them that fade at different speeds."""
    seen = keras.Input((None, 2), name="seen")  # of the cart, in m; of the pole, in rad
    scaled = keras.layers.Rescaling([1 / 2.4, 1 / 0.21])(seen)  # an episode ends beyond these
    traces = keras.layers.GRU(UNITS, return_sequences=True, name="gru")(scaled)
    return keras.Model(seen, traces)


if __name__ == "__main__":
    keras.utils.set_random_seed(1)
    path = Path("out/memory.keras")
    path.parent.mkdir(parents=True, exist_ok=True)
    build_model().save(path)
