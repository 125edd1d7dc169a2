"""Real programs in the engine: a session gets the same bits alone and in company, and what Keras computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stepwell_server.engine.executors import load_executor
from support.checks.reference_cells import lstm_step
from support.engine.harness import Harness, running
from support.models.compiled import Compiled, zoo_model
from support.models.zoo import COMMON
from support.samples import only

KINDS = [
    "lstm_dense",
    "lstm_all_options",
    "gru_reset_after",
    "gru_reset_before",
    "simple_rnn_relu",
    "seed_model",
    "stacked_cells",
    "conv_lstm_2d",
    "deep_with_normalization",
    "nested_same_names",
    "several_inputs_and_outputs",
    "repeat_vector_decoder",
    "masking",
    "embedding_mask_zero",
    "accumulator",
    "integer_accumulator",
    "learned_initial_state",
    "subclassed",
    "not_convertible",
]
OTHERS = 500


@pytest.fixture(scope="module", params=only(set(COMMON).intersection(KINDS), KINDS))
def kind(request: pytest.FixtureRequest) -> Compiled:
    return zoo_model(request.param)


def at_time(kind: Compiled, inputs: list[Any], rows: slice, time: slice | int) -> dict[str, Any]:
    """The inputs of some rows at one time step, or at several."""
    return {
        spec.name: array[rows, time] if spec.temporal else array[rows]
        for spec, array in zip(kind.program.inputs, inputs, strict=True)
    }


def shown(outputs: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in outputs.items()}


def serving(kind: Compiled, **settings: Any) -> Any:
    # FixedCost says that each pass is worth splitting over both compute threads
    return running(
        {"model": kind.program}, executor=load_executor, threads=True, resident_rows=640, **settings
    )


async def final_state(at: Harness, session_id: str) -> dict[str, bytes]:
    return shown(await at.state(session_id))


async def test_a_session_has_the_same_bits_alone_and_among_others_that_come_and_go(kind: Compiled) -> None:
    steps, everyone = 12, kind.draw(2, OTHERS + 1, 12)
    me = slice(0, 1)
    async with serving(kind) as at:
        await at.open("me", model="model")
        alone = [
            shown((await at.single("me", None, inputs=at_time(kind, everyone, me, t)).only()).outputs)
            for t in range(steps)
        ]
        state_alone = await final_state(at, "me")
    rng = np.random.default_rng(3)
    async with serving(kind, max_batch_rows=300) as at:
        await at.engine.open_sessions("model", session_ids=["me", *(f"o{i}" for i in range(OTHERS))])
        for t in range(steps):
            # most come one by one, some in a frame, some with several steps; me somewhere between them
            coming = rng.permutation(OTHERS)[: rng.integers(1, OTHERS)]
            before, after = np.split(coming, [rng.integers(0, len(coming))])
            waiting = [
                send(at, kind, everyone, group, rng) for group in np.array_split(before, 3) if len(group)
            ]
            mine = at.single("me", None, inputs=at_time(kind, everyone, me, t))
            waiting += [
                send(at, kind, everyone, group, rng) for group in np.array_split(after, 3) if len(group)
            ]
            assert shown((await mine.only()).outputs) == alone[t], f"at step {t}"
            for answers in waiting if rng.random() < 0.5 else ():
                await answers.all()
        assert await final_state(at, "me") == state_alone
        assert max(rows for rows, _ in at.events.passes) > 10, "it was in company"


def send(at: Harness, kind: Compiled, everyone: list[Any], group: Any, rng: Any) -> Any:
    """A frame of some of the others, at a random time step or at several."""
    time = slice(0, int(rng.integers(1, 5)))
    inputs = {
        spec.name: array[group + 1][:, time] if spec.temporal else array[group + 1]
        for spec, array in zip(kind.program.inputs, everyone, strict=True)
    }
    return at.submit([f"o{i}" for i in group], inputs=inputs)


async def test_rows_of_one_session_are_what_sessions_of_one_row_are(kind: Compiled) -> None:
    rows, steps = 5, 6
    inputs = kind.draw(4, rows, steps)
    async with serving(kind) as at:
        await at.open("whole", batch_size=rows, model="model")
        whole = [
            (
                await at.submit("whole", sizes=[rows], inputs=at_time(kind, inputs, slice(None), t)).only()
            ).outputs
            for t in range(steps)
        ]
        for row in range(rows):
            one = slice(row, row + 1)
            await at.open(f"row{row}", model="model")
            for t in range(steps):
                answer = await at.single(f"row{row}", None, inputs=at_time(kind, inputs, one, t)).only()
                assert shown(answer.outputs) == shown({n: a[one] for n, a in whole[t].items()})


async def test_stepping_in_any_portions_is_keras_on_the_whole_sequence(kind: Compiled) -> None:
    rows, steps = kind.shape
    inputs = kind.draw(5, rows, steps)
    whole = kind.keras(inputs)
    async with serving(kind) as at:
        await at.open("one", "two", "three", batch_size=rows, model="model")
        at_once = await at.submit(
            "one", sizes=[rows], inputs=at_time(kind, inputs, slice(None), slice(None))
        ).only()
        halves = [
            (
                await at.submit("two", sizes=[rows], inputs=at_time(kind, inputs, slice(None), t)).only()
            ).outputs
            for t in (slice(0, steps // 2), slice(steps // 2, steps))
        ]
        single = [
            (
                await at.submit("three", sizes=[rows], inputs=at_time(kind, inputs, slice(None), t)).only()
            ).outputs
            for t in range(steps)
        ]
        for spec in kind.program.outputs:
            name, got = spec.name, at_once.outputs[spec.name]
            np.testing.assert_allclose(got, whole[name], rtol=3e-6, atol=3e-6, err_msg=name)
            if spec.temporal:
                assert np.concatenate([h[name] for h in halves], 1).tobytes() == got.tobytes()
                assert np.stack([s[name] for s in single], 1).tobytes() == got.tobytes()
            else:
                assert halves[-1][name].tobytes() == single[-1][name].tobytes() == got.tobytes()
        assert await final_state(at, "one") == await final_state(at, "two") == await final_state(at, "three")
        if all(spec.temporal for spec in kind.program.inputs):
            predicted = await at.engine.predict("model", at_time(kind, inputs, slice(None), slice(None)))
            assert shown(predicted.outputs) == shown(at_once.outputs)
            assert shown(predicted.state) == await final_state(at, "one")


async def test_an_lstm_is_the_lstm_of_the_papers_also_from_a_state_that_is_set() -> None:
    compiled = zoo_model("lstm_dense")
    layer, head = compiled.model.get_layer("lstm"), compiled.model.get_layer("y")
    kernel, recurrent, bias, dense, offset = (
        np.array(w, np.float64) for w in (*layer.weights, *head.weights)
    )
    rng = np.random.default_rng(6)
    x = rng.standard_normal((7, 10, 3))
    h, c = rng.standard_normal((2, 7, 8))
    async with serving(compiled) as at:
        await at.open("a", batch_size=7, model="model")
        await at.submit("a", sizes=[7], reset=True, state={"lstm/h": h, "lstm/c": c}).only()
        answer = await at.submit("a", sizes=[7], inputs={"x": x}).only()
        for t in range(10):
            h, c = lstm_step(x[:, t], h, c, kernel, recurrent, bias)
            np.testing.assert_allclose(answer.outputs["y"][:, t], h @ dense + offset, atol=2e-6)
        state = await at.state("a")
        np.testing.assert_allclose(state["lstm/h"], h, atol=2e-6)
        np.testing.assert_allclose(state["lstm/c"], c, atol=2e-6)


async def test_a_token_out_of_range_fails_alone_among_fifty() -> None:
    compiled = zoo_model("embedding_mask_zero")
    tokens = np.random.default_rng(8).integers(0, 9, 51).astype(np.int32)
    ids = [f"s{i}" for i in range(51)]
    async with serving(compiled) as at, serving(compiled) as without:
        for engine in (at, without):
            await engine.engine.open_sessions("model", session_ids=ids)
        wanted = await without.submit(ids, inputs={"": tokens}).all()
        spoilt = tokens.copy()
        spoilt[25] = 9
        answers: list[Any] = await at.submit(ids, inputs={"": spoilt}).all()
        for i, (answer, good) in enumerate(zip(answers, wanted, strict=True)):
            if i == 25:
                assert type(answer).__name__ == "InvalidInput"
                assert "inputs must be ones that the model can run" in answer.message
            else:
                assert shown(answer.outputs) == shown(good.outputs)
        assert (await at.engine.session_info("s25")).revision == 0
        assert (await at.submit("s25", inputs={"": tokens[25:26]}, expected=0).only()).revision == 1
