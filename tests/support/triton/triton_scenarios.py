"""What Triton's users do, done with Triton's own Python clients. Run by `support.triton.triton_clients`, in their environment.

    python triton_scenarios.py SCENARIO ADDRESS [ARGUMENT ...]

A scenario checks what it can by itself (the accumulators are replayed in numpy) and prints the rest as JSON.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import queue
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

TIMEOUT_S = 100.0
FEATURES = 3
#: Input and output of the model `acc`.
X, Y = "x", "sum"
#: Of a request that is a prediction by a model that keeps state.
STATELESS = {"stepwell_stateless": True}
SCENARIOS: dict[str, Callable[..., Any]] = {}


def scenario(function: Callable[..., Any]) -> Callable[..., Any]:
    SCENARIOS[function.__name__] = function
    return function


def secured(address: str) -> tuple[str, Any]:
    """The address without its scheme, and what a channel there must show; None for a plain one. See `support.secured`."""
    if not address.startswith("grpcs://"):
        return address, None
    token = grpc.access_token_call_credentials(os.environ["STEPWELL_TOKEN"])
    return address[8:], grpc.composite_channel_credentials(grpc.ssl_channel_credentials(), token)


def connect(address: str, library: Any = triton, **options: Any) -> Any:
    """A client of Triton's."""
    target, credentials = secured(address)
    return library.InferenceServerClient(target, creds=credentials, **options)


def channel_to(address: str) -> grpc.Channel:
    target, credentials = secured(address)
    return grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)


def inputs(array: Any, name: str = X, datatype: str = "INT32") -> list[Any]:
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return [given]


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    """Status and message of the error that a call ends with."""
    try:
        answer = call()
    except InferenceServerException as error:
        return error.status().removeprefix("StatusCode."), error.message()
    raise AssertionError(f"no error but {answer}")


def fails(code: str, message: str, call: Callable[[], Any]) -> None:
    """Check status and whole message of an error."""
    assert error_of(call) == (code, message), error_of(call)


def must_start(sequence_id: object, model: str = "acc") -> str:
    return (
        f"inference request for sequence {sequence_id} to model '{model}' must specify the START flag on the"
        " first request of the sequence"
    )


class Sums:
    """Sequences of random length of the model `acc`, with random numbers; and what they must answer."""

    def __init__(self, ids: Sequence[int | str], seed: int, length: int = 6) -> None:
        self._random = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._ids = list(ids)
        self._length = length

    def steps(self) -> list[tuple[dict[str, Any], Any, Any]]:
        """Sequence parameters, input, right output: in a random order that keeps each sequence's own."""
        plans = {one: self._plan(one) for one in self._ids}
        order = [one for one, plan in plans.items() for _ in plan]
        self._random.shuffle(order)
        return [plans[one].pop(0) for one in order]

    def _plan(self, sequence_id: int | str) -> list[tuple[dict[str, Any], Any, Any]]:
        plan = []
        for _ in range(2):  # the second time the same id once more, after END or in the middle
            count = self._random.randint(1, self._length)
            x = self._numbers.integers(-1000, 1000, (count, 1, FEATURES)).astype(np.int32)
            ends = self._random.random() < 0.7
            for i, right in enumerate(np.cumsum(x, 0, np.int32)):
                flags = {"sequence_start": i == 0, "sequence_end": ends and i == count - 1}
                plan.append(({"sequence_id": sequence_id, **flags}, x[i], right))
        return plan


IDS: tuple[int | str, ...] = (5, "5", 6, 2**40, -1 + 2**63, "user 7", "a/b", "ключ", "x" * 128, "\n")


@scenario
def server(address: str) -> None:
    with connect(address) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("acc")
        assert client.is_model_ready("acc", "1")
        assert not client.is_model_ready("acc", "2")
        assert not client.is_model_ready("nobody")
        about = client.get_server_metadata()
        assert about.name == "stepwell"
        wanted = {"sequence", "sequence(string_id)", "statistics", "model_configuration"}
        assert wanted <= set(about.extensions)
        assert any("stepwell_revision" in extension for extension in about.extensions)


