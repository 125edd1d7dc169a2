"""The table of layers in docs/explanation/models.md: each of its models equals Keras, and its row is what the program has."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stepwell_server.compile.errors import NotCausalError
from support.models import layers
from support.models.compiled import Compiled
from support.models.programs import compile_model
from support.samples import one_in

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script that writes the table."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("layer_table")


@pytest.mark.parametrize("row", one_in(12, layers.ROWS), ids=lambda row: " ".join(row.code))
def test_a_row_of_the_table_is_true(row: layers.Row, table: Any, tmp_path: Path) -> None:
    model = layers.build(row)
    model.save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras")
    assert table.line_of(row, program) in table.PAGE.read_text().splitlines()
    compiled = Compiled("table", model, program)
    inputs = compiled.draw(3, 2, 280)
    stepped = compiled.stepped(inputs, 280)
    for name, expected in compiled.keras(inputs).items():
        given = stepped[name]
        scale = max(1.0, float(np.max(np.abs(expected))))
        np.testing.assert_allclose(given, expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("units", [26, pytest.param(40, marks=pytest.mark.slow)])
def test_the_size_of_a_layer_does_not_matter(units: int, tmp_path: Path) -> None:
    """TensorFlow makes zeros of fewer than 1,000 elements in another way: the rows of a trace must not decide that."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    x = keras.Input((None, 3))
    keras.Model(x, keras.layers.LSTM(units, name="lstm")(x)).save(tmp_path / "model.keras")
    assert {spec.name: spec.shape for spec in compile_model(tmp_path / "model.keras").state} == {
        "lstm/h": (units,),
        "lstm/c": (units,),
    }


@pytest.mark.slow
def test_the_page_on_the_proof_is_true(tmp_path: Path) -> None:
    """The model of its table has the states that it names, and the refusal has its words."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    def saved(padding: str) -> Path:
        x = keras.Input((None, 4))
        y = keras.layers.Conv1D(64, 3, padding=padding, name="conv")(x)
        keras.Model(x, keras.layers.GRU(3, name="gru")(y)).save(tmp_path / f"{padding}.keras")
        return tmp_path / f"{padding}.keras"

    program = compile_model(saved("causal"))
    assert {spec.name: spec.window for spec in program.state} == {"conv/last": 2, "gru/h": 0}
    page = (ROOT / "docs" / "explanation" / "proof.md").read_text()
    (message,) = re.findall(r"^```text\n(.*)\n```$", page, re.MULTILINE)
    with pytest.raises(NotCausalError, match=re.escape(message)):
        compile_model(saved("same"))


def test_a_table_that_is_out_of_date_is_found(
    table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "models.md"
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "lines", lambda _: iter(["| a |", "| - |", "| 7 |"]))
    page.write_text(f"Before.\n\n{table.MARK}\n\n| a |\n| - |\n| 6 |\n\nAfter.\n")
    assert table.main(["--check"]) == 1
    assert "should be in models.md: | 7 |" in capsys.readouterr().out
    assert table.main([]) == table.main(["--check"]) == 0
    assert page.read_text() == f"Before.\n\n{table.MARK}\n\n| a |\n| - |\n| 7 |\n\nAfter.\n"


def test_a_check_compiles_one_row_in_four_and_new_ones(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[layers.Row] = []

    def build(row: layers.Row) -> Any:
        compiled.append(row)
        return SimpleNamespace(save=lambda _: None)

    monkeypatch.setattr(table, "programs", SimpleNamespace(compile_model=lambda _: None))
    monkeypatch.setattr(layers, "build", build)
    monkeypatch.setattr(table, "line_of", lambda row, _: f"| {table.code_of(row)} | compiled |")
    is_new = layers.ROWS[2]
    trusted = [f"| {table.code_of(row)} | trusted |" for row in layers.ROWS if row is not is_new]
    found = list(table.lines(trusted))[2:]
    assert compiled == [row for place, row in enumerate(layers.ROWS) if row is is_new or place % 4 == 0]
    assert [line.endswith("| compiled |") for line in found] == [row in compiled for row in layers.ROWS]
