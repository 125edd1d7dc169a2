"""Arguments that break a rule are refused before anything is sent, by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from stepwell import config, errors
from stepwell._batching.step_arguments import check_outputs, step_change
from stepwell._core.core import Core
from stepwell._state import arguments
from stepwell._state.infos import ModelInfo, TensorInfo
from stepwell._state.state import State
from support.clock import ManualClock

INFO = ModelInfo(
    name="m",
    fingerprint="f00d",
    inputs=(),
    outputs=(),
    state=(TensorInfo("h", "float32", (2,), False), TensorInfo("c", "float32", (2,), False)),
    executor="",
    executor_reason="",
    batch_sizes=(),
    state_row_bytes=16,
    sessions=0,
)
H = np.ones((1, 2))


@pytest.mark.parametrize("shape", [(2, 3), (3, 1, 3), (2,)])
def test_rows_of_an_input_are_the_batch_size(shape: tuple[int, ...]) -> None:
    with pytest.raises(errors.InvalidInputError) as caught:
        arguments.pack_inputs(np.ones(shape), 1)
    assert caught.value.message == (
        "the input must have 1 row on its first axis (batch_size), shape (1, ...) or (1, T, ...); "
        f"got {shape}: did you mean x[None]?"
    )
    with pytest.raises(
        errors.InvalidInputError, match=r"must have 4 rows .* \(4, T, \.\.\.\); got \([0-9, ]+\)$"
    ):
        arguments.pack_inputs(np.ones(shape), 4)


def test_several_inputs_by_name() -> None:
    packed = arguments.pack_inputs({"a": [[1.0]], "b": np.ones((1, 2), np.int32)}, 1)
    assert [tensor.name for tensor in packed] == ["a", "b"]


@pytest.mark.parametrize("inputs", [{}, {"": H}, {3: H}])
def test_names_of_inputs(inputs: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match=r"inputs must|names of inputs"):
        arguments.pack_inputs(inputs, 1)


def test_states_by_name_are_put_in_the_models_order() -> None:
    packed = arguments.pack_states({"c": 2 * H, "h": H}, INFO, 1)
    assert [tensor.name for tensor in packed] == ["h", "c"]


def test_states_as_a_list_are_in_the_models_order() -> None:
    packed = arguments.pack_states([H, 2 * H], INFO, 1)
    assert [tensor.name for tensor in packed] == ["h", "c"]
    assert packed == arguments.pack_states({"c": 2 * H, "h": H}, INFO, 1)


def test_missing_and_extra_states_are_named() -> None:
    with pytest.raises(errors.InvalidInputError, match=r"missing: \['c'\], not of this model: \['z'\]"):
        arguments.pack_states({"h": H, "z": H}, INFO, 1)


@pytest.mark.parametrize(
    ("states", "pattern"),
    [
        ([H], "one array for each"),
        ([H, H, H], "one array for each"),
        (H, "mapping of name to array or a list"),
        ("hc", "mapping of name to array or a list"),
        ([H, 1.0], "state 'c'.*scalar"),
        ([H, np.ones((2, 2))], r"state 'c' must have shape \(1, 2\); got \(2, 2\)"),
        ([H, np.ones((1, 3))], r"state 'c' must have shape \(1, 2\); got \(1, 3\)"),
    ],
)
def test_states_that_break_a_rule(states: Any, pattern: str) -> None:
    with pytest.raises(errors.InvalidInputError, match=pattern):
        arguments.pack_states(states, INFO, 1)


def test_a_state_of_another_model() -> None:
    state = State({"h": H, "c": H}, model="old", fingerprint="beef", batch_size=1)
    with pytest.raises(errors.ModelMismatchError, match=r"f00d.*'old'.*beef"):
        arguments.pack_states(state, INFO, 1)


@pytest.mark.parametrize("rows", [[0, 3], (0, 3), np.array([0, 3]), {0: "", 3: ""}, iter([0, 3])])
def test_rows_of_many_kinds(rows: Any) -> None:
    assert arguments.check_rows(rows, 4) == (0, 3)


def test_no_rows_are_not_all_rows() -> None:
    assert (arguments.check_rows([], 4), arguments.check_rows(np.flatnonzero(np.zeros(4)), 4)) == ((), ())
    assert arguments.check_rows(None, 4) is None


@pytest.mark.parametrize(
    "rows", [[4], [-1], [1, 1], [0.0], ["0"], [True, False], np.array([True, False]), 3, "01"]
)
def test_rows_that_break_a_rule(rows: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match="rows must be"):
        arguments.check_rows(rows, 4)


@pytest.mark.parametrize(
    "session_id", ["", "x" * 257, "x" * 10_000, "a\nb", "\x00", " a", "a ", "\ud800", 7, b"a"]
)
def test_session_ids_that_break_a_rule(session_id: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match="session_id must be"):
        arguments.check_session_id("session_id", session_id)


@pytest.mark.parametrize("session_id", ["a", "x" * 256, "käse 7", "用户-42"])
def test_session_ids(session_id: str) -> None:
    assert arguments.optional_session_id("session_id", session_id) == session_id


@pytest.mark.parametrize("count", [0, -1, 2**32, 1.0, "1", True, None])
def test_counts(count: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match="batch_size must be"):
        arguments.check_count("batch_size", count)


@pytest.mark.parametrize("outputs", ["ALL", "", None, b"all", 7, [], ["a", "a"], ["a", ""], ["a", None]])
def test_selections_that_break_a_rule(outputs: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match=r"outputs must (be one of|name at least one)"):
        check_outputs(outputs)


def test_selections() -> None:
    assert [check_outputs(word) for word in ("all", "last", "none")] == [
        ("all", ()),
        ("last", ()),
        ("none", ()),
    ]
    assert check_outputs("all", "last") == check_outputs("last", "all") == ("last", ())
    assert check_outputs(["b", "a"], "last") == ("last", ("b", "a"))
    with pytest.raises(errors.InvalidInputError, match="time must be one of"):
        check_outputs("all", "none")


def test_rows_as_booleans() -> None:
    assert (
        arguments.check_rows([True, False, True], 3)
        == arguments.check_rows(np.array([1, 0, 1], np.bool_), 3)
        == (0, 2)
    )
    assert arguments.check_rows(np.zeros(3, np.bool_), 3) == ()
    with pytest.raises(
        errors.InvalidInputError, match=r"rows must be booleans of shape \(3,\).*got 2 booleans"
    ):
        arguments.check_rows([True, False], 3)
    with pytest.raises(errors.InvalidInputError, match="all indexes or all booleans"):
        arguments.check_rows([True, 2, 0], 3)


@pytest.mark.parametrize(
    ("reset", "got"),
    [
        (np.ones(4), r"float64 of shape \(4,\)"),
        ([0, 1, 0, 1], r"int64 of shape \(4,\)"),
        (np.ones(3, np.bool_), r"bool of shape \(3,\)"),
        (np.ones((4, 6), np.bool_), r"bool of shape \(4, 6\)"),
        (np.ones((4, 7, 1), np.bool_), r"bool of shape \(4, 7, 1\)"),
        (True, r"bool of shape \(\)"),
        ([[True], [True, False]], "True, False"),
    ],
)
def test_masks_that_break_a_rule(reset: Any, got: str) -> None:
    said = r"reset must be booleans of shape \(4,\) or \(4, 7\); got .*"
    with pytest.raises(errors.InvalidInputError, match=said + got):
        step_change(np.zeros((4, 7, 2), np.float32), 4, reset=reset)


def test_masks_are_the_same_change_however_they_are_written() -> None:
    x, mask = np.zeros((2, 3, 1), np.float32), np.zeros((2, 3), np.bool_)
    mask[1, 2] = True
    change = step_change(x, 2, reset=mask)
    assert change.reset == bytes([0, 0, 0, 0, 0, 1])
    assert (
        change == step_change(x, 2, reset=np.asfortranarray(mask)) == step_change(x, 2, reset=mask.tolist())
    )
    assert step_change(x, 2, reset=np.zeros(2, np.bool_)) == step_change(x, 2)
    assert change.some(np.array([1]), 2).reset == bytes([0, 0, 1])


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, "3", True])
def test_time_limits(timeout_s: Any) -> None:
    core = Core(config.ClientConfig("localhost:1"))
    with pytest.raises(errors.InvalidInputError, match="timeout_s must be"):
        core.deadline(timeout_s)
    with pytest.raises(errors.InvalidInputError, match="timeout_s must be"):
        config.ClientConfig("localhost:1", timeout_s=timeout_s)


@pytest.mark.parametrize("timeout_s", [1e10, 10**400, math.inf], ids=["float", "int", "inf"])
def test_time_limits_beyond_all_clocks_are_none(timeout_s: float) -> None:
    core = Core(config.ClientConfig("localhost:1", timeout_s=timeout_s))
    assert core.deadline(None).grpc_timeout_s() is None
    assert core.deadline(timeout_s).grpc_timeout_s() is None


def test_calls_that_begin_within_a_millisecond_share_a_deadline() -> None:
    clock = ManualClock()
    core = Core(config.ClientConfig("localhost:1", timeout_s=30.0), clock=clock.monotonic)
    first = core.deadline(None)
    clock.advance(0.0005)
    assert core.deadline(None) is core.deadline(30.0) is first
    assert core.deadline(29.0).limit_s == 29.0
    assert core.deadline(None).remaining_s() == pytest.approx(30.0, abs=1e-6)
    clock.advance(0.0015)
    assert core.deadline(None).remaining_s() == pytest.approx(30.0, abs=1e-6)


def test_a_call_loses_at_most_a_thousandth_of_its_time_limit() -> None:
    clock = ManualClock()
    core = Core(config.ClientConfig("localhost:1", timeout_s=0.05), clock=clock.monotonic)
    for _ in range(20):
        assert core.deadline(None).remaining_s() >= 0.05 * 0.999
        clock.advance(0.00003)


@pytest.mark.parametrize("size", [0, 1023, 2**31, 1e6, True])
def test_message_sizes(size: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match="max_message_bytes must be"):
        config.ClientConfig("localhost:1", max_message_bytes=size)


@pytest.mark.parametrize(
    "address", ["", "localhost", ":50051", "h:", "h:0", "h:65536", "h:x", "a b:1", 5, "unix:", "unix://h/p"]
)
def test_addresses_that_break_a_rule(address: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.InvalidInputError, match="address must be"):
        config.server_address(address)
    monkeypatch.setenv("STEPWELL_SERVER", str(address) if address != 5 else "5")
    with pytest.raises(errors.InvalidInputError, match="STEPWELL_SERVER must be"):
        config.server_address()


def test_where_the_address_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEPWELL_SERVER", raising=False)
    assert config.server_address() == "127.0.0.1:50051"
    monkeypatch.setenv("STEPWELL_SERVER", "[::1]:7")
    assert config.server_address() == "[::1]:7"
    assert config.server_address("unix:/run/stepwell") == "unix:/run/stepwell"


def test_counts_beyond_32_bits_get_the_range_in_the_error() -> None:
    for count in (2**32, 2**63, 10**30):
        with pytest.raises(
            errors.InvalidInputError, match=f"batch_size must be 1 to 4294967295; got {count}"
        ):
            arguments.check_count("batch_size", count)


@pytest.mark.parametrize("position", ["x", 1.5, True, None, math.nan, -1, 2**61 + 1, 2**64])
def test_a_position_is_an_integer(position: Any) -> None:
    with pytest.raises(errors.InvalidInputError, match=rf"^position must be .*; got {position!r}$"):
        arguments.check_position(position)
    assert arguments.check_position(np.uint64(2**61)) == 2**61
