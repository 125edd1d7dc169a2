"""Compile random models: what is served must equal Keras, and what is built of good blocks must be served.

python tests/congruence/fuzz_models.py [--models 100] [--seed 7]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.models import random_models
from support.models.programs import compile_model

STEPS, ROWS = 800, 3
#: Rounding, as a share of the output's scale, and times what one rounding of the inputs does to Keras.
TOLERANCE, NOISES = 2e-5, 64.0


def check(seed: int) -> str:
    """Compile the model of one seed; return "served" or "refused".

    Raises:
        AssertionError: it is served and differs from Keras, or is refused although all its blocks are good.
    """
    from stepwell_server.compile.errors import ModelError
    from stepwell_server.program import ProofOptions

    rng = np.random.default_rng(seed)
    drawn = random_models.draw(rng)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn.model.save(folder / "model.keras")
        try:
            program = compile_model(folder / "model.keras", options=ProofOptions(steps=520))
        except ModelError as error:
            said = str(error)
            assert not drawn.is_good, f"seed {seed}: {drawn.blocks} is refused: {said}"
            assert "\n" not in said, f"seed {seed}: {said!r}"
            return "refused"
        _compare(seed, drawn, program, rng)
    return "served"


def _compare(seed: int, drawn: random_models.RandomModel, program: Any, rng: np.random.Generator) -> None:
    import tensorflow as tf

    from support.models.compiled import Compiled

    def call(x: Any) -> Any:
        """Keras's own call, with states of decoders that are zero, as those of a new session."""
        states = [tf.zeros((ROWS, *state.shape[1:])) for state in drawn.model.inputs[1:]]
        result = drawn.model([x, *states] if states else x, training=False)
        return result[0] if states else result

    whole = tf.function(call, autograph=False)
    compiled = Compiled(f"seed {seed}", drawn.model, program)
    for steps in (1, 3, STEPS):
        x = random_models.series(rng, ROWS, steps)
        expected = np.asarray(whole(x), np.float64)
        nudged = x * (1 + rng.choice([-1.0, 1.0], x.shape) * 2.0**-23)
        noise = np.max(np.abs(np.asarray(whole(nudged.astype(np.float32)), np.float64) - expected), initial=0)
        stepped = compiled.stepped([x], steps)[program.outputs[0].name]
        scale = max(1.0, float(np.max(np.abs(expected))))
        apart = float(np.max(np.abs(stepped - expected)))
        assert apart <= TOLERANCE * scale + NOISES * noise, (
            f"seed {seed}: {drawn.blocks} is served, and differs from Keras by {apart:.2g} over {steps} time steps "
            f"(values up to {scale:.2g}, rounding {noise:.1g})"
        )


def main() -> int:
    """Check as many models as asked for; print each failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=100, help="how many models (default: 100)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the first one (default: drawn)")
    arguments = parser.parse_args()
    first = int(np.random.default_rng().integers(1 << 30)) if arguments.seed is None else arguments.seed
    print(f"{arguments.models} models from --seed {first} on", flush=True)
    counts = {"served": 0, "refused": 0, "failed": 0}
    for seed in range(first, first + arguments.models):
        try:
            counts[check(seed)] += 1
        except Exception as error:  # One failure is no reason to stop looking.
            counts["failed"] += 1
            print(f"FAILED --models 1 --seed {seed}: {type(error).__name__}: {error}", flush=True)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
