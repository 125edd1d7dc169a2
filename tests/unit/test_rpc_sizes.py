"""The size of a reply is known before anything is changed."""

from __future__ import annotations

import numpy as np
import pytest

from stepwell_server.engine.api import Select
from stepwell_server.errors import MessageTooLarge, ModelNotFound
from stepwell_server.rpc.sizes import ReplySizes
from support.fake_engine import MODEL, FakeEngine

_LIMIT = 1 << 20
_OUTPUTS = 1024  # 4096 bytes for each row and time step


@pytest.fixture
async def sizes() -> ReplySizes:
    engine = FakeEngine(_OUTPUTS)
    await engine.open_session(MODEL, session_id="a")
    return ReplySizes(engine, _LIMIT)  # type: ignore[arg-type]


def _x(*shape: int) -> dict[str, np.ndarray]:
    return {"": np.zeros(shape, np.float32)}


async def test_time_steps_count(sizes: ReplySizes) -> None:
    assert 255 * 4096 < sizes.step(["a"], _x(1, 255, 2), Select.ALL) <= _LIMIT
    with pytest.raises(
        MessageTooLarge, match=r"the reply to the step must be at most 1048576 bytes; it would be"
    ):
        sizes.step(["a"], _x(1, 256, 2), Select.ALL)


async def test_what_is_not_sent_does_not_count(sizes: ReplySizes) -> None:
    assert sizes.step(["a"], _x(1, 10_000, 2), Select.LAST) < 5000
    assert sizes.step(["a"], _x(1, 10_000, 2), Select.NONE) < 1000


async def test_features_are_not_taken_for_time_steps_where_it_matters(sizes: ReplySizes) -> None:
    assert sizes.step(["a"], _x(1, 10_000), Select.ALL) < 5000


async def test_the_first_session_that_is_there_tells_the_model(sizes: ReplySizes) -> None:
    assert sizes.step(["gone"], _x(1, 256, 2), Select.ALL) < 1000
    with pytest.raises(MessageTooLarge):
        sizes.step(["gone", "a"], _x(2, 256, 2), Select.ALL)


@pytest.mark.parametrize("shape", [(), (0, 2), (3,)])
async def test_shapes_that_the_engine_will_refuse_pass(sizes: ReplySizes, shape: tuple[int, ...]) -> None:
    sizes.step(["a"], _x(*shape), Select.ALL)


async def test_predictions(sizes: ReplySizes) -> None:
    sizes.predict(MODEL, _x(1, 200, 2))
    with pytest.raises(MessageTooLarge, match="the reply to the prediction"):
        sizes.predict(MODEL, _x(2, 200, 2))
    with pytest.raises(ModelNotFound):
        sizes.predict("other", _x(1, 1, 2))


async def test_a_model_is_not_described_for_each_call(
    sizes: ReplySizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine counts a model's sessions to describe it, in the store where it must."""
    asked: list[str] = []
    monkeypatch.setattr(FakeEngine, "model", lambda _, name: asked.append(name))
    monkeypatch.setattr(FakeEngine, "models", lambda _: asked.append("all"))
    sizes.predict(MODEL, _x(1, 200, 2))
    sizes.step(["a"], _x(1, 255, 2), Select.ALL)
    assert asked == []
