"""Checks and packs the arguments of callers.

The server checks them too. Checking here raises earlier, and rejects values that cannot be sent at all. Parameters
are typed `object` if their type is checked.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import duration_pb2

from stepwell._state.display import short
from stepwell._state.infos import Inputs, ModelInfo, Rows, TensorInfo
from stepwell._state.state import State, States
from stepwell._state.tensors import Packed, pack
from stepwell.errors import InvalidInputError, ModelMismatchError

_MAX_ID = 256
_MAX_UINT32 = 2**32 - 1
_MAX_POSITION = 2**61
#: Ten years.
_MAX_IDLE_S = 3650 * 86400


def pack_inputs(inputs: Inputs, rows: int | None = None, count: str = "batch_size") -> tuple[Packed, ...]:
    """The inputs of a step or a prediction.

    Args:
        inputs: One array, or arrays by name.
        rows: Number of rows that each must have; None for any.
        count: The caller's name of that number.
    """
    if type(inputs) is np.ndarray or not isinstance(inputs, Mapping):  # the first is cheaper to check
        tensor = pack("", "the input", inputs)
        return (tensor if tensor.shape[0] == rows else _with_rows(tensor, "the input", rows, count),)
    if not inputs:
        raise InvalidInputError("inputs must name at least one array; got an empty mapping")
    for name in inputs:
        _check_input_name(name)
    return tuple(
        _with_rows(pack(name, f"input {name!r}", value), f"input {name!r}", rows, count)
        for name, value in inputs.items()
    )


def _check_input_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidInputError(f"the names of inputs must be non-empty strings; got {name!r}")


def _with_rows(tensor: Packed, what: str, rows: int | None, count: str = "batch_size") -> Packed:
    """Checks the first axis of an input. The server, which knows the others, uses the same words."""
    if rows is not None and tensor.shape[0] != rows:
        many = "1 row" if rows == 1 else f"{rows} rows"
        # If one of several rows is selected, x more likely has too many rows than too few axes.
        hint = ": did you mean x[None]?" if rows == 1 and count == "batch_size" else ""
        raise InvalidInputError(
            f"{what} must have {many} on its first axis ({count}), shape ({rows}, ...) or ({rows}, T, ...); "
            f"got {tensor.shape}{hint}"
        )
    return tensor


def pack_states(states: States, info: ModelInfo, rows: int) -> tuple[Packed, ...]:
    """A whole state of a model, in the model's order.

    Args:
        states: By name, or as a list in the model's order. A `State` of the same model may have other names, which
            Keras generated when the model was built again.
        info: The model.
        rows: Number of rows that each must have.

    Raises:
        InvalidInputError: They are not the states of the model.
        ModelMismatchError: It is a `State` of another model.
    """
    if isinstance(states, State):
        _require_of(states, info)
        names = [spec.name for spec in info.state]
        if len(states) == len(names) and set(states) != set(names):
            states = dict(
                zip(names, states.values(), strict=True)
            )  # the model was built again, and Keras generated other names
    values = _by_name(states, [spec.name for spec in info.state], info.name)
    return tuple(_state_tensor(spec, values[spec.name], rows) for spec in info.state)


def _require_of(state: State, info: ModelInfo) -> None:
    """Checks that a state has the same weights, or belongs to another version of the same model."""
    is_version = state.model == info.name and state.structure == info.structure != ""
    if state.fingerprint == info.fingerprint or is_version:
        return
    why = ""
    if state.model == info.name and state.structure and info.structure:
        why = ", and the layers of the two differ"
    raise ModelMismatchError(
        f"the state must belong to model {info.name!r} of fingerprint {short(info.fingerprint)}, or to a version of it with "
        f"the same layers; it belongs to {state.model!r} of fingerprint {short(state.fingerprint)}{why}"
    )


def _state_tensor(spec: TensorInfo, value: npt.ArrayLike, rows: int) -> Packed:
    tensor = pack(spec.name, f"state {spec.name!r}", value)
    if tensor.shape != (rows, *spec.shape):
        raise InvalidInputError(
            f"state {spec.name!r} must have shape {(rows, *spec.shape)}; got {tensor.shape}"
        )
    return tensor


def _by_name(states: States, names: Sequence[str], model: str) -> Mapping[str, Any]:
    if isinstance(states, Mapping):
        missing = [name for name in names if name not in states]
        extra = [name for name in states if name not in names]
        if missing or extra:
            raise InvalidInputError(
                f"states must hold exactly the state tensors of model {model!r}, {list(names)}; "
                f"missing: {missing}, not of this model: {extra}"
            )
        return states
    if not isinstance(states, list | tuple):
        raise InvalidInputError(
            f"states must be a mapping of name to array or a list of arrays; got {type(states).__name__}"
        )
    if len(states) != len(names):
        raise InvalidInputError(
            f"a list of states must have one array for each of {list(names)}; got {len(states)}"
        )
    return dict(zip(names, states, strict=True))


def check_rows(rows: Rows | None, count: int, name: str = "rows") -> tuple[int, ...] | None:
    """Returns the indexes of some of `count` rows, given as integers without repetition or as booleans; None for all."""
    if rows is None:
        return None
    try:
        given = list(rows)
    except TypeError:
        raise InvalidInputError(f"{name} must be a list of indexes or booleans; got {rows!r}") from None
    if given and all(isinstance(row, bool | np.bool_) for row in given):
        if len(given) != count:
            raise InvalidInputError(
                f"{name} must be booleans of shape ({count},), or a list of indexes; got {len(given)} booleans"
            )
        return tuple(np.flatnonzero(given).tolist())
    checked = tuple([_row(row, name) for row in given])
    if any(not 0 <= row < count for row in checked) or len(set(checked)) != len(checked):
        raise InvalidInputError(
            f"{name} must be from 0 to {count - 1}, each at most once; got {list(checked)[:20]}"
        )
    return checked


def _row(row: object, name: str) -> int:
    if isinstance(row, bool | np.bool_):
        raise InvalidInputError(f"{name} must be all indexes or all booleans; got some of both")
    try:
        return operator.index(row)  # type: ignore[arg-type]  # refusing other types is its job
    except TypeError:
        raise InvalidInputError(f"{name} must be integers or booleans; got {row!r}") from None


def check_session_id(name: str, session_id: object) -> str:
    """1 to 256 printable characters without leading or trailing space."""
    if not isinstance(session_id, str):
        raise InvalidInputError(f"{name} must be a string; got {session_id!r}")
    right = session_id.isprintable() and session_id.strip() == session_id
    if not (0 < len(session_id) <= _MAX_ID and right):
        raise InvalidInputError(
            f"{name} must be 1 to {_MAX_ID} printable characters without leading or trailing space; "
            f"got {len(session_id)} characters, {session_id[:40]!r}"
        )
    return session_id


def check_some_ids(session_ids: object) -> list[str]:
    """Checks a list of ids. A string is rejected: its letters might be ids of other sessions."""
    if isinstance(session_ids, str | bytes) or not isinstance(session_ids, Iterable):
        raise InvalidInputError(f"session_ids must be a list of ids; got {session_ids!r:.100}")
    return [check_session_id("session_ids", one) for one in session_ids]


def check_session_ids(session_ids: Sequence[str] | None, count: int, rule: str) -> list[str]:
    """Checks `count` different ids; returns an empty list if the server is to create them."""
    if session_ids is None:
        return []
    ids = check_some_ids(session_ids)
    if len(ids) != count:
        raise InvalidInputError(f"session_ids must have {rule}; got {len(ids)}")
    twice = next((one for one, times in collections.Counter(ids).items() if times > 1), None)
    if twice is not None:
        raise InvalidInputError(f"session_ids must be different from each other; got {twice!r} twice")
    return ids


def check_state_names(state_names: object, is_used: bool) -> list[str]:
    """Names of states; None: all. A string is rejected: its letters would be names."""
    if state_names is None:
        return []
    if isinstance(state_names, str | bytes) or not isinstance(state_names, Iterable):
        raise InvalidInputError(f"state_names must be a list of names; got {state_names!r:.100}")
    names = list(state_names)
    wrong = [each for each in names if not isinstance(each, str) or not each.isprintable()]
    if wrong:
        raise InvalidInputError(f"state_names must be printable strings; got {wrong[0]!r:.100}")
    if names and not is_used:
        raise InvalidInputError(f"state_names must be None unless states is True; got {names!r:.100}")
    return names


def optional_session_id(name: str, session_id: str | None) -> str:
    """A session id as it is sent: empty if the server is to create one."""
    return "" if session_id is None else check_session_id(name, session_id)


def check_model(model: object) -> str:
    """Checks the name of a model: a printable string that is not empty."""
    if not isinstance(model, str) or not model or not model.isprintable():
        raise InvalidInputError(f"model must be the name of a model; got {model!r}")
    return model


def check_count(name: str, count: object) -> int:
    """An integer of at least 1 that fits the protocol's 32 bits."""
    checked = _integer(name, count)
    if checked < 1:
        raise InvalidInputError(f"{name} must be at least 1; got {checked}")
    if checked > _MAX_UINT32:
        raise InvalidInputError(f"{name} must be 1 to {_MAX_UINT32}; got {checked}")
    return checked


def check_max_idle(max_idle_s: object) -> duration_pb2.Duration | None:
    """An idle limit as it is sent; None: the server decides."""
    if max_idle_s is None:
        return None
    if isinstance(max_idle_s, bool | np.bool_) or not isinstance(max_idle_s, int | float | np.number):
        raise InvalidInputError(f"max_idle_s must be a number of seconds, or None; got {max_idle_s!r}")
    if not (max_idle_s == 0 or 1 <= max_idle_s <= _MAX_IDLE_S):
        raise InvalidInputError(
            f"max_idle_s must be from 1 to {_MAX_IDLE_S}, or 0 for no limit; got {max_idle_s}"
        )
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(round(max_idle_s * 1000))
    return duration


def check_position(position: object) -> int:
    """Checks a position, which must be so far below 64 bits that stepping cannot overflow it."""
    checked = _integer("position", position)
    if not 0 <= checked <= _MAX_POSITION:
        raise InvalidInputError(f"position must be from 0 to 2**61, {_MAX_POSITION}; got {checked}")
    return checked


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool | np.bool_):
        raise InvalidInputError(f"{name} must be an integer; got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]  # refusing other types is its job
    except TypeError:
        raise InvalidInputError(f"{name} must be an integer; got {value!r}") from None
