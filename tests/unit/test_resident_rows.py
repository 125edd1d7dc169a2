"""How many rows of sessions each model keeps ready to step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from stepwell_server.engine.state.resident import ResidentRows
from stepwell_server.process import memory as process_memory
from stepwell_server.process.memory import memory_bytes, memory_limit_bytes
from support.engine.fake_executor import PLAIN
from support.engine.harness import running

LARGE = dataclasses.replace(PLAIN, state=(dataclasses.replace(PLAIN.state[0], shape=(1 << 20,)),))
"""4 MiB of state a row."""


def test_a_name_has_its_own_bound_and_the_others_that_of_every_model() -> None:
    rows = ResidentRows(7, {"a": 9})
    assert (rows.of("a", PLAIN), rows.of("b", PLAIN)) == (9, 7)
    assert ResidentRows(None, {"a": 9}).of("b", PLAIN) == 65_536


def test_models_divide_a_quarter_of_the_memory() -> None:
    memory = memory_bytes()
    row_bytes = LARGE.state_row_bytes + sum(spec.row_bytes for spec in LARGE.outputs)
    for models in (1, 2, 50):
        taken = models * 2 * row_bytes * ResidentRows(models=models).of("m", LARGE)
        assert taken <= memory / 4 or taken == models * 2 * row_bytes, (
            "all their rows together, the copies too"
        )
        assert taken >= memory / 4 - models * 2 * row_bytes
    assert ResidentRows(models=1 << 40).of("m", LARGE) == 1
    assert ResidentRows(models=0).of("m", LARGE) > 0, "all have bounds of their own"


@pytest.mark.parametrize(
    ("own", "limits", "limit"),
    [
        ("0::/\n", {".": "134217728"}, 1 << 27),  # a container
        ("0::/docker/b19\n", {".": "134217728"}, 1 << 27),  # a container that sees the path of its host
        ("0::/system.slice/stepwell.service\n", {"system.slice/stepwell.service": "134217728"}, 1 << 27),
        ("0::/system.slice/one\n", {"system.slice/one": "max", "system.slice": "134217728"}, 1 << 27),
        ("0::/system.slice/one\n", {"system.slice/one": "67108864", "system.slice": "134217728"}, 1 << 26),
        ("0::/system.slice/one\n", {"system.slice/other": "67108864"}, None),
        ("9:name=systemd:/\n0::/a\n", {"a": "max"}, None),
        (None, {}, None),
    ],
)
def test_rows_fit_into_the_memory_that_a_container_or_unit_may_use(
    own: str | None,
    limits: dict[str, str],
    limit: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for folder, value in limits.items():
        (tmp_path / "tree" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / folder / "memory.max").write_text(value + "\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    whole = ResidentRows().of("m", LARGE)
    monkeypatch.setattr(process_memory, "CGROUPS", tmp_path / "tree")
    monkeypatch.setattr(process_memory, "OWN_CGROUP", tmp_path / "own")
    assert memory_limit_bytes() == limit
    rows = ResidentRows().of("m", LARGE)
    if limit is None:
        assert rows >= whole
    else:
        assert rows < whole
        assert 2 * rows * LARGE.state_row_bytes <= limit / 4


@pytest.mark.stores("memory")
async def test_each_model_of_an_engine_has_its_bound() -> None:
    async with running({"a": PLAIN, "b": PLAIN}, resident_rows=ResidentRows(3, {"b": 5})) as at:
        assert [one.max_resident_rows for one in at.engine.stats()] == [3, 5]
