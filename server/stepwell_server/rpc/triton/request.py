"""An inference request with its checked parameters, and its tensors for a version of the model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepwell_server.core.callers import Caller
from stepwell_server.errors import InvalidInput, ServerError, Unsupported
from stepwell_server.rpc.triton.errors import SequenceId, no_sequence_id, unknown_model
from stepwell_server.rpc.triton.inference import service_pb2 as pb
from stepwell_server.rpc.triton.statistics import Timing
from stepwell_server.rpc.triton.versions import InferModel, InferModels, Read, read_version

if TYPE_CHECKING:
    from stepwell_server.rpc.fronts.base import Call
    from stepwell_server.rpc.triton.sequences import QueuePosition
    from stepwell_server.rpc.triton.tensors import Tensor

_MAX_STRING_ID = 128
_U64 = 1 << 64
_OURS = ("stepwell_request_id", "stepwell_revision", "stepwell_stateless")
_WHOLE = ("int64_param", "uint64_param")
_BOOL = ("bool_param",)
#: The field that each parameter sets, "" for none, and the fields that its value may be in. All requests have the same
#: priority here; the stream looks for the flag itself.
_KNOWN: Mapping[str, tuple[str, Sequence[str]]] = {
    "priority": ("", _WHOLE),
    "sequence_end": ("end", _BOOL),
    "sequence_id": ("sequence_id", ("int64_param", "string_param", "uint64_param")),
    "sequence_start": ("start", _BOOL),
    "stepwell_request_id": ("request_id", _WHOLE),
    "stepwell_revision": ("revision", _WHOLE),
    "stepwell_stateless": ("stateless", _BOOL),
    "timeout": ("timeout_us", ("int64_param",)),
    "triton_enable_empty_final_response": ("", _BOOL),
}


@dataclasses.dataclass(slots=True)
class Parameters:
    """The parameters of a request."""

    sequence_id: SequenceId = 0
    """An integer from 1 to 2^64 - 1, or a text. 0 or empty: no sequence."""
    start: bool = False
    end: bool = False
    timeout_us: int = 0
    """Longest wait of the request, in microseconds; 0: until the call's deadline."""
    revision: int | None = None
    """The sequence's revision according to the client."""
    request_id: int = 0
    """Random id of this change; 0: none."""
    stateless: bool = False
    """Whether the client wants a prediction from the initial state, although the model keeps state."""


def read_parameters(model: str, given: Mapping[str, pb.InferParameter], *, keeps_state: bool) -> Parameters:
    """Read a request's parameters. Parameters of other names are for models, and no model here takes any.

    A model that keeps state would begin from its initial state with each request without a sequence.

    Raises:
        InvalidInput: a value has the wrong type or breaks a rule, or a model that keeps state has no sequence.
        Unsupported: the sequence's id is too long.
    """
    read = Parameters()
    for name in sorted(
        given
    ):  # a map has an order of its own in each process: of several faults the same one is said
        parameter = given[name]
        if name in _KNOWN:
            value = _value(name, parameter)
            if field := _KNOWN[name][0]:
                setattr(read, field, value)
        elif name.startswith("triton_"):
            raise InvalidInput(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following"
                " keys starting with 'triton_' are allowed: triton_enable_empty_final_response"
            )
        elif name.startswith("stepwell_"):
            raise InvalidInput(f"parameter keys starting with 'stepwell_' must be of {_OURS}; got {name!r}")
    _check_together(model, read, id_given="sequence_id" in given, keeps_state=keeps_state)
    return read


def read_sequence_id(given: Mapping[str, pb.InferParameter]) -> SequenceId:
    """Return the sequence of a request; 0 or empty: none, or `read_parameters` will refuse it."""
    if "sequence_id" not in given:
        return 0
    try:
        return _value("sequence_id", given["sequence_id"])
    except ServerError:
        return 0


