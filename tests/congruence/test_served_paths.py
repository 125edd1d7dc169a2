"""Every way to a session gives the same bits, and they are Keras's numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import stepwell
from stepwell.v1 import sessions_pb2
from support.peers import wire
from support.peers.wire import Array
from support.servers.served import MODELS, Served, keras_model

USERS = 9
STEPS = 7
Named = Mapping[str, Array]


def named(served: Served, model: str, outputs: Any) -> dict[str, Array]:
    """What the SDK returned, by name."""
    assert outputs is not None
    if isinstance(outputs, Mapping):
        return dict(outputs)
    (spec,) = served.infos[model].outputs
    return {spec.name: outputs}


def bits(outputs: Named) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    return {name: (array.shape, array.dtype.name, array.tobytes()) for name, array in outputs.items()}


def row(inputs: Named, i: int) -> dict[str, Array]:
    return {name: array[i : i + 1] for name, array in inputs.items()}


def at(served: Served, model: str, inputs: Named, time: int) -> dict[str, Array]:
    """The inputs of one time step, without a time axis."""
    return {
        spec.name: inputs[spec.name][:, time] if spec.temporal else inputs[spec.name]
        for spec in served.infos[model].inputs
    }


def joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def by_keras(model: str, served: Served, inputs: Named) -> dict[str, Array]:
    import keras

    loaded = keras_model(model)
    given: Any = dict(inputs) if len(inputs) > 1 else next(iter(inputs.values()))
    flat = [np.array(value) for value in keras.tree.flatten(loaded(given))]
    return dict(zip([spec.name for spec in served.infos[model].outputs], flat, strict=True))


async def by_async_sessions(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    """Steps of all sessions awaited together, so that they share frames."""
    async with stepwell.aio.connect(served.address) as client:
        sessions = [await client.open_session(model) for _ in range(USERS)]
        answers = await asyncio.gather(*[s.step(row(inputs, i)) for i, s in enumerate(sessions)])
        await asyncio.gather(*[s.close() for s in sessions])
    return joined([named(served, model, answer) for answer in answers])


def by_sync_sessions(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    answers = []
    for i in range(USERS):
        with served.client.open_session(model) as session:
            answers.append(named(served, model, session.step(row(inputs, i))))
    return joined(answers)


def by_a_group(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    with served.client.open_sessions(model, USERS) as group:
        return named(served, model, group.step(inputs))


def by_one_session_of_many_rows(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    with served.client.open_session(model, batch_size=USERS) as session:
        return named(served, model, session.step(inputs))


def by_unary_calls(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    answers = []
    for i in range(USERS):
        with served.session(model, steps=0) as session_id:
            answers.append(wire.arrays(served.wire.step(session_id, wire.tensors(row(inputs, i))).outputs))
    return joined(answers)


def by_a_raw_frame_of_mixed_batch_sizes(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    sizes = [1, 3, 2, 1, 2]
    assert sum(sizes) == USERS
    ids = [served.wire.open(model, batch_size=size) for size in sizes]
    answers = served.wire.exchange(wire.step_frame(3, ids, wire.tensors(inputs), request_ids=range(1, 6)))
    assert not wire.of_members(answers, len(sizes))
    found = wire.rows_of(answers, sizes)
    served.wire.close(*ids)
    return joined([found[i] for i in range(len(sizes))])


def by_prediction(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    outputs, _ = served.client.predict(model, inputs)
    return named(served, model, outputs)


def by_predictions_of_a_row(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    return joined(
        [named(served, model, served.client.predict(model, row(inputs, i))[0]) for i in range(USERS)]
    )


def by_single_steps(served: Served, model: str, inputs: Named) -> dict[str, Array]:
    """T calls of one time step, each with and without a time axis by turns."""
    with served.client.open_session(model, batch_size=USERS) as session:
        seen = []
        for time in range(STEPS):
            one = at(served, model, inputs, time)
            if time % 2:
                one = {
                    s.name: one[s.name][:, None] if s.temporal else one[s.name]
                    for s in served.infos[model].inputs
                }
            answer = named(served, model, session.step(one))
            temporal = [spec.name for spec in served.infos[model].outputs if spec.temporal]
            seen.append({n: a[:, 0] if n in temporal and time % 2 else a for n, a in answer.items()})
        assert (session.revision, session.position) == (STEPS, STEPS)
    return {
        spec.name: np.stack([one[spec.name] for one in seen], 1) if spec.temporal else seen[-1][spec.name]
        for spec in served.infos[model].outputs
    }


WAYS = [
    by_sync_sessions,
    by_a_group,
    by_one_session_of_many_rows,
    by_unary_calls,
    by_a_raw_frame_of_mixed_batch_sizes,
    by_predictions_of_a_row,
    by_single_steps,
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("model", MODELS)
async def test_every_way_gives_the_same_bits(served: Served, model: str, seed: int) -> None:
    inputs = served.draw(model, USERS, STEPS, seed)
    if model == "masked":
        inputs[served.infos[model].inputs[0].name][
            np.random.default_rng(seed).random((USERS, STEPS)) < 0.4
        ] = -1.0
    whole = by_prediction(served, model, inputs)
    expected = bits(whole)
    for way in WAYS:
        found = await asyncio.to_thread(way, served, model, inputs)
        assert bits(found) == expected, way.__name__
    assert bits(await by_async_sessions(served, model, inputs)) == expected
    reference = by_keras(model, served, inputs)
    assert {name: array.shape for name, array in whole.items()} == {n: a.shape for n, a in reference.items()}
    for name, array in reference.items():
        np.testing.assert_allclose(whole[name], array, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("model", MODELS)
def test_the_state_is_the_same_whichever_way_it_came_about(served: Served, model: str) -> None:
    inputs = served.draw(model, 2, STEPS, 5)
    _, final = served.client.predict(model, inputs)
    with (
        served.client.open_session(model, batch_size=2) as whole,
        served.client.open_session(model, batch_size=2) as parts,
    ):
        whole.step(inputs)
        cut = {
            s.name: inputs[s.name][:, :3] if s.temporal else inputs[s.name]
            for s in served.infos[model].inputs
        }
        rest = {
            s.name: inputs[s.name][:, 3:] if s.temporal else inputs[s.name]
            for s in served.infos[model].inputs
        }
        first, second = named(served, model, parts.step(cut)), named(served, model, parts.step(rest))
        assert whole.get_state() == parts.get_state() == final
        assert bits(second) == bits(
            named(served, model, served.client.predict(model, rest, served.client.predict(model, cut)[1])[0])
        )
        temporal = [spec.name for spec in served.infos[model].outputs if spec.temporal]
        together = named(served, model, served.client.predict(model, inputs)[0])
        for name in temporal:
            assert np.concatenate([first[name], second[name]], 1).tobytes() == together[name].tobytes()


@pytest.mark.parametrize("steps", [0, 1, STEPS])
@pytest.mark.parametrize("model", MODELS)
def test_the_returned_time_steps(served: Served, model: str, steps: int) -> None:
    """(B, T, ...) of what is temporal if the inputs had T, else (B, ...); the last one; or nothing."""
    inputs = served.draw(model, 2, steps, 8)
    with served.session(model, 2) as session_id:
        state = served.client.open_session(model, batch_size=2, session_id=session_id).get_state()
        known = named(served, model, served.client.predict(model, inputs, state)[0])
        for spec in served.infos[model].outputs:
            assert known[spec.name].shape == (2, *((steps,) if spec.temporal and steps else ()), *spec.shape)
        temporal = [spec.name for spec in served.infos[model].outputs if spec.temporal]
        last = {n: np.ascontiguousarray(a[:, -1]) if n in temporal and steps else a for n, a in known.items()}
        for selection, expected in (("all", known), ("last", last), ("none", {})):
            number = sessions_pb2.OutputSelection.Value(f"OUTPUT_SELECTION_{selection.upper()}")
            with (
                served.client.open_session(model, batch_size=2, state=state) as single,
                served.client.open_session(model, batch_size=2, state=state) as raw,
            ):
                answer = single.step(inputs, outputs=selection)
                assert (
                    (answer is None)
                    if selection == "none"
                    else bits(named(served, model, answer)) == bits(expected)
                )
                by_call = served.wire.step(raw.id, wire.tensors(inputs), outputs=number)
                assert wire.data(by_call.outputs) == {n: (a.shape, a.tobytes()) for n, a in expected.items()}
                assert single.get_state() == raw.get_state()
            with served.client.open_sessions(model, 2) as group:
                group.reset_states(dict(state))
                frame = wire.step_frame(1, group.ids, wire.tensors(inputs), outputs=number)
                (part,) = served.wire.exchange(frame)
                assert wire.data(part.outputs) == {n: (a.shape, a.tobytes()) for n, a in expected.items()}


def test_every_batch_size_gives_a_row_the_same_bits(served: Served) -> None:
    """Yours alone: one row by itself, and the same row beside any number of others."""
    x = served.draw("seq", 200, 2, 11)["x"]
    alone = [np.asarray(served.client.predict("seq", x[i : i + 1])[0]) for i in (0, 77, 199)]
    for count in (2, 3, 8, 31, 64, 100, 197):
        with served.client.open_sessions("seq", count + 3) as group:
            batch = np.concatenate([x[[0]], x[1 : count + 1], x[[77, 199]]])
            y = np.asarray(group.step(batch))
            for i, row_at in enumerate((0, count + 1, count + 2)):
                assert y[row_at : row_at + 1].tobytes() == alone[i].tobytes(), count


def test_inputs_by_name_in_any_order_and_of_any_float_type(served: Served) -> None:
    inputs = served.draw("multi", 3, 4, 2)
    known, _ = served.client.predict("multi", inputs)
    assert isinstance(known, dict)
    turned = dict(reversed(inputs.items()))
    wider = {
        n: a.astype(np.float64) if a.dtype.kind == "f" else a.astype(np.int64) for n, a in turned.items()
    }
    for given in (turned, wider):
        with served.client.open_session("multi", batch_size=3) as session:
            assert bits(named(served, "multi", session.step(given))) == bits(known)