@scenario
def descriptions(address: str) -> dict[str, Any]:
    with connect(address) as client:
        names = ("acc", "lstm", "multi", "plain", "tokens")
        metadata = {name: client.get_model_metadata(name, as_json=True) for name in names}
        configs = {name: client.get_model_config(name, as_json=True)["config"] for name in names}
        missing = "Request for unknown model: 'nobody' is not found"
        other = "Request for unknown model: 'acc' version 3 is not found"
        for call in (client.get_model_metadata, client.get_model_config, client.get_inference_statistics):
            fails("NOT_FOUND", missing, functools.partial(call, "nobody"))
            fails("NOT_FOUND", other, functools.partial(call, "acc", "3"))
        return {"metadata": metadata, "configs": configs}


@scenario
def unary(address: str) -> None:
    with connect(address) as client:
        for i, (sequence, x, right) in enumerate(Sums(IDS, seed=1).steps()):
            result = client.infer("acc", inputs(x), request_id=f"r{i}", **sequence)
            np.testing.assert_array_equal(result.as_numpy(Y), right)
            response = result.get_response()
            assert (response.id, response.model_name, response.model_version) == (f"r{i}", "acc", "1")
        for i in range(3):  # the last request of each sequence came with END, or not
            x = np.full((1, FEATURES), i, np.int32)
            client.infer("acc", inputs(x), sequence_id=77, sequence_start=i == 0, sequence_end=i == 2)
        fails("INVALID_ARGUMENT", must_start(77), lambda: client.infer("acc", inputs(x), sequence_id=77))
        code, message = error_of(lambda: client.infer("acc", inputs(x)))
        assert code == "INVALID_ARGUMENT"
        assert "the model keeps state, and sequence_id is missing, 0 or empty" in message
        predicted = client.infer("acc", inputs(x), parameters=STATELESS)
        assert predicted.as_numpy(Y).tolist() == x.tolist()


@scenario
def callbacks(address: str) -> None:
    """`async_infer`: one request of each sequence at a time, many sequences at the same time."""
    with connect(address) as client:
        waiting = Sums(IDS, seed=2).steps()
        while waiting:
            now = {step[0]["sequence_id"]: step for step in reversed(waiting)}
            waiting = [step for step in waiting if now[step[0]["sequence_id"]] is not step]
            answers: queue.Queue[tuple[Any, Any, Any]] = queue.Queue()
            for one, (sequence, x, _) in now.items():
                answer = functools.partial(_put, answers, one)
                client.async_infer("acc", inputs(x), answer, **sequence)
            for _ in now:
                one, result, error = answers.get(timeout=TIMEOUT_S)
                assert error is None, error
                np.testing.assert_array_equal(result.as_numpy(Y), now[one][2])


def _put(answers: queue.Queue[tuple[Any, Any, Any]], one: Any, result: Any, error: Any) -> None:
    answers.put((one, result, error))


@scenario
def stream(address: str) -> None:
    """All at once on one stream: replies come in the order of the requests, errors in between."""
    with connect(address) as client:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        expected: list[tuple[str, Any]] = []
        x = np.ones((1, FEATURES), np.int32)
        for i, (sequence, given, right) in enumerate(Sums(IDS, seed=3).steps()):
            client.async_stream_infer("acc", inputs(given), request_id=f"r{i}", **sequence)
            expected.append((f"r{i}", right))
            if i % 7 == 0:
                client.async_stream_infer("acc", inputs(x), request_id=f"e{i}", sequence_id=f"lost-{i}")
                expected.append((f"e{i}", must_start(f"lost-{i}")))
        client.async_stream_infer("nobody", inputs(x))
        expected.append(("", "Request for unknown model: 'nobody' is not found"))
        for request_id, right in expected:
            result, error = answers.get(timeout=TIMEOUT_S)
            if isinstance(right, str):
                assert error is not None
                assert error.message() == right
            else:
                assert error is None, error
                assert result.get_response().id == request_id
                np.testing.assert_array_equal(result.as_numpy(Y), right)
        client.async_stream_infer("acc", inputs(x), enable_empty_final_response=True, parameters=STATELESS)
        result, error = answers.get(timeout=TIMEOUT_S)
        assert error is None, error
        assert result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()


