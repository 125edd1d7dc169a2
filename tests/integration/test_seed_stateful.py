"""The article's stateful system, over gRPC: its four numbers, and what it says of states and batch sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

import stepwell
from stepwell.testing import LocalServer
from support.models import article, programs
from support.models.article import BATCH_SIZE, NODES, HardSigmoid

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # Keras's own, when saving

TESTS = Path(__file__).parents[1]
ZEROS = [np.zeros((BATCH_SIZE, NODES)), np.zeros((BATCH_SIZE, NODES))]
ONES = [np.ones((BATCH_SIZE, NODES)), np.ones((BATCH_SIZE, NODES))]
HIDDEN, CELL, OUT = "lstm", "lstm_1", "out"  # the article's three outputs

Outputs = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def client() -> Iterator[stepwell.Client]:
    saved = {
        kind.value: programs.saved(
            f"stateful-{kind.value}",
            functools.partial(article.stateful_model, kind),
            ["support.models.article"],
            kept=programs.kept_folder(),
        )
        for kind in HardSigmoid
    }
    server = LocalServer(
        models={name: one.path for name, one in saved.items()},
        extra_args=["--import", "support.models.article"],
        cache_dir=programs.cache_dir(),
        env={"PYTHONPATH": str(TESTS)},
        start_timeout_s=100,
    )
    with server, stepwell.connect(server.address) as client:
        yield client


def step(session: stepwell.Session, x: article.Floats) -> Outputs:
    outputs = session.step(x)
    assert isinstance(outputs, dict)
    return outputs


def mean_of_out(session: stepwell.Session, x: article.Floats) -> float:
    return float(np.mean(step(session, x)[OUT], dtype=np.float64))


@pytest.mark.parametrize("kind", HardSigmoid, ids=lambda kind: kind.value)
def test_the_four_numbers(
    client: stepwell.Client, kind: HardSigmoid, capsys: pytest.CaptureFixture[str]
) -> None:
    x = article.article_input()
    with client.open_session(kind.value, batch_size=BATCH_SIZE) as session:
        first, second = mean_of_out(session, x), mean_of_out(session, x)
        session.reset_states(ZEROS)
        after_zeros = mean_of_out(session, x)
        session.reset_states(ONES)
        after_ones = mean_of_out(session, x)
    with capsys.disabled():
        print(f"\nthe seed over gRPC: {first:.10f} {second:.10f} {after_zeros:.10f} {after_ones:.10f}")
    assert first == pytest.approx(article.FIRST, rel=0, abs=1e-7)
    assert second == pytest.approx(article.SECOND, rel=0, abs=1e-7)
    assert after_zeros == pytest.approx(article.AFTER_ZEROS, rel=0, abs=1e-7)
    assert after_ones == pytest.approx(article.AFTER_ONES, rel=0, abs=1e-7)


def test_the_outputs_have_the_articles_shapes_and_the_state_is_among_them(client: stepwell.Client) -> None:
    with client.open_session("scaled", batch_size=BATCH_SIZE) as session:
        outputs = step(session, article.article_input())
        hidden, cell = session.get_state().values()
    assert {name: output.shape for name, output in outputs.items()} == {
        HIDDEN: (BATCH_SIZE, NODES),
        CELL: (BATCH_SIZE, NODES),
        OUT: (BATCH_SIZE, 2, 3),
    }
    np.testing.assert_array_equal(outputs[HIDDEN], hidden)
    np.testing.assert_array_equal(outputs[CELL], cell)


def test_a_reset_without_values_is_the_articles_reset_to_zeros(client: stepwell.Client) -> None:
    x = article.article_input()
    with client.open_session("scaled", batch_size=BATCH_SIZE) as session:
        first = step(session, x)
        session.reset_states(ZEROS)
        after_zeros = step(session, x)
        session.reset_states()
        after_reset = step(session, x)
    for name in first:
        np.testing.assert_array_equal(after_zeros[name], first[name])
        np.testing.assert_array_equal(after_reset[name], first[name])


def test_states_may_be_named(client: stepwell.Client) -> None:
    x = article.article_input()
    names = [tensor.name for tensor in client.model("scaled").state]
    with client.open_session("scaled", batch_size=BATCH_SIZE) as session:
        session.reset_states(dict(zip(names, ONES, strict=True)))
        assert mean_of_out(session, x) == pytest.approx(article.AFTER_ONES, rel=0, abs=1e-7)


def test_a_session_may_begin_with_ones(client: stepwell.Client) -> None:
    with client.open_session("scaled", batch_size=BATCH_SIZE, state=ONES) as session:
        assert mean_of_out(session, article.article_input()) == pytest.approx(
            article.AFTER_ONES, rel=0, abs=1e-7
        )
