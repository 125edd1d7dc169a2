"""What commands print: for a terminal, for a pipe, and as JSON."""

from __future__ import annotations

import io
import json
import re
import sys

import numpy as np
import pytest

from stepwell._state.infos import TensorInfo
from stepwell.cli.toolkit import render


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watch(monkeypatch: pytest.MonkeyPatch, stream: str = "stdout") -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(sys, stream, screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


def test_a_table_into_a_pipe_is_plain_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 300

    render.print_table(
        ("ID", "N", "SHAPES"), [("[b]a[/b]", "7", "h (1)\nc (1)"), (long, "12", "")], right=("N",)
    )

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "N", "SHAPES"]
    assert lines[1].split(maxsplit=2) == ["[b]a[/b]", "7", "h (1); c (1)"]
    assert lines[2].split() == [long, "12"]
    assert all(line == line.rstrip() and "\x1b" not in line for line in lines)


def test_nothing_in_a_cell_is_obeyed_by_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_watched in (False, True):
        with monkeypatch.context() as patch:
            stream = watch(patch) if is_watched else io.StringIO()
            patch.setattr(sys, "stdout", stream)
            render.print_table(("ID",), [("é\x1b]0;x\x07\x9b2J",)])
            render.print_facts([("id", "é\x1b]0;x\x07\x9b2J")])
        shown = stream.getvalue()
        assert shown.count(r"é\x1b]0;x\x07\x9b2J") == 2
        assert "\x1b]" not in shown
        assert "\x9b" not in shown


def test_a_table_on_a_terminal_fits_it_and_has_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)

    render.print_table(("ID", "WHY"), [("a", "word " * 40)])

    assert "\x1b[1m" in terminal.getvalue()
    assert len(terminal.getvalue().splitlines()) > 4


def test_ten_thousand_rows_are_not_for_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take seconds."""
    monkeypatch.setattr(render, "print_rich", None)
    rows = [(f"user-{n}", "forecast", str(n)) for n in range(10_000)]
    for screen in (watch(monkeypatch), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", screen)

        render.print_table(("SESSION", "MODEL", "REVISION"), rows, right=("REVISION",))

        lines = screen.getvalue().splitlines()
        assert (len(lines), lines[0]) == (10_001, "SESSION    MODEL     REVISION")
        assert lines[8] == "user-7     forecast         7"


def test_wide_characters_are_counted_as_they_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_table(("ID", "N"), [("日本", "1"), ("abcd", "2")])

    assert capsys.readouterr().out == "ID    N\n日本  1\nabcd  2\n"


def test_a_long_text_is_shortened_on_a_terminal_for_all_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "user-" + "x" * 246 + "-last"
    assert render.short_text(long) == long

    watch(monkeypatch)
    short = render.short_text(long)
    assert re.fullmatch(r"user-x+\.\.\.x+-last", short)
    assert len(short) == render.MAX_PADDED_WIDTH
    assert render.short_text("x" * 48) == "x" * 48


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")

    render.print_table(("ID",), [("a",)])

    assert "\x1b[3" not in terminal.getvalue()


def test_a_shape_has_the_axes_that_calls_give_it() -> None:
    assert render.shape_text(TensorInfo("x", "float32", (3,), temporal=True)) == "x float32 (B, T, 3)"
    assert (
        render.shape_text(TensorInfo("lstm/h", "float32", (64,), temporal=False)) == "lstm/h float32 (B, 64)"
    )
    assert render.shape_text(TensorInfo("token", "int32", (), temporal=True)) == "token int32 (B, T)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0.4, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (192, "3 min 12 s"),
        (3600 * 2 + 299, "2 h 4 min"),
        (86400 * 400 + 3599, "400 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert render.duration_text(seconds) == text


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint64", "bool"])
def test_json_values_come_back_as_they_were(dtype: str) -> None:
    array = np.random.default_rng(7).integers(0, 2, (2, 3)).astype(dtype)
    if array.dtype.kind == "f":
        array = np.random.default_rng(7).random((2, 3)).astype(dtype)

    document = json.loads(json.dumps(render.array_json(array), allow_nan=False))

    assert (document["dtype"], document["shape"]) == (dtype, [2, 3])
    np.testing.assert_array_equal(np.asarray(document["values"], dtype), array)


def test_json_has_words_for_what_it_has_no_number_for() -> None:
    array = np.array([[1.5, np.nan], [np.inf, -np.inf]], np.float32)

    assert render.json_values(array) == [[1.5, "NaN"], ["Infinity", "-Infinity"]]


def test_json_text_keeps_ids_readable(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_json({"session_id": "Zoë"})

    assert capsys.readouterr().out == '{"session_id": "Zoë"}\n'


def test_a_long_array_is_whole_in_a_pipe_and_short_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.zeros((1, 1000), np.float32)
    assert render.array_text(array).count("0.") == 1000

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "..." in render.array_text(array)


def test_a_summary_says_how_a_state_is() -> None:
    assert render.summary_cells(np.array([[0.0, -1.0, 4.0]], np.float32)) == ("-1", "1", "4", "1 of 3")


def test_nobody_watching_sees_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with render.working("Stepping"):
        pass

    assert capsys.readouterr().err == ""


def test_someone_watching_sees_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = watch(monkeypatch, "stderr")

    with render.working("Stepping"):
        pass

    assert "Stepping" in screen.getvalue()


def test_records_are_blocks_where_the_terminal_is_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")

    render.print_records(("MODEL", "STATE"), [("a", "h (1)\nc (1)"), ("b", "word " * 20)])

    text = re.sub(r"\x1b\[\d*m", "", terminal.getvalue())
    blocks = [[line.split() for line in block.splitlines()] for block in text.split("\n\n")]
    facts = [[words for words in block if words] for block in blocks]
    assert ["model", "a"] in facts[0]
    assert ["state", "h", "(1)"] in facts[0]
    assert any(["model", "b"] in block for block in facts[1:])


def test_records_are_a_table_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = watch(monkeypatch)

    render.print_records(("MODEL", "STATE"), [("a", "h (1)")])

    assert "MODEL" in terminal.getvalue()