@scenario
def aio(address: str) -> None:
    async def run() -> None:
        async with connect(address, triton_aio) as client:
            assert await client.is_server_ready()
            plans: dict[Any, list[Any]] = {}
            for step in Sums(IDS, seed=4).steps():
                plans.setdefault(step[0]["sequence_id"], []).append(step)

            async def one(steps: list[Any]) -> None:
                for sequence, x, right in steps:
                    result = await client.infer("acc", inputs(x), **sequence)
                    np.testing.assert_array_equal(result.as_numpy(Y), right)

            await asyncio.gather(*map(one, plans.values()))

            steps = Sums(IDS, seed=5).steps()

            async def requests() -> AsyncIterator[dict[str, Any]]:
                for sequence, x, _ in steps:
                    yield {"model_name": "acc", "inputs": inputs(x), **sequence}
                yield {"model_name": "acc", "inputs": inputs(x), "sequence_id": 404}

            answers = client.stream_infer(requests())
            for _, _, right in steps:
                result, error = await anext(answers)
                assert error is None, error
                np.testing.assert_array_equal(result.as_numpy(Y), right)
            _, error = await anext(answers)
            assert error.message() == must_start(404)

    asyncio.run(run())


@scenario
def floats(address: str, path: str, model: str = "lstm") -> None:
    """Steps a model with inputs from `path`.npz, `(sequences, T, 1, 3)`; leaves the outputs beside them."""
    x = np.load(f"{path}.npz")["x"]
    with connect(address) as client:
        name = client.get_model_metadata(model).outputs[0].name
        each = np.empty((*x.shape[:2], 1, 2), np.float32)
        for t in range(x.shape[1]):
            for one in range(len(x)):
                given = inputs(x[one, t], "x", "FP32")
                result = client.infer(model, given, sequence_id=one + 1, sequence_start=t == 0)
                each[one, t] = result.as_numpy(name)
        several = np.stack(
            [client.infer(model, inputs(one.swapaxes(0, 1), "x", "FP32"), sequence_id="t", sequence_start=True)
             .as_numpy(name) for one in x]
        )  # fmt: skip
        rows = inputs(x[:, :, 0], "x", "FP32")
        alone = client.infer(model, rows, parameters=STATELESS).as_numpy(name)
        batch = [
            client.infer(model, inputs(x[:, t, 0], "x", "FP32"), sequence_id="b", sequence_start=t == 0)
            .as_numpy(name) for t in range(x.shape[1])
        ]  # fmt: skip
    np.savez(f"{path}-out.npz", each=each, several=several, alone=alone, batch=np.stack(batch))


@scenario
def outputs(address: str) -> None:
    """Several inputs and outputs, some without a time axis; one number a row is [1]."""
    rng = np.random.default_rng(6)
    given = {
        "series": (rng.standard_normal((2, 4, 3)).astype(np.float32), "FP32"),
        "token": (rng.integers(0, 9, (2, 4, 1)).astype(np.int32), "INT32"),
        "profile": (rng.standard_normal((2, 5)).astype(np.float32), "FP32"),
    }
    wanted = [triton.InferRequestedOutput(name) for name in ("head", "echo")]
    tensors = [inputs(array, name, datatype)[0] for name, (array, datatype) in given.items()]
    with connect(address) as client:
        names = [output.name for output in client.get_model_metadata("multi").outputs]
        whole = client.infer("multi", tensors, parameters=STATELESS)
        assert [output.name for output in whole.get_response().outputs] == names
        some = client.infer("multi", tensors, outputs=wanted, sequence_id=1, sequence_start=True)
        assert [output.name for output in some.get_response().outputs] == ["head", "echo"]
        np.testing.assert_array_equal(some.as_numpy("echo"), given["series"][0])
        np.testing.assert_array_equal(some.as_numpy("head"), whole.as_numpy("head"))
        assert whole.as_numpy("each").shape == (2, 4, 1)
        assert whole.as_numpy("head").shape == (2, 2)


@scenario
def datatypes(address: str, *names: str) -> None:
    """Accumulators of one number of other types, raw and typed."""
    channel = channel_to(address)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    with connect(address) as client:
        for name in names:
            about = client.get_model_metadata(name)
            datatype = about.inputs[0].datatype
            dtype = np.dtype({"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"}
                             .get(datatype, datatype.lower()))  # fmt: skip
            x = np.array([1, 0, 1] if datatype == "BOOL" else [1, 2, 3]).astype(dtype).reshape(3, 1, 1)
            for t in range(3):
                given = inputs(x[t], "x", datatype)
                result = client.infer(name, given, sequence_id=9, sequence_start=t == 0, sequence_end=t == 2)
                total = result.as_numpy("sum")
                assert total.tolist() == [[x[: t + 1].astype(float).sum()]], (name, total)
                assert list(about.outputs[0].shape) == [-1, 1]
            typed(stub, name, datatype, x)
    channel.close()


