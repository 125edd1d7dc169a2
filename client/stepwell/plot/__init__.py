"""Plots of the states on tapes, with matplotlib, which the extra ``plot`` installs.

Each function draws on `ax` and returns it. Without `ax` it makes a figure with pyplot, so that a notebook shows it.
No function changes matplotlib's settings.

::

    with session.record() as tape:
        session.step(x)
    stepwell.plot.states(tape)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stepwell._state.tables import imported
from stepwell._tape.marks import Mark
from stepwell._tape.tape import Tape
from stepwell.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["distance", "pca", "states", "traces"]

Floats = npt.NDArray[np.float64]

_COLORS = "RdBu_r"
_MISSING = "0.82"
_LINES = {"reset": "-", "set": "--", "gap": ":", "version": "-."}
"""The line of each kind of mark."""
_LABEL_SHARE = 0.06
"""Labels of marks are at least this share of the width apart."""
_DOTTED_STEPS = 60
"""Lines of fewer time steps show a dot for each."""
_NAMED_UNITS = 10


def states(
    tape: Tape,
    tensor: str | None = None,
    *,
    row: int = 0,
    limit: float | None = None,
    sort: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draws a state tensor as a heat map: time from left to right, units from top to bottom.

    Colours diverge around zero: blue below, red above. Grey values are missing. Vertical lines mark resets of the row
    and other events.

    Args:
        tape: A tape with states.
        tensor: Name of the state tensor, for example "lstm/h"; None: the first one. Units of tensors with several axes
            are numbered in C order.
        row: Row of the tape.
        limit: The value of the darkest colours; None: the greatest absolute value on the tape.
        sort: Sort the units by the time step at which they are greatest, instead of by their number.
        ax: Axes to draw on; None: new ones.

    Raises:
        InvalidInputError: The tape has no states or no time steps, or an argument breaks a rule.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> with session.record() as tape:
        ...     y = session.step(np.ones((1, 10, 3), np.float32))
        >>> stepwell.plot.states(tape).get_ylabel()
        'unit'
    """
    name, values = _tensor(tape, tensor, row)
    _check_limit(limit)
    scale = limit or float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    if sort:
        values = values[:, np.argsort(np.nan_to_num(values, nan=-np.inf).argmax(axis=0), kind="stable")]
    ax = _axes(ax, "stepwell.plot.states", (9.0, 3.6))
    count, units = values.shape
    start = tape.dropped
    colors = imported("matplotlib", "stepwell.plot.states").colormaps[_COLORS].with_extremes(bad=_MISSING)
    image = ax.imshow(
        np.ma.masked_invalid(values.T),
        aspect="auto",
        cmap=colors,
        vmin=-scale,
        vmax=scale,
        interpolation="nearest" if count <= 500 and units <= 200 else "auto",
        extent=(start - 0.5, start + count - 0.5, units - 0.5, -0.5),
    )
    _figure(ax).colorbar(image, ax=ax, label=name, pad=0.015, fraction=0.04)
    _whole_numbers(ax.yaxis, units)
    _whole_numbers(ax.xaxis, count)
    ax.set_xlabel("time step")
    ax.set_ylabel("unit, by the time of its peak" if sort else "unit")
    if sort:
        ax.set_yticks([])
    _mark(ax, tape, row)
    _title(ax, f"{name} of {tape.model}", tape, row)
    return ax


