"""Plots of tapes, drawn for real: their data, their labels, and that nothing else of matplotlib changes."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from stepwell import InvalidInputError, Tape, plot
from stepwell._tape.frames import Frames, Members
from stepwell._tape.marks import MarkKind
from stepwell._tape.reel import Reel, Subject

mpl.use("Agg")
import matplotlib.pyplot as plt

UNITS = 6


def counts(*numbers: int) -> Any:
    return np.array(numbers, np.uint64)


class Recorder:
    """Makes a tape of a session with random states."""

    def __init__(self, rows: int = 1, position: int = 0, max_steps: int | None = None) -> None:
        subject = Subject("forecast", "f", rows, False, counts(0), counts(position), counts(1))
        self.reel = Reel(subject, "all", max_steps)
        self.rows, self.revision, self.position = rows, 0, position
        self.values: list[Any] = []

    def step(self, count: int, states: Any = None, units: int = UNITS) -> None:
        rng = np.random.default_rng()
        h = rng.standard_normal((count, self.rows, units)) if states is None else states
        self.values.extend(h)
        self.revision += 1
        members = Members(
            None, counts(self.revision), counts(self.position), counts(self.position + count), counts(1)
        )
        self.position += count
        own = {"lstm/h": h, "conv/h": rng.standard_normal((count, self.rows, 2, 2))}
        self.reel.append(Frames(count, members, None, None, {}, {}, own))

    def reset(self, kind: MarkKind = "reset", rows: list[int] | None = None) -> None:
        self.revision += 1
        before, self.position = self.position, 0 if rows is None else self.position
        members = Members(None, counts(self.revision), counts(before), counts(self.position), counts(1))
        self.reel.mark(kind, None if rows is None else np.array(rows), members)

    @property
    def tape(self) -> Tape:
        return Tape(self.reel.content)

    @property
    def h(self) -> Any:
        return np.stack(self.values)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def drawn(ax: Any) -> Any:
    """Draws the figure, where errors of layout and fonts come out."""
    ax.figure.savefig(io.BytesIO(), format="png", dpi=40)
    return ax


def marks_of(ax: Any) -> list[tuple[float, str]]:
    return [
        (line.get_xdata()[0], line.get_linestyle()) for line in ax.lines if len(set(line.get_xdata())) == 1
    ]


def two_parts(**options: Any) -> Recorder:
    """Ten time steps, a reset, and eight more."""
    recorder = Recorder(**options)
    recorder.step(10)
    recorder.reset()
    recorder.step(8)
    return recorder


def test_states_are_a_heat_map_of_units_by_time() -> None:
    recorder = two_parts()
    recorder.reset("set")
    recorder.step(2)
    ax = drawn(plot.states(recorder.tape))
    image = ax.images[0]
    assert np.allclose(image.get_array(), recorder.h[:, 0].T)
    assert image.get_extent() == [-0.5, 19.5, UNITS - 0.5, -0.5]
    greatest = np.abs(recorder.h).max()
    assert np.allclose(image.get_clim(), (-greatest, greatest))
    assert marks_of(ax) == [(9.5, "-"), (17.5, "--")]
    assert [text.get_text() for text in ax.texts] == ["reset", "set"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == (
        "time step",
        "unit",
        "lstm/h of forecast",
    )
    assert image.colorbar.ax.get_ylabel() == "lstm/h"


def test_states_of_a_row_with_missing_values_sorted_and_dropped() -> None:
    recorder = Recorder(rows=2, max_steps=5)
    states = np.random.default_rng().standard_normal((8, 2, UNITS))
    states[4, 1] = np.nan
    recorder.step(8, states)
    recorder.reset(rows=[0])
    ax = drawn(plot.states(recorder.tape, row=1, sort=True, limit=2.0))
    shown = states[3:, 1]
    order = np.argsort(np.nan_to_num(shown, nan=-np.inf).argmax(axis=0), kind="stable")
    image = ax.images[0]
    assert np.allclose(image.get_array().filled(np.nan), shown[:, order].T, equal_nan=True)
    assert (image.get_clim(), image.get_extent()[:2]) == ((-2.0, 2.0), [2.5, 7.5])
    assert marks_of(ax) == []  # of the other row
    assert ax.get_title(loc="left") == "lstm/h of forecast, row 1"
    assert image.cmap(np.ma.masked_invalid([np.nan]))[0][:3] == pytest.approx((0.82,) * 3)


def test_a_tensor_of_several_axes_has_numbered_units() -> None:
    recorder = two_parts()
    ax = drawn(plot.states(recorder.tape, "conv/h"))
    assert np.allclose(ax.images[0].get_array(), recorder.tape.states["conv/h"].reshape(18, 4).T)


@pytest.mark.slow
def test_a_thousand_steps_of_a_thousand_units() -> None:
    recorder = Recorder()
    for _ in range(20):
        recorder.step(50, units=1000)
        recorder.reset()
    tape = recorder.tape
    for ax in (plot.states(tape), plot.traces(tape), plot.pca(tape)):
        drawn(ax)
    ax = plot.states(tape)
    assert np.asarray(ax.images[0].get_array()).shape == (1000, 1000)
    assert len(marks_of(ax)) == 20
    assert 5 < len(ax.texts) <= 20


def test_traces_are_interrupted_at_resets() -> None:
    recorder = two_parts()
    ax = drawn(plot.traces(recorder.tape, units=[4, 0]))
    assert [line.get_label() for line in ax.lines[:2]] == ["unit 4", "unit 0"]
    x, y = ax.lines[0].get_data()
    assert np.isnan(x).nonzero()[0].tolist() == np.isnan(y).nonzero()[0].tolist() == [10]
    assert x[~np.isnan(x)].tolist() == list(range(18))
    assert np.allclose(y[~np.isnan(y)], recorder.h[:, 0, 4])
    assert marks_of(ax) == [(9.5, "-")]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time step", "lstm/h")


def test_traces_choose_the_units_that_vary_most() -> None:
    recorder = Recorder()
    scales = np.array([0.1, 5, 3, 0, 4, 2, 6])
    recorder.step(50, np.random.default_rng().standard_normal((50, 1, 7)) * scales)
    ax = drawn(plot.traces(recorder.tape))
    assert [line.get_label() for line in ax.lines] == [f"unit {i}" for i in (1, 2, 4, 5, 6)]


def test_distance_is_aligned_by_position_after_the_last_reset() -> None:
    one, other = two_parts(), Recorder(position=3)
    missing = np.random.default_rng().standard_normal((9, 1, UNITS))
    missing[1] = np.nan
    other.step(9, missing)
    ax = drawn(plot.distance(one.tape, other.tape, "lstm/h", label="fork"))
    x, y = ax.lines[0].get_data()
    assert x.tolist() == [4, 6, 7, 8]  # 1 to 8 on the one, 4 to 12 on the other, 5 is missing
    theirs = other.h[[0, 2, 3, 4], 0]
    assert np.allclose(y, np.linalg.norm(one.h[[13, 15, 16, 17], 0] - theirs, axis=1))
    assert ax.get_ylim()[0] == 0
    assert ax.get_ylabel() == "distance of lstm/h"
    assert ax.get_legend().get_texts()[0].get_text() == "fork"
    # a slice compares another part, and without a name all tensors count
    ax = drawn(plot.distance(one.tape[:10], other.tape))
    x, y = ax.lines[0].get_data()
    assert x.tolist() == [4, 6, 7, 8, 9, 10]
    flat = [
        np.concatenate([array[:, 0].reshape(len(array), -1) for array in each.tape.states.values()], axis=1)
        for each in (one, other)
    ]
    assert np.allclose(y, np.linalg.norm(flat[0][[3, 5, 6, 7, 8, 9]] - flat[1][[0, 2, 3, 4, 5, 6]], axis=1))


def test_pca_shows_the_plane_of_all_tapes() -> None:
    """States on a plane in the space of the units come out with their distances, at any scale of the rest."""
    rng = np.random.default_rng()
    plane = np.linalg.qr(rng.standard_normal((UNITS, 2)))[0]
    points = [rng.standard_normal((n, 2)) * (5, 2) for n in (12, 7)]
    recorders = [Recorder(), Recorder()]
    for recorder, each in zip(recorders, points, strict=True):
        recorder.step(len(each), (each @ plane.T + 0.3)[:, None])
    ax = drawn(plot.pca(*[each.tape for each in recorders], labels=["a", "b"]))
    paths = [line.get_xydata() for line in ax.lines if line.get_label() in ("a", "b")]
    assert [len(path) for path in paths] == [12, 7]
    shown, true = np.concatenate(paths), np.concatenate(points)
    for i in range(19):
        assert np.allclose(
            np.linalg.norm(shown - shown[i], axis=1), np.linalg.norm(true - true[i], axis=1), atol=1e-6
        )
    variance = np.linalg.eigvalsh(np.cov(true.T))[::-1]
    assert ax.get_xlabel() == f"first component ({variance[0] / variance.sum():.0%} of the variance)"
    assert ax.get_ylabel() == f"second component ({variance[1] / variance.sum():.0%})"
    ends = {line.get_label(): line.get_xydata()[0] for line in ax.lines[-2:]}
    assert np.allclose(ends["_start"], paths[1][0])
    assert np.allclose(ends["_end"], paths[1][-1])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_pca_is_the_same_each_time_and_breaks_at_resets() -> None:
    tape = two_parts().tape
    first, second = (np.asarray(plot.pca(tape).lines[0].get_xydata()) for _ in range(2))
    assert np.array_equal(first, second, equal_nan=True)
    assert np.isnan(first).any(axis=1).nonzero()[0].tolist() == [10]


DRAW: dict[str, Callable[..., Any]] = {
    "states": plot.states,
    "traces": plot.traces,
    "distance": lambda tape, **options: plot.distance(tape, tape, **options),
    "pca": plot.pca,
}


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_it_draws_on_the_given_axes_and_changes_nothing_else(draw: Callable[..., Any]) -> None:
    tape = two_parts().tape
    figure, (left, right) = plt.subplots(1, 2, layout="constrained")
    before, numbers = dict(mpl.rcParams), plt.get_fignums()
    current = plt.gca()
    assert draw(tape, ax=left) is left
    drawn(left)
    assert dict(mpl.rcParams) == before
    assert (plt.get_fignums(), plt.gca()) == (numbers, current)
    assert not right.has_data()
    assert left.figure is figure


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_a_constant_state_can_be_drawn(draw: Callable[..., Any]) -> None:
    recorder = Recorder()
    recorder.step(4, np.zeros((4, 1, UNITS)))
    drawn(draw(recorder.tape))


def stateless() -> Tape:
    reel = Reel(Subject("forecast", "f", 1, False, counts(0), counts(0), counts(1)), "none")
    members = Members(None, counts(1), counts(0), counts(1), counts(1))
    reel.append(Frames(1, members, None, None, {"x": np.ones((1, 1, 3))}, {}, {}))
    return Tape(reel.content)


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_what_cannot_be_drawn_is_refused(draw: Callable[..., Any]) -> None:
    tape = two_parts().tape
    for wrong, options, message in (
        (stateless(), {}, r"a tape must have states: record it with states=True or states='last'"),
        (tape[:0], {}, "a tape must have at least one time step; it has none"),
        (tape, {"tensor": "gru/h"}, r"tensor must be one of \['lstm/h', 'conv/h'\]; got 'gru/h'"),
        (tape, {"row": 1}, "row must be from 0 to 0; got 1"),
        (tape, {"row": True}, "row must be from 0 to 0; got True"),
        ("tape", {}, r"a tape must be a stepwell\.Tape; got str"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            draw(wrong, **options)
    assert plt.get_fignums() == []


def test_wrong_arguments_are_refused() -> None:
    tape, wide, late = two_parts().tape, Recorder(), Recorder(position=100)
    wide.step(3, units=9)
    late.step(3)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: plot.states(tape, limit=0), "limit must be greater than 0; got 0"),
        (lambda: plot.states(tape, limit="1"), "limit must be greater than 0; got '1'"),  # type: ignore[arg-type]
        (lambda: plot.states(tape, ["lstm/h"]), r"tensor must be one of \['lstm/h'"),  # type: ignore[arg-type]
        (lambda: plot.traces(tape, units=6), "units must be a list of numbers; got 6"),  # type: ignore[arg-type]
        (lambda: plot.traces(tape, units=[0, 6]), "units must be numbers from 0 to 5; got 6"),
        (lambda: plot.traces(tape, units=[]), "units must be numbers from 0 to 5; got none"),
        (lambda: plot.traces(tape, units=[0.5]), "units must be numbers from 0 to 5; got 0.5"),  # type: ignore[list-item]
        (
            lambda: plot.distance(tape, wide.tape, "lstm/h"),
            r"'lstm/h' must have the same units .*; got \[6, 9\]",
        ),
        (lambda: plot.distance(tape, late.tape), "a position in common; .* 1 to 8 and 101 to 103"),
        (plot.pca, "pca needs at least one tape"),
        (lambda: plot.pca(tape, wide.tape), r"'lstm/h' must have the same units"),
        (lambda: plot.pca(tape, labels=["a", "b"]), "labels must name each of the 1 tapes; got 2"),
        (lambda: plot.pca(tape[:1]), "at least two time steps with states and two units; got 1 and 6"),
    ]
    for call, message in calls:
        with pytest.raises(InvalidInputError, match=message):
            call()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_without_matplotlib_the_extra_is_named(
    draw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        ModuleNotFoundError, match=r"stepwell\.plot\.\w+ needs matplotlib, .*: pip install '\.\[plot\]'"
    ):
        draw(two_parts().tape)