def typed(stub: Any, name: str, datatype: str, x: Any) -> None:
    """The same with elements one by one, which FP16 does not allow."""
    fields = {
        "BOOL": "bool_contents", "FP16": "fp32_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
        "INT64": "int64_contents", "UINT64": "uint64_contents", "UINT8": "uint_contents",
        "UINT32": "uint_contents",
    }  # fmt: skip
    request = service_pb2.ModelInferRequest(model_name=name)
    request.parameters["stepwell_stateless"].bool_param = True
    request.inputs.add(name="x", datatype=datatype, shape=[1, 1])
    getattr(request.inputs[0].contents, fields.get(datatype, "int_contents")).append(x[0, 0, 0].item())
    if datatype == "FP16":
        call = stub.ModelInfer.future(request, timeout=TIMEOUT_S)
        error = call.exception()
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "needs raw contents" in error.details()
        return
    assert stub.ModelInfer(request, timeout=TIMEOUT_S).raw_output_contents[0].strip(b"\0")


@scenario
def with_token(address: str, token: str, ca: str, cert: str, key: str) -> list[str]:
    """A server that asks for tokens: its refusals of a client without one, unary and on a stream; then a client with one."""
    tls = {"ssl": True, "root_certificates": ca, "certificate_chain": cert, "private_key": key}
    client = triton.InferenceServerClient(address, **tls)
    headers = {"authorization": f"Bearer {token}"}
    x = np.ones((1, 1, FEATURES), np.float32)
    assert client.is_server_live()
    refused, _ = error_of(lambda: client.get_model_metadata("forecast"))
    name = client.get_model_metadata("forecast", headers=headers).inputs[0].name
    step = functools.partial(client.infer, "forecast", inputs(x, name, "FP32"), sequence_id=7)
    alone = step(sequence_start=True, headers=headers).as_numpy(
        client.get_model_metadata("forecast", headers=headers).outputs[0].name
    )
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
    client.async_stream_infer("forecast", inputs(x, name, "FP32"), sequence_id=8, sequence_start=True)
    result, error = answers.get(timeout=TIMEOUT_S)
    assert error is None, error
    assert (result.as_numpy(result.get_response().outputs[0].name) == alone).all()
    client.stop_stream()
    client.start_stream(lambda result, error: answers.put((result, error)))
    _, error = answers.get(timeout=TIMEOUT_S)
    client.stop_stream(cancel_requests=True)
    return [refused, error.status().removeprefix("StatusCode.")]


@scenario
def begin(address: str, sequence_id: str) -> None:
    """Starts a sequence, and leaves it."""
    with connect(address) as client:
        x = inputs(np.ones((1, FEATURES), np.int32))
        client.infer("acc", x, sequence_id=sequence_id, sequence_start=True)


@scenario
def go_on(address: str, sequence_id: str) -> Any:
    """The outputs of a step of a sequence that is there."""
    with connect(address) as client:
        x = inputs(np.ones((1, FEATURES), np.int32))
        return client.infer("acc", x, sequence_id=sequence_id).as_numpy(Y).tolist()


@scenario
def end(address: str, sequence_id: str, revision: str) -> Any:
    """Ends a sequence, always with the same request id; its output, or the error's message."""
    with connect(address) as client:
        x = inputs(np.ones((1, FEATURES), np.int32))
        parameters = {"stepwell_request_id": 77, "stepwell_revision": int(revision)}
        try:
            answer = client.infer("acc", x, sequence_id=sequence_id, sequence_end=True, parameters=parameters)
        except InferenceServerException as error:
            return error.message()
        return answer.as_numpy(Y).tolist()


