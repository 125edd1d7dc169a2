"""Random inputs that a model can take: indices within their tables, some time steps masked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.interface import Interface
from stepwell_server.compile.patch import attribute, relaxed
from stepwell_server.compile.tensorflow_setup import keras, tf

Array = npt.NDArray[np.generic]
#: Rows of a random batch: enough for a mask to differ between rows.
ROWS = 3
#: Integers that index no known table are drawn below this.
_INTEGERS = 4
#: Share of time steps that are masked, or of indices that are 0 (which may mean masked).
_MASKED = 0.3


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws random inputs for one model."""

    interface: Interface
    tables: Mapping[int, int]
    """Inputs (by position) that are indices, and the size of the smallest table that they index."""
    mask_values: tuple[float, ...]
    """Values that the model's Masking layers take for "no data"."""

    def draw(
        self, rng: np.random.Generator, temporal: Sequence[bool], steps: int, rows: int = ROWS
    ) -> tuple[Array, ...]:
        """Return one array for each input, with ``steps`` time steps where it is temporal."""
        arrays = []
        for i, (info, timed) in enumerate(zip(self.interface.inputs, temporal, strict=True)):
            features = info.shape[2:] if timed else info.shape[1:]
            shape = (rows, *((steps,) if timed else ()), *(int(size or 1) for size in features))
            array = self._values(rng, i, info.dtype, shape)
            if timed and np.issubdtype(array.dtype, np.floating):
                for value in self.mask_values:
                    array[rng.random((rows, steps)) < _MASKED] = value
            arrays.append(array)
        return tuple(arrays)

    def _values(self, rng: np.random.Generator, i: int, dtype: str, shape: tuple[int, ...]) -> Array:
        kind = np.dtype(plain_dtype(dtype))
        if i in self.tables:
            indices = rng.integers(0, self.tables[i], shape)
            return np.where(rng.random(shape) < _MASKED, 0, indices).astype(kind)
        if kind == np.bool_:
            return rng.random(shape) < 0.5
        if np.issubdtype(kind, np.integer):
            return rng.integers(0, _INTEGERS, shape).astype(kind)
        return rng.standard_normal(shape).astype(kind)


def plain_dtype(dtype: str) -> str:
    """Return the type in which a program carries ``dtype``: NumPy has no bfloat16, float32 holds it exactly."""
    return "float32" if dtype == "bfloat16" else dtype


def make_sampler(interface: Interface, temporal: Sequence[bool]) -> Sampler:
    """Find out by one call of the model which inputs are indices into which tables."""
    layers = interface.model._flatten_layers()
    masks = tuple(float(layer.mask_value) for layer in layers if isinstance(layer, keras.layers.Masking))
    sizes = {layer: _table_size(layer) for layer in layers if _table_size(layer)}
    if not sizes:
        return Sampler(interface, {}, masks)
    # Every input is drawn as indices that fit all tables; which of them arrive at a table, unchanged?
    everything = dict.fromkeys(range(len(interface.inputs)), min(sizes.values()))
    inputs = Sampler(interface, everything, ()).draw(np.random.default_rng(0), temporal, 9)
    arrived = _arrivals(interface, inputs, list(sizes))
    tables: dict[int, int] = {}
    for layer, values in arrived:
        source = next((i for i, value in enumerate(inputs) if np.array_equal(value, values)), None)
        if source is None:
            return Sampler(interface, everything, ())  # Indices are computed: keep to what fits all tables.
        tables[source] = min(sizes[layer], tables.get(source, sizes[layer]))
    return Sampler(_with_index_types(interface, tables), tables, masks)


def _table_size(layer: Any) -> int:
    if isinstance(layer, keras.layers.Embedding):
        return int(layer.input_dim)
    if isinstance(layer, keras.layers.CategoryEncoding):
        return int(layer.num_tokens)
    return 0


def _arrivals(
    interface: Interface, inputs: Sequence[Array], layers: Sequence[Any]
) -> list[tuple[Any, Array]]:
    seen: list[tuple[Any, Array]] = []

    def recorder(layer: Any) -> Any:
        original = layer.call

        def call(values: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((layer, np.asarray(values)))
            return original(values, *args, **kwargs)

        return call

    with relaxed(interface.model), contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(attribute(layer, "call", recorder(layer)))
        interface.call(
            [tf.cast(value, info.dtype) for value, info in zip(inputs, interface.inputs, strict=True)]
        )
    return seen


def _with_index_types(interface: Interface, tables: Mapping[int, int]) -> Interface:
    """A subclassed model's file holds no input types: its index inputs are integers."""
    if hasattr(interface.model, "_inputs_struct") or getattr(interface.model, "_functional", None):
        return interface
    inputs = tuple(
        dataclasses.replace(info, dtype="int32") if i in tables else info
        for i, info in enumerate(interface.inputs)
    )
    return dataclasses.replace(interface, inputs=inputs)
