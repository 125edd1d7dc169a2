"""Reinforcement learning with new weights by the second: a recurrent policy is trained while its environments go on.

The pole on a cart again, seen without its velocity; here the memory itself is learned, by a policy gradient (PPO). The
policy is a GRU with two heads, what to do and what to expect. It is served: 256 environments are the rows of one session,
and where an episode ends, `reset=` empties that row's memory in the step that begins the next one. After each 32 steps a
learner, which is Keras in this process, improves the weights, and `client.update_model` carries the session over to them
with its state: the episodes go on where they were.

It starts its own server: `python examples/policy_gradient.py --picture learning.png`. Its 80 updates take two to three
minutes on two idle cores, and several times that on a busy machine; `--updates 20` shows that it learns.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    print("Loading TensorFlow, compiling the policy and starting its server ...", flush=True)

# after that line, because they take seconds to import
import gymnasium as gym
import numpy as np
import numpy.typing as npt
from quiet import keras

import stepwell

import tensorflow as tf  # isort: skip  # after quiet, which keeps it from writing to stderr

ENVIRONMENTS, STEPS, UNITS = 256, 32, 32
DISCOUNT, SMOOTHING = 0.98, 0.9  # of rewards, and of what is learned from how they turned out (lambda)
EPOCHS, PARTS, CLIP, ENTROPY = 4, 4, 0.2, 0.003
SEEN, SCALE = [0, 2], np.array([1.0, 10.0])  # where cart and pole are, in numbers of one size; no velocities

Values = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]


def new_policy() -> keras.Model:
    """A memory of what was seen, and two heads: logits of the actions, and the return to expect."""
    seen = keras.Input((None, 2), name="seen")
    memory = keras.layers.GRU(UNITS, return_sequences=True, name="memory")(seen)
    logits = keras.layers.Dense(2, name="logits", kernel_initializer=keras.initializers.Orthogonal(0.01))(
        memory
    )
    value = keras.layers.Dense(1, name="value")(memory)
    return keras.Model(seen, {"logits": logits, "value": value}, name="policy")


@dataclass
class Experience:
    """What happened in all environments during some steps; each (environments, steps, ...)."""

    memory: Values
    """Before the first step, (environments, units)."""
    seen: Values
    begins: Mask
    """The first step of an episode, before which the memory was emptied."""
    actions: npt.NDArray[np.int_]
    chances: Values
    """Logarithms of the chances that the actions had."""
    values: Values
    """What was expected before each step, and after the last one: (environments, steps + 1)."""
    rewards: Values
    ended: Mask
    """The episode's last step."""
    counts: Mask
    """The action was played: gymnasium takes none in the step after an episode's last one, which begins the next."""

    def advantages(self) -> Values:
        """How much better it went than expected, looking ahead as far as `SMOOTHING` says."""
        found, later = np.zeros_like(self.rewards), np.zeros(len(self.rewards))
        for step in reversed(range(self.rewards.shape[1])):
            goes_on = ~self.ended[:, step]
            surprise = (
                self.rewards[:, step] + DISCOUNT * self.values[:, step + 1] * goes_on - self.values[:, step]
            )
            later = found[:, step] = surprise + DISCOUNT * SMOOTHING * goes_on * later
            later = later * self.counts[:, step]
        return found


class Actors:
    """The environments, and the session that has a memory for each."""

    def __init__(self, client: stepwell.Client, session: stepwell.Session, seed: int) -> None:
        self._client, self._session = client, session
        self._random = np.random.default_rng(seed)
        self._environments = gym.make_vec(
            "CartPole-v1", ENVIRONMENTS, vectorization_mode="vector_entry_point"
        )
        everything, _ = self._environments.reset(seed=seed)
        self._seen = everything[:, SEEN] * SCALE
        self._begins, self._ended = np.ones(ENVIRONMENTS, np.bool_), np.zeros(ENVIRONMENTS, np.bool_)
        self._length = np.zeros(ENVIRONMENTS, int)
        self.lengths: list[int] = []
        """Of the episodes that ended."""

    def play(self) -> Experience:
        """Play on for some steps."""
        state = self._session.get_state()
        columns: dict[str, list[Any]] = {
            name: []
            for name in ("seen", "begins", "actions", "chances", "values", "rewards", "ended", "counts")
        }
        for _ in range(STEPS):
            heads = self._session.step(self._seen, reset=self._begins)
            log_chances = heads["logits"] - np.logaddexp.reduce(heads["logits"], axis=-1, keepdims=True)
            actions = (self._random.random(ENVIRONMENTS) < np.exp(log_chances[:, 1])).astype(int)
            everything, rewards, terminated, truncated, _ = self._environments.step(actions)
            ended = terminated | truncated
            now = {
                "seen": self._seen,
                "begins": self._begins,
                "actions": actions,
                "chances": np.take_along_axis(log_chances, actions[:, None], axis=-1)[:, 0],
                "values": heads["value"][:, 0],
                "rewards": rewards,
                "ended": ended,
                "counts": ~self._ended,
            }
            for name, column in now.items():
                columns[name].append(column)
            self._count(ended)
            self._seen, self._begins, self._ended = everything[:, SEEN] * SCALE, self._ended, ended
        # What is to be expected now: predict touches no session.
        ahead, _ = self._client.predict(
            "policy", self._seen, dict(self._session.get_state()), reset=self._begins
        )
        columns["values"].append(ahead["value"][:, 0])
        arrays = {name: np.stack(column, axis=1) for name, column in columns.items()}
        return Experience(memory=state["memory/h"], **arrays)

    def _count(self, ended: Mask) -> None:
        self._length += ~self._ended
        self.lengths += self._length[ended].tolist()
        self._length[ended] = 0