def _value(name: str, parameter: pb.InferParameter) -> int | str:
    fields, field = _KNOWN[name][1], parameter.WhichOneof("parameter_choice")
    if field is None or field not in fields:
        # Triton's text, which does not mention the unsigned form of a sequence's id
        raise InvalidInput(f"invalid value type for '{name}' parameter, expected {' or '.join(fields[:2])}.")
    value: int | str = getattr(parameter, field)
    if isinstance(value, str):
        if len(value.encode()) > _MAX_STRING_ID:
            raise Unsupported(f"string correlation ID cannot be longer than {_MAX_STRING_ID} characters")
        return value
    if name == "sequence_id":
        return value % _U64  # an unsigned number may be sent as a signed one
    if value < 0:
        raise InvalidInput(f"invalid value for '{name}', expected value >= 0.")
    if name == "stepwell_request_id" and not value:
        raise InvalidInput("'stepwell_request_id' must be a random number from 1 on; got 0")
    return value


def _check_together(model: str, read: Parameters, *, id_given: bool, keeps_state: bool) -> None:
    if not read.sequence_id:
        if id_given or read.start or read.end:
            raise no_sequence_id(model, keeps_state=keeps_state)
        if read.revision is not None or read.request_id:
            raise InvalidInput("'stepwell_revision' and 'stepwell_request_id' need a 'sequence_id'; got none")
        if keeps_state and not read.stateless:
            # tritonclient leaves out the id 0
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


class Origin(NamedTuple):
    """Origin of a request that a front has parsed. See `Call`."""

    caller: str
    who: Caller
    deadline: float


class Request:
    """A running inference request. Lives on the event loop."""

    def __init__(
        self,
        models: InferModels,
        message: pb.ModelInferRequest,
        origin: Origin | Call,
        position: QueuePosition | None,
    ) -> None:
        """Find the model.

        Raises:
            InvalidInput, ModelNotFound: as of `InferModels.find`.
        """
        self._models = models
        self._message = message
        self.name = message.model_name
        """Of the model."""
        self.asked = read_version(message.model_version)
        """The version that the request names; None: none."""
        self.timing = Timing(time.perf_counter_ns())
        self.model: InferModel = models.numbered(self.name, self.asked)
        """The version that serves it, if known."""
        self.position = position
        """Its position in the queue of its sequence; None: no sequence."""
        self.session_id = "" if position is None else position.key
        """Id of the sequence's session; empty: none."""
        self.parameters = Parameters()
        self.caller, self.who = origin.caller, origin.who
        self.deadline = origin.deadline
        """Deadline on the monotonic clock."""

    def read_parameters(self, now: float) -> None:
        """Read them, and the shorter deadline that they may set. Errors as of the function."""
        message, keeps_state = self._message, self.model.tensors.keeps_state
        self.parameters = read_parameters(self.name, message.parameters, keeps_state=keeps_state)
        if timeout_us := self.parameters.timeout_us:
            self.deadline = min(self.deadline, now + timeout_us / 1e6)

    def read(self, version: int | None = None) -> Read:
        """Read the tensors for a version; None: the one that is asked for, or is the default now.

        Raises:
            InvalidInput, Unsupported: they do not fit.
            ModelNotFound: it is not loaded.
        """
        began = time.perf_counter_ns()
        self.model = self._models.numbered(self.name, version or self.asked)
        read = Read(self.model, self._outputs(), self.model.tensors.read(self._message))
        # earlier waiting counts as time in the queue
        self.timing.read = self.timing.arrived + time.perf_counter_ns() - began
        return read

    def read_answered(self, version: int) -> Read:
        """Read them for the version that has answered the request before, or the one asked for if it is not loaded."""
        return self.read(version if self._models.known(self.name, version) else None)

    def answered(self, read: Read, version: int, names: Collection[str]) -> Read:
        """As read, for the version that gave the answer with outputs of these names.

        It is another one than was expected where the default has moved meanwhile.

        Raises:
            ModelNotFound: that version is unloaded, and its outputs are not known.
        """
        if version not in (0, read.model.version) and (model := self._models.known(self.name, version)):
            self.model = model
            read = Read(model, self._outputs(), read.inputs)
        if any(tensor.spec.name not in names for tensor in read.outputs):
            raise unknown_model(self.name, str(version))
        return read

    def _outputs(self) -> Sequence[Tensor]:
        wanted = [(output.name, output.parameters) for output in self._message.outputs]
        return self.model.tensors.requested(wanted, self._message.id)
