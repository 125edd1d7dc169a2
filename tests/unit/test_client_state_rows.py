"""Rows of a state, states put together, and states as the objects of other libraries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from stepwell import errors
from stepwell._state.rows import Rows
from stepwell._state.state import State
from stepwell._state.tensors import Array
from stepwell._state.trace import TracedStates

ROWS = 4


def state(rows: int = ROWS, fingerprint: str = "f00d", **more: Array) -> State:
    rng = np.random.default_rng(rows)
    tensors: dict[str, Array] = {
        "lstm/h": rng.standard_normal((rows, 3)).astype(np.float32),
        "lstm/c": rng.standard_normal((rows, 3)).astype(np.float32),
        "conv/h": rng.standard_normal((rows, 2, 2)).astype(np.float16),
        "count": np.arange(rows),
    }
    return State(tensors | more, model="m", fingerprint=fingerprint, batch_size=rows, revision=7, position=9)


@pytest.mark.parametrize(
    ("rows", "indexes"),
    [
        (2, [2]),
        (-1, [3]),
        (np.int32(0), [0]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -2), [3, 1]),
        ([3, 0, 0, -2], [3, 0, 0, 2]),
        (np.array([1], np.uint8), [1]),
        ([True, False, False, True], [0, 3]),
        (np.array([False, True, True, False]), [1, 2]),
        ([], []),
        ([False] * ROWS, []),
        (slice(9, None), []),
    ],
    ids=repr,
)
def test_rows_of_a_state_are_a_state(rows: Rows, indexes: list[int]) -> None:
    whole = state()
    part = whole[rows]
    assert isinstance(part, State)
    assert (part.batch_size, list(part)) == (len(indexes), list(whole))
    for name, array in part.items():
        assert np.array_equal(array, whole[name][indexes])
        assert array.dtype == whole[name].dtype
        array[...] = 0  # a copy
    assert whole == state()
    assert (part.model, part.fingerprint, part.revision, part.position) == ("m", "f00d", 7, 9)


def test_indexes_of_a_small_type_choose_among_many_rows() -> None:
    whole = state(300)
    assert whole[np.array([255, 0], np.uint8)] == whole[[255, 0]]
    assert whole[np.array([-1, 127], np.int8)] == whole[[299, 127]]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (4, IndexError, "rows must be from -4 to 3; got 4"),
        ([0, -5], IndexError, "rows must be from -4 to 3; got -5"),
        ([True], IndexError, "a mask of rows must have batch_size = 4 booleans; got 1"),
        (1.0, TypeError, "a state takes the name of a tensor, or rows as an integer, .*; got 1.0"),
        (True, TypeError, "got True"),
        (None, TypeError, "got None"),
        ((0, 1), TypeError, r"got \(0, 1\)"),
        ([[0], [1]], TypeError, r"got \[\[0\], \[1\]\]"),
        ([0.5], TypeError, r"got \[0.5\]"),
        (b"lstm/h", TypeError, "got b'lstm/h'"),
        ({0}, TypeError, r"got \{0\}"),
    ],
    ids=repr,
)
def test_what_means_no_rows_is_refused(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        state()[rows]


def test_it_stays_a_mapping_of_names() -> None:
    one: Any = state()
    assert isinstance(one, Mapping)
    assert "lstm/h" in one
    assert 0 not in one
    assert [0] not in one
    assert one.get("nothing") is None
    assert (len(one), set(dict(one))) == (4, set(one))
    with pytest.raises(KeyError, match=r"'lstm/x'; the tensors of the state are \['lstm/h', 'lstm/c'"):
        one["lstm/x"]


def test_states_are_put_one_after_the_other() -> None:
    whole = state()
    joined = State.concat([whole[0], whole[[1, 2]], whole[3:]])
    assert joined == whole
    assert (joined.model, joined.batch_size, joined.revision, joined.position) == ("m", ROWS, None, None)
    joined["count"][0] = 5
    assert whole == state()
    assert State.concat([whole]) == whole


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        ([], errors.InvalidInputError, "states must have at least one State; got none"),
        ([state(), {}], errors.InvalidInputError, r"must be of type State; number 1 is \{\}"),
        (
            [state(), state(fingerprint="beef")],
            errors.ModelMismatchError,
            r"the first has the fingerprint f00d \(m\), number 1 has beef \(m\)",
        ),
        (
            [state(), state(count=np.ones((ROWS, 2), np.float32))],
            errors.InvalidInputError,
            r"'count' is int64 of shape \(rows\) in the first, float32 of shape \(rows, 2\) in number 1",
        ),
        (
            [state(), state(more=np.ones(ROWS))],
            errors.InvalidInputError,
            r"'more' is missing in the first, float64 of shape \(rows\) in number 1",
        ),
    ],
    ids=["none", "no_state", "another_model", "another_shape", "another_tensor"],
)
def test_states_that_do_not_fit_are_not_put_together(
    states: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        State.concat(states)


def test_as_a_dataframe() -> None:
    one = state()
    frame = one.to_dataframe()
    assert (frame.index.name, frame.columns.names) == ("row", ["tensor", "unit"])
    assert list(dict.fromkeys(frame.columns.get_level_values("tensor"))) == list(one)
    for name, array in one.items():
        assert np.array_equal(frame[name].to_numpy(), array.reshape(ROWS, -1))
        assert set(frame[name].dtypes) == {array.dtype}
    assert frame.attrs == {"model": "m", "fingerprint": "f00d", "revision": 7, "position": 9}
    frame.loc[0, ("count", 0)] = 5
    assert one == state()
    assert State({}, model="m", fingerprint="f", batch_size=2).to_dataframe().shape == (2, 0)
    assert one[[]].to_dataframe().shape == (0, frame.shape[1])


def test_as_a_dataset() -> None:
    more: dict[str, Any] = {"dense/a": np.ones((ROWS, 2)), "dense/b": np.ones((ROWS, 5))}
    one = state(**more)
    dataset = one.to_xarray()
    assert list(dataset.data_vars) == list(one)
    for name, array in one.items():
        assert np.array_equal(dataset[name].to_numpy(), array)
        assert dataset[name].dtype == array.dtype
    assert dataset["lstm/h"].dims == dataset["lstm/c"].dims == ("row", "lstm.1")
    assert (dataset["conv/h"].dims, dataset["count"].dims) == (("row", "conv.1", "conv.2"), ("row",))
    assert (dataset["dense/b"].dims, dataset.sel(row=2)["count"].item()) == (("row", "dense/b.1"), 2)
    assert dataset.attrs["position"] == 9
    dataset["count"][0] = 5
    assert one["count"][0] == 0
    assert not State({}, model="m", fingerprint="f", batch_size=2).to_xarray().data_vars


def test_the_states_of_a_trace_as_a_dataframe_and_a_dataset() -> None:
    h, c = np.random.default_rng(3).normal(size=(2, ROWS, 4, 5))
    conv = np.random.default_rng(4).normal(size=(ROWS, 4, 2, 6))
    states = TracedStates({"lstm/h": h, "lstm/c": c, "conv/h": conv}, has_time=True)
    frame = states.to_dataframe()
    assert (frame.index.names, frame.columns.names) == (["row", "time"], ["tensor", "unit"])
    assert np.array_equal(frame.loc[(2, 3), "lstm/c"].to_numpy(), c[2, 3])
    assert np.array_equal(frame["conv/h"].to_numpy(), conv.reshape(ROWS * 4, 12))
    dataset = states.to_xarray()
    assert dataset["lstm/h"].dims == dataset["lstm/c"].dims == ("row", "time", "lstm.1")
    assert dataset["conv/h"].dims == ("row", "time", "conv.1", "conv.2")
    assert np.array_equal(dataset.sel(row=1, time=2)["lstm/h"].to_numpy(), h[1, 2])
    last = TracedStates({"lstm/h": h[:, -1]}, has_time=False)
    assert last.to_dataframe().index.names == ["row"]
    assert last.to_xarray()["lstm/h"].dims == ("row", "lstm.1")
    assert TracedStates({}, has_time=True).to_dataframe().shape == (0, 0)
    assert repr(last) == f"TracedStates({{lstm/h: float64({ROWS}, 5)}})"
    with pytest.raises(KeyError, match="the tensors of the states are"):
        last["lstm/x"]


@pytest.mark.parametrize("package", ["pandas", "xarray"])
def test_a_library_that_is_not_there_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    method = {"pandas": "to_dataframe", "xarray": "to_xarray"}[package]
    advice = re.escape("pip install '.[plot]' (in a clone of Stepwell)")
    with pytest.raises(
        ModuleNotFoundError, match=f"State.{method} needs {package}, which is not installed: {advice}"
    ):
        getattr(state(), method)()
