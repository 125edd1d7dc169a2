"""The seed's way: a stateful Keras model for each session, called eagerly in a grpc.aio server.

`Stream` takes the features of one time step as float32 and sends back the outputs; each stream is a session and
has a model of its own. Prints its address.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np


class Seed:
    """The call, and how a session's model is made."""

    def __init__(self, path: str) -> None:
        from stepwell_server.compile.graph.tensorflow_setup import keras

        self._keras = keras
        self._saved = keras.saving.load_model(path)

    def _new_model(self) -> Any:
        keras, (lstm, dense) = self._keras, self._saved.layers[-2:]
        features = self._saved.input_shape[-1]
        model = keras.Sequential(
            [
                keras.Input(batch_shape=(1, 1, features)),
                keras.layers.LSTM(lstm.units, return_sequences=True, stateful=True),
                keras.layers.Dense(dense.units),
            ]
        )
        model.set_weights(self._saved.get_weights())
        return model

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> None:
        model = self._new_model()
        while (request := await context.read()) is not grpc.aio.EOF:
            x = np.frombuffer(request, np.float32).reshape(1, 1, -1)
            await context.write(np.asarray(model(x, training=False)).tobytes())


async def serve(path: str) -> None:
    handlers: dict[str, Any] = {"Stream": grpc.stream_stream_rpc_method_handler(Seed(path).stream)}
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Seed", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
