"""A client of the protocol itself, as somebody would write it without the SDK. Nothing is checked on this side."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from stepwell.v1 import errors_pb2, models_pb2, models_pb2_grpc, sessions_pb2, sessions_pb2_grpc, tensors_pb2
from stepwell_server.program import dtype_of
from support import secured

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = Sequence[tensors_pb2.Tensor]
Answer = sessions_pb2.StepStreamResponse
TIMEOUT_S = 100.0
SERVICE = "stepwell.v1.SessionService"
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """How a call or a member of a frame was refused."""

    code: str
    reason: str
    message: str
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def expect(self, code: str, reason: str, *words: str) -> None:
        """Check the status, the machine-readable reason, and that the message contains all `words`."""
        assert (self.code, self.reason) == (code, reason), self
        missing = [word for word in words if word not in self.message]
        assert not missing, f"{missing} are not in {self.message!r}"


def tensor(array: Any, name: str = "", **changes: Any) -> tensors_pb2.Tensor:
    """An array as it travels; `changes` replace fields afterwards, to make it contradict itself."""
    values = np.asarray(array)
    fields: dict[str, Any] = {
        "name": name,
        "dtype": tensors_pb2.DataType.Value(f"DATA_TYPE_{values.dtype.name.upper()}"),
        "shape": values.shape,
        "data": np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes(),
    }
    return tensors_pb2.Tensor(**fields | changes)


def tensors(arrays: Mapping[str, Array]) -> list[tensors_pb2.Tensor]:
    return [tensor(array, name) for name, array in arrays.items()]


def dtype_of_number(number: tensors_pb2.DataType.ValueType) -> np.dtype[Any]:
    """The NumPy type of a `DataType`."""
    return dtype_of(tensors_pb2.DataType.Name(number).removeprefix("DATA_TYPE_").lower())


def arrays(messages: Tensors) -> dict[str, Array]:
    """The arrays in messages."""
    return {
        message.name: np.frombuffer(message.data, dtype_of_number(message.dtype)).reshape(
            tuple(message.shape)
        )
        for message in messages
    }


def data(messages: Tensors) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Shape and bytes of tensors, to be compared bit for bit."""
    return {message.name: (tuple(message.shape), message.data) for message in messages}


class _With(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Adds metadata to calls."""

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._more(details), request)

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return continuation(self._more(details), requests)

    def _more(self, details: Any) -> Any:
        return details._replace(metadata=[*(details.metadata or ()), *self._metadata])


class Wire:
    """A channel and its stubs."""

    def __init__(
        self, address: str, *metadata: tuple[str, str], options: Sequence[tuple[str, int]] = ()
    ) -> None:
        """`metadata` is sent with every call; `options` are more of the channel's."""
        own = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1), *options]
        self.channel = secured.channel(address, options=own)
        if metadata:
            self.channel = grpc.intercept_channel(self.channel, _With(metadata))
        self.sessions = sessions_pb2_grpc.SessionServiceStub(self.channel)
        self.models = models_pb2_grpc.ModelServiceStub(self.channel)
        self.model_admin = models_pb2_grpc.ModelAdminServiceStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()

    # Calls that succeed.

    def open(self, model: str, session_id: str = "", batch_size: int = 1, **fields: Any) -> str:
        request = sessions_pb2.OpenSessionRequest(
            model=model, session_id=session_id, batch_size=batch_size, **fields
        )
        return self.sessions.OpenSession(request, timeout=TIMEOUT_S).session.session_id

    def open_many(self, model: str, count: int, batch_size: int = 1) -> list[str]:
        request = sessions_pb2.OpenSessionsRequest(model=model, count=count, batch_size=batch_size)
        return list(self.sessions.OpenSessions(request, timeout=TIMEOUT_S).session_ids)

    def step(self, session_id: str, inputs: Tensors, **fields: Any) -> sessions_pb2.StepResponse:
        request = sessions_pb2.StepRequest(session_id=session_id, inputs=inputs, **fields)
        return self.sessions.Step(request, timeout=TIMEOUT_S)

    def reset(self, session_id: str, **fields: Any) -> sessions_pb2.ResetStatesResponse:
        request = sessions_pb2.ResetStatesRequest(session_id=session_id, **fields)
        return self.sessions.ResetStates(request, timeout=TIMEOUT_S)

    def state(self, session_id: str) -> sessions_pb2.GetStateResponse:
        request = sessions_pb2.GetStateRequest(session_id=session_id)
        return self.sessions.GetState(request, timeout=TIMEOUT_S)

    def session(self, session_id: str) -> sessions_pb2.Session:
        request = sessions_pb2.GetSessionRequest(session_id=session_id)
        return self.sessions.GetSession(request, timeout=TIMEOUT_S).session

    def close(self, *session_ids: str) -> None:
        self.sessions.CloseSessions(
            sessions_pb2.CloseSessionsRequest(session_ids=session_ids), timeout=TIMEOUT_S
        )

    def predict(self, model: str, inputs: Tensors, state: Tensors = ()) -> models_pb2.PredictResponse:
        request = models_pb2.PredictRequest(model=model, inputs=inputs, state=state)
        return self.models.Predict(request, timeout=TIMEOUT_S)

    # Calls that are refused.

    def refused(self, rpc: str, request: Any) -> Refusal:
        """How the server refuses a request."""
        stubs: list[Any] = [self.sessions, self.models, self.model_admin]
        stub = next(stub for stub in stubs if hasattr(stub, rpc))
        return refusal(lambda: getattr(stub, rpc)(request, timeout=TIMEOUT_S))

    def refused_bytes(self, rpc: str, raw: bytes, service: str = SERVICE) -> Refusal:
        """How the server refuses bytes that no message was made of."""
        call: Any = self.channel.unary_unary(f"/{service}/{rpc}")
        return refusal(lambda: call(raw, timeout=TIMEOUT_S))

    # The stream.

    def stream(self, frames: Iterator[sessions_pb2.StepStreamRequest]) -> Iterator[Answer]:
        """A stream as gRPC gives it; it can be cancelled."""
        return self.sessions.StepStream(frames, timeout=TIMEOUT_S)

    def exchange(self, *frames: sessions_pb2.StepStreamRequest) -> list[Answer]:
        """Send frames, end this side of the stream, and return everything that came."""
        return list(self.stream(iter(frames)))