def traces(
    tape: Tape,
    tensor: str | None = None,
    units: Sequence[int] | None = None,
    *,
    row: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draws units of a state tensor as lines over time. Lines are interrupted at resets and other marks.

    Args:
        tape: A tape with states.
        tensor: Name of the state tensor; None: the first one.
        units: Numbers of the units, from 0; None: the five that vary most.
        row: Row of the tape.
        ax: Axes to draw on; None: new ones.

    Raises:
        InvalidInputError: The tape has no states or no time steps, or an argument breaks a rule.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> with session.record() as tape:
        ...     y = session.step(np.ones((1, 10, 3), np.float32))
        >>> [line.get_label() for line in stepwell.plot.traces(tape, units=[0, 3]).lines]
        ['unit 0', 'unit 3']
    """
    name, values = _tensor(tape, tensor, row)
    chosen = _most_varied(values, 5) if units is None else _units(units, values.shape[1])
    ax = _axes(ax, "stepwell.plot.traces", (9.0, 3.2))
    x, broken = _interrupted(values, _breaks(tape, row), tape.dropped)
    marker = "." if len(values) < _DOTTED_STEPS else None
    for unit in chosen:
        ax.plot(x, broken[:, unit], linewidth=1.2, marker=marker, markersize=4, label=f"unit {unit}")
    if len(chosen) <= _NAMED_UNITS:
        _legend(ax)
    ax.set_xlim(tape.dropped - 0.5, tape.dropped + len(values) - 0.5)
    _whole_numbers(ax.xaxis, len(values))
    _over_time(ax, "time step", name)
    _mark(ax, tape, row)
    _title(ax, f"{name} of {tape.model}", tape, row)
    return ax


def distance(
    tape: Tape,
    other: Tape,
    tensor: str | None = None,
    *,
    row: int = 0,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the distance of the states of two tapes, aligned by position: the Euclidean norm of their difference.

    If positions occur several times on a tape, because of resets, those after the last reset count. Take a slice to
    compare another part. Positions that only one of the tapes has, or at which a value is missing, are not drawn.

    Args:
        tape: A tape with states.
        other: Another one of the same model.
        tensor: Name of the state tensor; None: all of them together.
        row: Row of both tapes.
        label: Name of the line in a legend.
        ax: Axes to draw on; None: new ones.

    Raises:
        InvalidInputError: A tape has no states or no time steps, or they have no position in common, or an argument
            breaks a rule.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> with session.fork() as twin, session.record() as tape, twin.record() as other:
        ...     y = session.step(np.zeros((1, 10, 3), np.float32))
        ...     z = twin.step(np.ones((1, 10, 3), np.float32))
        >>> len(stepwell.plot.distance(tape, other).lines[0].get_ydata())
        10
    """
    name, positions, norms = _distances(tape, other, tensor, row)
    ax = _axes(ax, "stepwell.plot.distance", (9.0, 3.2))
    marker = "." if len(norms) < _DOTTED_STEPS else None
    ax.plot(positions, norms, linewidth=1.4, marker=marker, markersize=4, label=label)
    if label is not None:
        _legend(ax)
    ax.set_ylim(bottom=0)
    _whole_numbers(ax.xaxis, len(norms))
    _over_time(ax, "position: time steps since the reset", f"distance of {name}")
    ax.set_title(f"Distance of two states of {tape.model}", loc="left")
    return ax


def pca(
    *tapes: Tape,
    tensor: str | None = None,
    row: int = 0,
    labels: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the states of one or more tapes as paths on a plane: their first two principal components.

    The plane is that of all tapes together. A ring is the first time step of a tape, a disc its last one. Paths are
    interrupted at resets and other marks.

    Args:
        tapes: Tapes of the same model, with states.
        tensor: Name of the state tensor; None: the first one.
        row: Row of each tape.
        labels: A name for each tape, for the legend.
        ax: Axes to draw on; None: new ones.

    Raises:
        InvalidInputError: A tape has no states or no time steps, there are fewer than two time steps or units, or an
            argument breaks a rule.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> with session.record() as tape:
        ...     y = session.step(np.ones((1, 10, 3), np.float32))
        >>> stepwell.plot.pca(tape).get_xlabel().startswith("first component")
        True
    """
    if not tapes:
        raise InvalidInputError("pca needs at least one tape; got none")
    if labels is not None and len(labels) != len(tapes):
        raise InvalidInputError(f"labels must name each of the {len(tapes)} tapes; got {len(labels)}")
    named = [_tensor(tape, tensor, row) for tape in tapes]
    name = named[0][0]
    parts = [values for _, values in named]
    _same_units(name, parts)
    planes, shares = _components(parts)
    ax = _axes(ax, "stepwell.plot.pca", (6.4, 5.2))
    for i, (tape, plane) in enumerate(zip(tapes, planes, strict=True)):
        _, path = _interrupted(plane, _breaks(tape, row), 0)
        known = plane[~np.isnan(plane).any(axis=1)]
        line = ax.plot(*path.T, linewidth=1.2, marker=".", markersize=4, alpha=0.8)[0]
        line.set_label(labels[i] if labels is not None else f"tape {i + 1}")
        color = line.get_color()
        ends: dict[str, Any] = {
            "marker": "o",
            "linestyle": "none",
            "color": color,
            "markersize": 8,
            "zorder": 3,
        }
        ax.plot(*known[:1].T, **ends, markerfacecolor="white", markeredgewidth=1.6, label="_start")
        ax.plot(*known[-1:].T, **ends, label="_end")
    _legend(ax, "ring: start\ndisc: end")
    ax.set_aspect("equal", adjustable="datalim")
    _over_time(
        ax, f"first component ({shares[0]:.0%} of the variance)", f"second component ({shares[1]:.0%})"
    )
    ax.set_title(f"{name} of {tapes[0].model}: principal components", loc="left")
    return ax


# What the tapes have.


def _tensor(tape: object, tensor: object, row: object) -> tuple[str, Floats]:
    """Name and values of a state tensor of one row, (time, units)."""
    arrays = _states(tape, row)
    name: object = next(iter(arrays)) if tensor is None else tensor
    if not isinstance(name, str) or name not in arrays:
        raise InvalidInputError(f"tensor must be one of {list(arrays)}; got {tensor!r:.100}")
    return name, arrays[name]


def _states(tape: object, row: object) -> dict[str, Floats]:
    """The state tensors of one row, (time, units) each."""
    if not isinstance(tape, Tape):
        raise InvalidInputError(f"a tape must be a stepwell.Tape; got {type(tape).__name__}")
    arrays = tape.states
    if not len(tape):
        raise InvalidInputError("a tape must have at least one time step; it has none")
    if not arrays:
        raise InvalidInputError("a tape must have states: record it with states=True or states='last'")
    rows = next(iter(arrays.values())).shape[1]
    if isinstance(row, bool) or not isinstance(row, int | np.integer) or not 0 <= row < rows:
        raise InvalidInputError(f"row must be from 0 to {rows - 1}; got {row!r:.100}")
    return {name: array[:, row].reshape(len(array), -1).astype(np.float64) for name, array in arrays.items()}


def _check_limit(limit: object) -> None:
    if limit is not None and not (isinstance(limit, int | float | np.number) and limit > 0):
        raise InvalidInputError(f"limit must be greater than 0; got {limit!r:.100}")


def _units(units: Sequence[int], count: int) -> list[int]:
    if not np.iterable(units):
        raise InvalidInputError(f"units must be a list of numbers; got {units!r:.100}")
    chosen: list[Any] = list(units)
    wrong = [
        unit
        for unit in chosen
        if isinstance(unit, bool) or not isinstance(unit, int | np.integer) or not 0 <= unit < count
    ]
    if wrong or not chosen:
        got = repr(wrong[0]) if wrong else "none"
        raise InvalidInputError(f"units must be numbers from 0 to {count - 1}; got {got:.100}")
    return chosen


def _most_varied(values: Floats, count: int) -> list[int]:
    known = values[~np.isnan(values).any(axis=1)]
    spread = known.std(axis=0) if len(known) else np.zeros(values.shape[1])
    most: list[int] = np.sort(np.argsort(-spread, kind="stable")[:count]).tolist()
    return most


def _same_units(name: str, parts: Sequence[Floats]) -> None:
    sizes = {part.shape[1] for part in parts}
    if len(sizes) > 1:
        raise InvalidInputError(f"{name!r} must have the same units on all tapes; got {sorted(sizes)}")


def _distances(
    tape: Tape, other: Tape, tensor: str | None, row: int
) -> tuple[str, npt.NDArray[np.int64], Floats]:
    """What is compared, the positions that both tapes have, and the distance at each."""
    names = list(_states(tape, row)) if tensor is None else [tensor]
    parts: list[Floats] = []
    positions: list[npt.NDArray[np.int64]] = []
    for each in (tape, other):
        parts.append(np.concatenate([_tensor(each, name, row)[1] for name in names], axis=1))
        counts = each.positions if each.positions.ndim == 1 else each.positions[:, row // each.batch_size]
        own = counts.astype(np.int64)
        # Positions rise by one until a reset.
        last = int(np.flatnonzero(np.diff(own, prepend=own[0] - 1) < 1)[-1:].sum())
        parts[-1] = parts[-1][last:]
        positions.append(own[last:])
    _same_units(names[0], parts)
    common, here, there = np.intersect1d(positions[0], positions[1], return_indices=True)
    norms = np.linalg.norm(parts[0][here] - parts[1][there], axis=1)
    known = ~np.isnan(norms)
    if not known.any():
        raise InvalidInputError(
            f"the tapes must have states at a position in common; the last parts have positions {positions[0][0]} to "
            f"{positions[0][-1]} and {positions[1][0]} to {positions[1][-1]}"
        )
    return ("all states" if tensor is None else tensor), common[known], norms[known]


def _components(parts: Sequence[Floats]) -> tuple[list[Floats], Floats]:
    """The first two principal components of each part, (time, 2), and their shares of the variance."""
    whole = np.concatenate(parts)
    known = whole[~np.isnan(whole).any(axis=1)]
    if min(known.shape) < 2:
        raise InvalidInputError(
            f"pca needs at least two time steps with states and two units; got {known.shape[0]} and {known.shape[1]}"
        )
    mean = known.mean(axis=0)
    _, sizes, axes = np.linalg.svd(known - mean, full_matrices=False)
    # The sign of a component is arbitrary: its greatest weight becomes positive, so that equal states look equal.
    signs = np.sign(axes[[0, 1], np.abs(axes[:2]).argmax(axis=1)])
    variance = sizes**2 / (np.sum(sizes**2) or 1.0)
    return [(part - mean) @ (axes[:2] * signs[:, None]).T for part in parts], variance[:2]


def _marks(tape: Tape, row: int) -> list[Mark]:
    return [mark for mark in tape.marks if row in mark.rows]


def _breaks(tape: Tape, row: int) -> list[int]:
    """Indexes of time steps that do not continue the ones before."""
    return sorted(
        {mark.index for mark in _marks(tape, row) if 0 < mark.index < len(tape) and mark.kind != "version"}
    )


def _interrupted(values: Floats, breaks: Sequence[int], start: int) -> tuple[Floats, Floats]:
    """Values and their time steps, with NaN at each break."""
    x = np.arange(start, start + len(values), dtype=np.float64)
    if not breaks:
        return x, values
    return np.insert(x, breaks, np.nan), np.insert(values, breaks, np.nan, axis=0)


# How it looks.


def _axes(ax: Axes | None, what: str, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    pyplot = imported("matplotlib.pyplot", what)
    new: Axes = pyplot.subplots(figsize=size, layout="constrained")[1]
    return new


def _figure(ax: Axes) -> Any:
    return ax.get_figure(root=False)


def _whole_numbers(axis: Any, count: int) -> None:
    """Ticks at whole numbers; matplotlib would put some between them."""
    ticker = imported("matplotlib.ticker", "stepwell.plot")
    axis.set_major_locator(ticker.MaxNLocator(nbins=min(9, max(1, count)), integer=True, min_n_ticks=1))


def _over_time(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(ax: Axes, title: str | None = None) -> None:
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title=title, title_fontsize=8)


def _title(ax: Axes, text: str, tape: Tape, row: int) -> None:
    rows = next(iter(tape.states.values())).shape[1]
    ax.set_title(text if rows == 1 else f"{text}, row {row}", loc="left", pad=18 if ax.texts else None)


def _mark(ax: Axes, tape: Tape, row: int) -> None:
    """Draws the marks as vertical lines, and names those that have room for it above the axes."""
    for place, kinds in _places(_marks(tape, row)):
        x = tape.dropped + place - 0.5
        ax.axvline(x, color="black", linewidth=0.9, linestyle=_LINES[kinds[0]], label=f"_{kinds[0]}")
    room = _LABEL_SHARE * max(1, len(tape))
    free = -np.inf
    for place, kinds in _places(_marks(tape, row)):
        if place >= free:
            text = ", ".join(kinds)
            ax.annotate(
                text,
                (tape.dropped + place - 0.5, 1.0),
                xycoords=ax.get_xaxis_transform(),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                annotation_clip=False,
            )
            free = place + room * max(1.0, len(text) / 6)


def _places(marks: Sequence[Mark]) -> Iterator[tuple[int, list[str]]]:
    """The marks by their place."""
    for place in sorted({mark.index for mark in marks}):
        yield place, [mark.kind for mark in marks if mark.index == place]
