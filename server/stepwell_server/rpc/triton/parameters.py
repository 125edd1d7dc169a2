"""The parameters of a request, read and checked: which sequence, which flags, which time limit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from stepwell_server.errors import InvalidInput, ServerError, Unsupported
from stepwell_server.rpc.triton.errors import SequenceId, no_sequence_id
from stepwell_server.rpc.triton.inference import service_pb2 as pb

_MAX_STRING_ID = 128
_U64 = 1 << 64
_OURS = ("stepwell_request_id", "stepwell_revision", "stepwell_stateless")


@dataclasses.dataclass(slots=True)
class Parameters:
    """What a request says beside its tensors."""

    sequence_id: SequenceId | None = None
    """An integer from 1 to 2^64 - 1 or a text; None: no sequence."""
    start: bool = False
    end: bool = False
    priority: int = 0
    """Read and left aside: all requests are alike here."""
    timeout_us: int = 0
    """Microseconds that the request may wait; 0: as long as the call may take."""
    wants_final_flag: bool = False
    """On a stream: say on each reply that it is the request's last."""
    revision: int | None = None
    """The sequence's revision that the client knows."""
    request_id: int = 0
    """The client's random number for this change; 0: none."""
    stateless: bool = False
    """A prediction from the initial state is what the client wants of a model that keeps state."""


def read_parameters(model: str, given: Mapping[str, pb.InferParameter], *, keeps_state: bool) -> Parameters:
    """Read a request's parameters. Parameters of other names are for models, and no model here takes any.

    A model that keeps state would begin anew with each request without a sequence.

    Raises:
        InvalidInput: a value has the wrong type or breaks a rule, or a model that keeps state has no sequence.
        Unsupported: a string id is too long.
    """
    read = Parameters()
    id_given = False
    for name, parameter in given.items():
        if name in _READERS:
            field, reader = _READERS[name]
            setattr(read, field, reader(name, parameter))
            id_given = id_given or name == "sequence_id"
        elif name.startswith("triton_"):
            raise InvalidInput(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following"
                " keys starting with 'triton_' are allowed: triton_enable_empty_final_response"
            )
        elif name.startswith("stepwell_"):
            raise InvalidInput(f"parameter keys starting with 'stepwell_' must be of {_OURS}; got {name!r}")
    _check_together(model, read, id_given=id_given, keeps_state=keeps_state)
    return read


def read_sequence_id(given: Mapping[str, pb.InferParameter]) -> SequenceId | None:
    """Which sequence a request is of; None: of none, or `read_parameters` says what is wrong."""
    parameter = given.get("sequence_id")
    try:
        return None if parameter is None else _sequence_id("sequence_id", parameter)
    except ServerError:
        return None


def _check_together(model: str, read: Parameters, *, id_given: bool, keeps_state: bool) -> None:
    if read.sequence_id is None:
        if id_given or read.start or read.end:
            raise no_sequence_id(model, keeps_state=keeps_state)
        if read.revision is not None or read.request_id:
            raise InvalidInput("'stepwell_revision' and 'stepwell_request_id' need a 'sequence_id'; got none")
        if keeps_state and not read.stateless:
            # tritonclient sends nothing at all of a sequence that is numbered 0
            raise no_sequence_id(model, keeps_state=True)
    elif read.stateless:
        raise InvalidInput(
            f"'stepwell_stateless' must not come with a 'sequence_id', whose state it would leave aside; got"
            f" {read.sequence_id!r}"
        )
    if read.start and read.revision is not None:
        raise InvalidInput(
            "'stepwell_revision' must not come with 'sequence_start', which applies at any revision;"
            f" got {read.revision}"
        )
    if read.request_id and not read.start and read.revision is None:
        raise InvalidInput("'stepwell_request_id' needs a 'stepwell_revision' unless the sequence starts")


def _sequence_id(_name: str, parameter: pb.InferParameter) -> SequenceId | None:
    kind = parameter.WhichOneof("parameter_choice")
    if kind == "int64_param":
        # an unsigned number that travels as a signed one
        return (parameter.int64_param % _U64) or None
    if kind == "uint64_param":
        return parameter.uint64_param or None
    if kind != "string_param":
        raise _wrong_type("sequence_id", "int64_param or string_param")
    if len(parameter.string_param.encode()) > _MAX_STRING_ID:
        raise Unsupported(f"string correlation ID cannot be longer than {_MAX_STRING_ID} characters")
    return parameter.string_param or None


def _bool(name: str, parameter: pb.InferParameter) -> bool:
    if parameter.WhichOneof("parameter_choice") != "bool_param":
        raise _wrong_type(name, "bool_param")
    return parameter.bool_param


def _whole(name: str, parameter: pb.InferParameter) -> int:
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in {"int64_param", "uint64_param"}:
        raise _wrong_type(name, "int64_param or uint64_param")
    value = parameter.int64_param if kind == "int64_param" else parameter.uint64_param
    if value < 0:
        raise InvalidInput(f"invalid value for '{name}', expected value >= 0.")
    return value


def _timeout(name: str, parameter: pb.InferParameter) -> int:
    if parameter.WhichOneof("parameter_choice") != "int64_param":
        raise _wrong_type(name, "int64_param")
    return _whole(name, parameter)


def _request_id(name: str, parameter: pb.InferParameter) -> int:
    value = _whole(name, parameter)
    if not value:
        raise InvalidInput("'stepwell_request_id' must be a random number from 1 on; got 0")
    return value


def _wrong_type(name: str, expected: str) -> InvalidInput:
    return InvalidInput(f"invalid value type for '{name}' parameter, expected {expected}.")


#: The field that each parameter sets, and what reads it.
_READERS: Mapping[str, tuple[str, Callable[[str, pb.InferParameter], object]]] = {
    "priority": ("priority", _whole),
    "sequence_end": ("end", _bool),
    "sequence_id": ("sequence_id", _sequence_id),
    "sequence_start": ("start", _bool),
    "stepwell_request_id": ("request_id", _request_id),
    "stepwell_revision": ("revision", _whole),
    "stepwell_stateless": ("stateless", _bool),
    "timeout": ("timeout_us", _timeout),
    "triton_enable_empty_final_response": ("wants_final_flag", _bool),
}