@scenario
def survive(address: str, sequences: str) -> int:
    """Runs sequences while the server is killed again and again; every request is sent until it is answered.

    Returns how many times a request was sent again.
    """
    quick = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
    again = 0
    with connect(address, channel_args=quick) as client:
        for number in range(int(sequences)):
            x = np.random.default_rng(number).integers(-9, 9, (30, 1, FEATURES)).astype(np.int32)
            revision = 0
            for i, right in enumerate(np.cumsum(x, 0, np.int32)):
                flags = {"sequence_start": i == 0, "sequence_end": i == len(x) - 1}
                parameters = {"stepwell_request_id": random.getrandbits(62) + 1}
                if i:
                    parameters["stepwell_revision"] = revision
                send = functools.partial(client.infer, "acc", inputs(x[i]), sequence_id=f"s{number % 3}",
                                         parameters=parameters, client_timeout=1.0, **flags)  # fmt: skip
                result, sent = _until_answered(send)
                again += sent - 1
                if result is None:
                    assert flags["sequence_end"]
                    continue
                np.testing.assert_array_equal(result.as_numpy(Y), right)
                said = result.get_response().parameters
                assert said["stepwell_position"].int64_param == i + 1
                revision = said["stepwell_revision"].int64_param
    return again


def _until_answered(send: Callable[[], Any]) -> tuple[Any, int]:
    """The answer, None if it is lost though the request counted; and how often it was sent."""
    for sent in range(1, 10_000):
        try:
            return send(), sent
        except InferenceServerException as error:
            if "ended with this very request" in error.message():
                return None, sent
            if error.status() not in {"StatusCode.UNAVAILABLE", "StatusCode.DEADLINE_EXCEEDED"}:
                raise
            time.sleep(0.02)  # not to wait for something, but to leave the machine to the server's start
    raise AssertionError("the server did not come back")


@scenario
def is_gone(address: str, sequence_id: str) -> None:
    """A sequence is not there any more."""
    with connect(address) as client:
        x = inputs(np.ones((1, FEATURES), np.int32))
        fails("INVALID_ARGUMENT", must_start(sequence_id),
              lambda: client.infer("acc", x, sequence_id=sequence_id))  # fmt: skip


@scenario
def statistics(address: str) -> dict[str, Any]:
    """The counters before and after 10 good requests of 2 rows and 3 bad ones."""
    with connect(address) as client:
        before = client.get_inference_statistics("plain", as_json=True)["model_stats"][0]
        about = client.get_model_metadata("plain").inputs[0]
        for _ in range(10):
            client.infer("plain", inputs(np.ones((2, FEATURES), np.float32), about.name, "FP32"))
        bad = inputs(np.ones((2, 9), np.float32), about.name, "FP32")
        for _ in range(3):
            assert error_of(lambda: client.infer("plain", bad))[0] == "INVALID_ARGUMENT"
        after = client.get_inference_statistics("plain", as_json=True)["model_stats"][0]
        names = [one["name"] for one in client.get_inference_statistics(as_json=True)["model_stats"]]
        return {"before": before, "after": after, "names": names}


@scenario
def unsupported(address: str) -> None:
    with connect(address) as client:
        calls: list[Callable[[], Any]] = [
            client.get_system_shared_memory_status,
            lambda: client.register_system_shared_memory("a", "b", 1),
            client.unregister_system_shared_memory,
            client.get_cuda_shared_memory_status,
            client.get_trace_settings,
            client.get_log_settings,
        ]
        for call in calls:
            code, message = error_of(call)
            assert code == "UNIMPLEMENTED", message
            assert "support" in message or "settings" in message, message


@scenario
def both_clients(address: str, client_folder: str) -> None:
    """Triton's client and ours in one process, on one sequence."""
    sys.path.insert(0, client_folder)
    import stepwell

    with connect(address) as client, stepwell.connect(address) as ours:
        x = np.array([[1, 2, 3]], np.int32)
        client.infer("acc", inputs(x), sequence_id=31, sequence_start=True)
        client.infer("acc", inputs(x), sequence_id=31)
        with ours.open_session("acc", session_id="triton/acc/31") as session:
            (state,) = session.get_state().values()
            np.testing.assert_array_equal(state, 2 * x)
            assert (session.revision, session.position) == (2, 2)
            np.testing.assert_array_equal(session.step(x), 3 * x)
        result = client.infer("acc", inputs(x), sequence_id=31, sequence_end=True)
        np.testing.assert_array_equal(result.as_numpy(Y), 4 * x)


if __name__ == "__main__":
    print(json.dumps(SCENARIOS[sys.argv[1]](*sys.argv[2:])))
