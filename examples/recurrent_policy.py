"""Reinforcement learning: recurrent policies for many environments at once, each with a memory on the server.

A pole must be balanced on a cart, and what is seen of both is where they are, not how fast: without a memory nobody
balances it for long. The memory is the served model, a GRU; what is learned is what to do with it, one vector of
weights, by the cross-entropy method: 128 policies play in 128 environments, the best eighth say where the next 128
are drawn. Each environment has a session of its own, all of them one group. Episodes end at different times: where
one begins, `reset=` empties that session's memory in the same call that steps them all.

The server: `python examples/memory.py` makes the model, `stepwell serve memory=out/memory.keras` serves it.
Then `python examples/recurrent_policy.py --picture returns.png`; it takes less than a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np
import numpy.typing as npt

import stepwell

ENVIRONMENTS = 128
STEPS = 300  # of each environment in a generation
ELITE = ENVIRONMENTS // 8

Values = npt.NDArray[np.floating]


class Policies:
    """As many policies as there are environments: a memory each, and weights that make an action of it."""

    def __init__(self, memories: stepwell.SessionGroup, *, forget: bool = False) -> None:
        self._memories = memories
        self._forget = forget  # empty every memory before every step: to see what it is good for

    def act(self, weights: Values, seen: Values, begins: npt.NDArray[np.bool_]) -> npt.NDArray[np.int_]:
        """What each does next: push to the left (0) or to the right (1).

        Args:
            weights: (environments, units).
            seen: (environments, 2), where each cart and its pole are.
            begins: (environments,), where that is the first of an episode.
        """
        reset = np.ones_like(begins) if self._forget else begins
        memory = np.asarray(self._memories.step(seen, reset=reset), float)  # one message for all of them
        actions: npt.NDArray[np.int_] = (np.sum(memory * weights, axis=-1) > 0).astype(int)
        return actions


def play(policies: Policies, weights: Values, environments: gym.vector.VectorEnv, seed: int) -> Values:
    """Play for so many steps; returns how long each policy's episodes lasted on average."""
    seen, _ = environments.reset(seed=seed)
    begins, ended = np.ones(ENVIRONMENTS, np.bool_), np.zeros(ENVIRONMENTS, np.bool_)
    steps, episodes = np.zeros(ENVIRONMENTS), np.zeros(ENVIRONMENTS)
    for _ in range(STEPS):
        actions = policies.act(weights, seen[:, [0, 2]], begins)  # velocities are not shown
        begins = ended  # gymnasium begins an episode in the step after its last one, whatever the action
        seen, _, terminated, truncated, _ = environments.step(actions)
        ended = terminated | truncated
        steps += ~begins
        episodes += ended
    lasted: Values = steps / np.maximum(1, episodes)
    return lasted


def learn(policies: Policies, units: int, generations: int, seed: int = 1) -> list[float]:
    """Learn the weights; returns the mean return of each generation."""
    random = np.random.default_rng(seed)
    environments = gym.make_vec("CartPole-v1", ENVIRONMENTS, vectorization_mode="vector_entry_point")
    mean, spread, returns = np.zeros(units), np.ones(units), []
    for generation in range(generations):
        weights = mean + spread * random.standard_normal((ENVIRONMENTS, units))
        lasted = play(policies, weights, environments, seed=1000 * seed + generation)
        best = weights[np.argsort(lasted)[-ELITE:]]
        mean, spread = best.mean(axis=0), best.std(axis=0) + 0.02  # never quite certain
        returns.append(float(lasted.mean()))
        print(f"generation {generation + 1}: return {returns[-1]:.0f}", flush=True)
    environments.close()
    return returns


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Save the returns by generation as a picture."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, returns in curves.items():
        axes.plot(range(1, len(returns) + 1), returns, label=name)
    axes.set(xlabel="generation", ylabel=f"mean return (at most {STEPS})", ylim=(0, None))
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Learn with a memory and without one."""
    parser = argparse.ArgumentParser(description="Learn to balance a pole that is seen without its velocity.")
    parser.add_argument("--generations", type=int, default=25)
    parser.add_argument("--picture", type=Path, help="Where the returns are drawn.")
    options = parser.parse_args()
    curves = {}
    with stepwell.connect() as client, client.open_sessions("memory", ENVIRONMENTS) as memories:
        (units,) = client.model("memory").outputs[0].shape
        for name, forget in (("with a memory", False), ("without", True)):
            print(name)
            curves[name] = learn(Policies(memories, forget=forget), units, options.generations)
    if options.picture is not None:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