class Learner:
    """Improves a policy by what its actors have gone through."""

    def __init__(self, policy: keras.Model, seed: int, rate: float = 5e-3) -> None:
        self._policy = policy
        self._random = np.random.default_rng(seed)
        self._improve = tf.function(self._step_down)
        self._optimizer = keras.optimizers.Adam(rate, clipnorm=1.0)

    def learn(self, experience: Experience) -> None:
        """Some steps on the clipped objective of PPO, with the environments in parts."""
        advantages = experience.advantages()
        returns = advantages + experience.values[:, :-1]
        counted = advantages[experience.counts]
        advantages = (advantages - counted.mean()) / (counted.std() + 1e-6)
        columns = (
            experience.memory, experience.seen, ~experience.begins, experience.actions, experience.chances,
            advantages, returns, experience.counts,
        )  # fmt: skip
        tensors = [
            tf.convert_to_tensor(column, tf.int32 if column.dtype.kind == "i" else tf.float32)
            for column in columns
        ]
        for _ in range(EPOCHS):
            for rows in np.array_split(self._random.permutation(ENVIRONMENTS), PARTS):
                self._improve(*(tf.gather(tensor, rows) for tensor in tensors))

    def _step_down(
        self,
        memory: tf.Tensor,
        seen: tf.Tensor,
        goes_on: tf.Tensor,
        actions: tf.Tensor,
        before: tf.Tensor,
        advantages: tf.Tensor,
        returns: tf.Tensor,
        counts: tf.Tensor,
    ) -> None:
        with tf.GradientTape() as tape:
            logits, values = self._run(memory, seen, goes_on)
            log_chances = tf.nn.log_softmax(logits)
            ratio = tf.exp(tf.gather(log_chances, actions, batch_dims=2) - before)
            gain = tf.minimum(ratio * advantages, tf.clip_by_value(ratio, 1 - CLIP, 1 + CLIP) * advantages)
            entropy = -tf.reduce_sum(tf.exp(log_chances) * log_chances, axis=-1)
            each = -gain - ENTROPY * entropy + 0.5 * tf.square(values - returns) / 100.0
            loss = tf.reduce_sum(each * counts) / tf.reduce_sum(counts)
        variables = self._policy.trainable_variables
        self._optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    def _run(self, memory: tf.Tensor, seen: tf.Tensor, goes_on: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The policy over the steps, its memory emptied where an episode begins: what the session did."""
        cell = self._policy.get_layer("memory").cell
        memories = []
        for step in range(STEPS):
            memory, _ = cell(seen[:, step], [memory * goes_on[:, step, None]])
            memories.append(memory)
        stacked = tf.stack(memories, axis=1)
        return self._policy.get_layer("logits")(stacked), self._policy.get_layer("value")(stacked)[..., 0]


def train(client: stepwell.Client, policy: keras.Model, updates: int, seed: int = 1) -> list[float]:
    """Train a served policy; returns how long the episodes lasted that ended before each update."""
    keras.utils.set_random_seed(seed)
    curve, learner, pushing, start = [], Learner(policy, seed), [], time.perf_counter()
    with client.open_session("policy", batch_size=ENVIRONMENTS) as session:
        actors = Actors(client, session, seed)
        for update in range(updates):
            learner.learn(actors.play())
            began = time.perf_counter()
            client.update_model("policy", policy, sessions="carry")
            pushing.append(time.perf_counter() - began)
            curve.append(float(np.mean(actors.lengths[-ENVIRONMENTS:])))
            print(
                f"update {update + 1} of {updates}, {time.perf_counter() - start:.0f} s:"
                f" version {session.model_version} played, episodes last {curve[-1]:.0f} steps",
                flush=True,
            )
    print(f"new weights were live after {np.median(pushing):.2f} s (median)")
    return curve


def draw(curve: list[float], path: Path) -> None:
    """Save the learning curve as a picture."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(np.arange(1, len(curve) + 1), curve)
    axes.set(
        xlabel="update of the served weights",
        ylabel="steps until the pole falls",
        ylim=(0, None),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train a policy that is served."""
    parser = argparse.ArgumentParser(description="Train a recurrent policy while it is served.")
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--picture", type=Path, help="Where the learning curve is drawn.")
    options = parser.parse_args()
    keras.utils.set_random_seed(1)
    policy = new_policy()
    with stepwell.local(policy, name="policy") as client:
        curve = train(client, policy, options.updates)
    if options.picture is not None:
        draw(curve, options.picture)


if __name__ == "__main__":
    main()
