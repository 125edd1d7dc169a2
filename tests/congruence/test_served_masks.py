"""Masks, rows and states of steps, through both clients, held against Keras and the cells' own formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

import stepwell
from support.checks import reference_cells
from support.peers.wire import Array
from support.sdk import client_kinds
from support.servers.served import MODELS, Served, keras_model

ROWS, STEPS = 3, 9
Named = dict[str, Any]


def named(served: Served, model: str, outputs: Any) -> Named:
    if isinstance(outputs, Mapping):
        return dict(outputs)
    return {served.infos[model].outputs[0].name: outputs}


def cut(served: Served, model: str, inputs: Named, first: int, last: int) -> Named:
    """The inputs of some time steps."""
    temporal = {spec.name: spec.temporal for spec in served.infos[model].inputs}
    return {name: array[:, first:last] if temporal[name] else array for name, array in inputs.items()}


def pieces(rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    edges = [0, *sorted(rng.choice(np.arange(1, STEPS), 3, replace=False).tolist()), STEPS]
    return itertools.pairwise(edges)


def by_keras(served: Served, model: str, inputs: Named, row: int, first: int, last: int) -> Named:
    """What Keras computes of the time steps `first` to before `last` of a row, from its initial state."""
    import keras

    own = {name: array[row : row + 1] for name, array in cut(served, model, inputs, first, last).items()}
    given: Any = own if len(own) > 1 else next(iter(own.values()))
    flat = [np.array(value) for value in keras.tree.flatten(keras_model(model)(given))]
    return dict(zip([spec.name for spec in served.infos[model].outputs], flat, strict=True))


def hold_against_keras(served: Served, model: str, inputs: Named, mask: Array, seen: Named) -> None:
    """`seen` are the outputs of whole sequences that restarted where the mask resets them."""
    for row in range(ROWS):
        starts = sorted({0, *np.flatnonzero(mask[row]).tolist()})
        for first, last in zip(starts, [*starts[1:], STEPS], strict=True):
            wanted = by_keras(served, model, inputs, row, first, last)
            for spec in served.infos[model].outputs:
                if spec.temporal:
                    own, theirs = seen[spec.name][row, first:last], wanted[spec.name][0]
                elif last == STEPS:
                    own, theirs = seen[spec.name][row], wanted[spec.name][0]
                else:
                    continue
                np.testing.assert_allclose(np.asarray(own), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("model", MODELS)
def test_random_masks_in_random_pieces_are_keras_from_the_start_of_each(served: Served, model: str) -> None:
    rng = np.random.default_rng(len(model))
    inputs, mask = served.draw(model, ROWS, STEPS, 3), rng.random((ROWS, STEPS)) < 0.3
    mask[:, 4] = model == "seq"  # all at once
    parts: list[Named] = []
    with served.client.open_session(model, batch_size=ROWS) as session:
        for first, last in pieces(rng):
            traced = session.trace(cut(served, model, inputs, first, last), reset=mask[:, first:last])
            parts.append(named(served, model, traced.outputs))
            assert traced.revision == session.revision == len(parts)
            assert traced.position == session.position
            now = session.get_state()
            assert list(now) == list(traced.states)
            for name, series in traced.states.items():
                assert series.shape == (ROWS, last - first, *now[name].shape[1:])
                assert series[:, -1].tobytes() == now[name].tobytes()
        now = session.get_state()
        assert session.position == STEPS - max([0, *np.flatnonzero(mask.all(axis=0)).tolist()])
    seen = {
        spec.name: np.concatenate([part[spec.name] for part in parts], 1)
        if spec.temporal
        else parts[-1][spec.name]
        for spec in served.infos[model].outputs
    }
    hold_against_keras(served, model, inputs, mask, seen)
    predicted, final = served.client.predict(model, inputs, reset=mask)
    for name, array in named(served, model, predicted).items():
        assert array.tobytes() == seen[name].tobytes()
    assert {name: array.tobytes() for name, array in final.items()} == {
        n: a.tobytes() for n, a in now.items()
    }


def test_the_states_of_a_trace_are_those_of_the_cell(served: Served) -> None:
    layer = next(layer for layer in keras_model("seq").layers if layer.name == "lstm")
    weights = [np.array(value, np.float64) for value in layer.get_weights()]
    x = served.draw("seq", ROWS, STEPS, 5)["x"]
    with served.client.open_session("seq", batch_size=ROWS) as session:
        states = session.trace(x).states
    h = c = np.zeros((ROWS, weights[1].shape[0]))
    for time in range(STEPS):
        h, c = reference_cells.lstm_step(x[:, time].astype(np.float64), h, c, *weights)
        for name, wanted in zip(states, (h, c), strict=True):
            np.testing.assert_allclose(
                np.asarray(states[name][:, time], np.float64), wanted, rtol=2e-5, atol=2e-6
            )


@pytest.mark.parametrize("shell", client_kinds.SHELLS)
async def test_rows_that_are_ready_advance_as_if_each_were_alone(served: Served, shell: str) -> None:
    """Environments that answer at different times, in one session: each row is Keras on what it was given."""
    rng = np.random.default_rng(7)
    given: list[list[Array]] = [[] for _ in range(ROWS)]
    seen: list[list[Array]] = [[] for _ in range(ROWS)]
    async with client_kinds.connect(shell, served.address) as client:
        session = await client.open_session("seq", batch_size=ROWS)
        position = 0
        for _ in range(12):
            ready = rng.random(ROWS) < 0.6
            steps = int(rng.integers(1, 4))
            if not ready.any():
                with pytest.raises(stepwell.InvalidInputError, match="rows must select at least one row"):
                    await session.step(np.zeros((0, steps, 3), np.float32), rows=ready)
                continue
            x = rng.standard_normal((int(ready.sum()), steps, 3)).astype(np.float32)
            y = await session.step(x, rows=ready)
            position += steps
            for place, row in enumerate(np.flatnonzero(ready).tolist()):
                given[row].append(x[place])
                seen[row].append(y[place])
        assert session.position == position
        await session.close()
    for row in range(ROWS):
        whole = np.concatenate(given[row])[None]
        wanted = np.array(keras_model("seq")(whole))[0]
        np.testing.assert_allclose(np.concatenate(seen[row]), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shell", client_kinds.SHELLS)
async def test_what_a_step_may_ask_for(served: Served, shell: str) -> None:
    inputs = served.draw("multi", 2, 4, 6)
    names = [spec.name for spec in served.infos["multi"].outputs]
    temporal = [spec.name for spec in served.infos["multi"].outputs if spec.temporal]
    async with client_kinds.connect(shell, served.address) as client:
        known: Any = served.client.predict("multi", inputs)[0]
        async with await client.open_session("multi", batch_size=2) as session:
            only = await session.step(inputs, outputs=[names[-1]])
            assert list(only) == [names[-1]]
            assert only[names[-1]].tobytes() == known[names[-1]].tobytes()
            last = await session.step(inputs, outputs=names[::-1], time="last", reset=[True, True])
            assert list(last) == names[::-1]
            for name in names:
                wanted = known[name][:, -1] if name in temporal else known[name]
                assert last[name].tobytes() == np.ascontiguousarray(wanted).tobytes()
            assert session.position == 4
            with pytest.raises(stepwell.InvalidInputError, match=r"output_names must be among .* got 'q'"):
                await session.step(inputs, outputs=["q"])
            none = await session.step(inputs, outputs="none", states="last")
            assert none.outputs is None
            assert {n: a.tobytes() for n, a in none.states.items()} == {
                n: a.tobytes() for n, a in (await session.get_state()).items()
            }
            some = await session.trace(inputs, reset=np.eye(2, 4, dtype=np.bool_))
            assert {array.shape[:2] for array in some.states.values()} == {(2, 4)}
            await session.reset_states(rows=[False, True])
            now = await session.get_state()
            for name, array in now.items():
                assert array[0].tobytes() == some.states[name][0, -1].tobytes()
                assert not array[1].any()
            with pytest.raises(
                stepwell.InvalidInputError, match=r"reset must be booleans of shape \(2,\) or \(2, 4\)"
            ):
                await session.step(inputs, reset=np.ones((2, 3), np.bool_))
            with pytest.raises(
                stepwell.InvalidInputError, match=r"2 rows on its first axis|1 row on its first axis"
            ):
                await session.step(inputs, rows=[1])


def test_a_trace_that_is_too_long_for_a_message_changes_nothing(served: Served) -> None:
    with served.client.open_session("seq") as session:
        steps = 8 << 10
        x = np.zeros((1, steps, 3), np.float32)
        session.step(x, outputs="none")
        with pytest.raises(stepwell.InvalidInputError, match="or for the states of fewer rows"):
            session.trace(np.zeros((1, 8 * steps, 3), np.float32))
        assert (session.revision, session.position) == (1, steps)
        assert session.trace(x).position == 2 * steps