class Conversation:
    """A stream on which one sends and receives by turns. Ends with its `with` block."""

    def __init__(self, wire: Wire) -> None:
        self._sent: queue.SimpleQueue[sessions_pb2.StepStreamRequest | None] = queue.SimpleQueue()
        self.call: Any = wire.stream(iter(self._sent.get, None))

    def send(self, *frames: sessions_pb2.StepStreamRequest) -> None:
        for frame in frames:
            self._sent.put(frame)

    def receive(self) -> Answer:
        """The next part of some frame's reply."""
        answer: Answer = next(self.call)
        return answer

    def end(self) -> list[Answer]:
        """End this side, and return everything that still comes."""
        self._sent.put(None)
        return list(self.call)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sent.put(None)
        self.call.cancel()


def refusal(call: Callable[[], object]) -> Refusal:
    """How a call fails."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return of_call(error)
    raise AssertionError(f"it was not refused but answered: {str(answer)[:300]}")


def of_call(error: Any) -> Refusal:
    """The refusal in the status of a call and its details."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in () if status is None else status.details:
        detail.Unpack(info)
    return Refusal(error.code().name, info.reason, error.details(), dict(info.metadata))


def refused_part(error: errors_pb2.Error) -> Refusal:
    """The refusal of a part of what was asked."""
    code = next(code.name for code in grpc.StatusCode if code.value[0] == error.code)
    return Refusal(code, error.reason, error.message, dict(error.metadata))


def of_members(answers: Sequence[Answer], count: int) -> dict[int, Refusal]:
    """The refusals of a frame's members. Each member must be answered exactly once, and the last part last."""
    refusals: dict[int, Refusal] = {}
    applied: list[int] = []
    for answer in answers:
        applied += range(count) if answer.all_members else answer.members
        for entry in answer.errors:
            for member in entry.members or range(count):
                assert member not in refusals, f"member {member} failed twice"
                refusals[member] = refused_part(entry.error)
    assert sorted([*applied, *refusals]) == list(range(count)), (applied, sorted(refusals))
    assert [answer.last for answer in answers] == [False] * (len(answers) - 1) + [True]
    return refusals


def step_frame(
    frame_id: int, session_ids: Sequence[str], inputs: Tensors, **fields: Any
) -> sessions_pb2.StepStreamRequest:
    frame = sessions_pb2.StepFrame(session_ids=session_ids, inputs=inputs, **fields)
    return sessions_pb2.StepStreamRequest(frame_id=frame_id, step=frame)


def reset_frame(frame_id: int, session_ids: Sequence[str], **fields: Any) -> sessions_pb2.StepStreamRequest:
    frame = sessions_pb2.ResetFrame(session_ids=session_ids, **fields)
    return sessions_pb2.StepStreamRequest(frame_id=frame_id, reset=frame)


def rows_of(answers: Sequence[Answer], sizes: Sequence[int]) -> dict[int, dict[str, Array]]:
    """The outputs of each applied member, put together from a frame's parts."""
    found: dict[int, dict[str, Array]] = {}
    for answer in answers:
        members = list(range(len(sizes))) if answer.all_members else list(answer.members)
        outputs, start = arrays(answer.outputs), 0
        for member in members:
            end = start + sizes[member]
            found[member] = {name: array[start:end] for name, array in outputs.items()}
            start = end
        assert all(len(array) == start for array in outputs.values())
    return found
