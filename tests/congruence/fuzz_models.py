"""Compile random models: what is served must equal Keras, and what is built of good blocks must be served.

python tests/congruence/fuzz_models.py [--models 100] [--seed 7]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.models import random_models
from support.models.programs import compile_model

#: Many time steps, and as few as all blocks take: some change the length of a shorter sequence.
STEPS, FEW_STEPS, ROWS = 800, 13, 3
#: Keras unrolls a TimeDistributed over all time steps, which takes minutes for many of them.
STEPS_UNROLLED = 40
#: Rounding, as a share of the output's scale, and times what one rounding of the inputs does to Keras.
TOLERANCE, NOISES = 2e-5, 64.0
#: What good blocks may be refused for: a window past the end of a sequence that an earlier block delayed.
KNOWN_LIMIT = "the end of a sequence that lags behind"
#: Steps that all rows share at first, sessions, and changes of them.
SHARED, SESSIONS, CHANGES = 14, 9, 60


def check(seed: int) -> str:
    """Compile the model of one seed; return "served" or "refused".

    Raises:
        AssertionError: it is served and differs from Keras, or is refused although all its blocks are good.
    """
    from stepwell_server.compile.errors import ModelError
    from stepwell_server.program import ProofOptions

    # Masks end at some blocks, in the served model as well.
    warnings.filterwarnings("ignore", ".* was passed an input with a mask attached to it", UserWarning)
    drawn = random_models.draw(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn.model.save(folder / "model.keras")
        try:
            program = compile_model(folder / "model.keras", options=ProofOptions(steps=520))
        except ModelError as error:
            said = str(error)
            assert not drawn.is_good or KNOWN_LIMIT in said, f"{drawn} is refused: {said}"
            assert "\n" not in said, f"{drawn}: {said!r}"
            return "refused"
    rng = np.random.default_rng(seed)
    _compare(drawn, program, rng)
    asyncio.run(_play(drawn, program, rng))
    return "served"


def _compare(drawn: random_models.RandomModel, program: Any, rng: np.random.Generator) -> None:
    """Step whole sequences, and compare with Keras."""
    import tensorflow as tf

    def call(x: Any) -> Any:
        """Keras's own call, with states of decoders that are zero, as those of a new session."""
        states = [tf.zeros((ROWS, *state.shape[1:])) for state in drawn.model.inputs[1:]]
        result = drawn.model([x, *states] if states else x, training=False)
        return result[0] if states else result

    whole = tf.function(call, autograph=False)
    for steps in (FEW_STEPS, STEPS_UNROLLED if "decoded" in drawn.blocks else STEPS):
        x = random_models.series(rng, ROWS, steps)
        expected = np.asarray(whole(x), np.float64)
        nudged = x * (1 + rng.choice([-1.0, 1.0], x.shape) * 2.0**-23)
        noise = np.max(np.abs(np.asarray(whole(nudged.astype(np.float32)), np.float64) - expected), initial=0)
        stepped = _stepped(program, x)
        stepped = stepped if program.outputs[0].temporal else stepped[:, -1]
        scale = max(1.0, float(np.max(np.abs(expected))))
        apart = float(np.max(np.abs(stepped - expected)))
        assert apart <= TOLERANCE * scale + NOISES * noise, (
            f"{drawn} is served, and differs from Keras by {apart:.2g} over {steps} time steps "
            f"(values up to {scale:.2g}, rounding {noise:.1g})"
        )


def _stepped(program: Any, x: Any) -> Any:
    """The first output after each time step of a sequence."""
    from stepwell_server.engine.executors import load_executor

    executor = load_executor(program)
    executor.bind(len(x))
    for i, value in enumerate(program.initial):
        executor.states()[i][...] = value
    found = []
    for time in range(x.shape[1]):
        if time:
            executor.carry()
        executor.inputs()[0][...] = x[:, time]
        executor.invoke()
        found.append(np.array(executor.outputs()[0]))
    return np.stack(found, 1)


async def _play(drawn: random_models.RandomModel, program: Any, rng: np.random.Generator) -> None:
    """Step sessions in random pieces and company, fork and reset them: all get the bits of rows that are stepped alone."""
    from stepwell_server.engine.executors import load_executor
    from support.engine.harness import running

    x = random_models.series(rng, ROWS, 40)
    x[:, :SHARED] = x[:1, :SHARED]
    expected = np.concatenate([_stepped(program, x[row : row + 1]) for row in range(ROWS)])
    name = program.outputs[0].name
    # The row that each session has had so far, and how many of its time steps.
    at = [(int(rng.integers(ROWS)), 0) for _ in range(SESSIONS)]
    async with running(
        {"model": program}, executor=load_executor, threads=True, resident_rows=SESSIONS - 2
    ) as harness:
        ids = [f"0-{i}" for i in range(SESSIONS)]
        await harness.open(*ids, model="model")
        for change in range(1, CHANGES):
            steps = int(rng.choice([1, 1, 2, 5, 11]))
            chosen = [int(i) for i in rng.permutation(SESSIONS)[: rng.integers(1, SESSIONS + 1)]]
            for i in chosen:
                row, time = at[i]
                if time + steps > x.shape[1] or rng.random() < 0.1:
                    await harness.submit(ids[i], reset=True).only()
                    at[i] = int(rng.integers(ROWS)), 0
                elif rng.random() < 0.1:
                    other = f"{change}-{i}"
                    await harness.engine.fork(ids[i], new_session_id=other)
                    await harness.engine.close_session(ids[i])
                    ids[i] = other
                elif time <= SHARED:
                    at[i] = int(rng.integers(ROWS)), time
            pieces = np.stack([x[row, time : time + steps] for row, time in (at[i] for i in chosen)])
            answers = harness.submit([ids[i] for i in chosen], inputs={program.inputs[0].name: pieces})
            for i, answer in zip(chosen, await answers.all(), strict=True):
                row, time = at[i]
                after = expected[row, time : time + steps]
                after = after if program.outputs[0].temporal else after[-1]
                outputs = getattr(answer, "outputs", None)
                assert outputs, f"{drawn}: {answer}"
                assert outputs[name][0].tobytes() == after.tobytes(), (
                    f"{drawn}: row {row} has other bits in a batch, from time step {time} on, {steps} of them"
                )
                at[i] = row, time + steps


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
