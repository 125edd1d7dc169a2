"""Random inputs that a model accepts: indices within their tables, and some masked time steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stepwell_server.compile.graph.interface import Interface
from stepwell_server.compile.graph.patch import attribute, relaxed
from stepwell_server.compile.graph.tensorflow_setup import keras, tf

Array = npt.NDArray[np.generic]
#: Rows of a random batch, enough for masks that differ between rows.
ROWS = 3
#: Upper bound of integers that index no known table, unless a table of any kind is smaller.
_INTEGERS = 4
#: Layers that compute indices within their own bounds.
_INDEXING = (keras.layers.Discretization, keras.layers.Hashing, keras.layers.IntegerLookup)
#: Rows of a hard batch, their scales, and the sizes of disturbances.
HARD_ROWS = 8
_SCALES = (1.0, 1.0, 1e-3, 1e-3, 1e3, 10.0, 1.0, 1e3)
_DISTURBANCES = (1.0, 10.0, 1e3, 1e-2)
#: Share of masked time steps, or of indices that are 0, which may mean masked.
_MASKED = 0.3


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of an IntegerLookup."""

    known: tuple[int, ...]
    """Its words and its mask token."""
    is_closed: bool
    """It accepts nothing else, because it has no out-of-vocabulary indices."""

    @property
    def values(self) -> tuple[int, ...]:
        """Numbers to draw: the known ones and, if accepted, an unknown one."""
        return self.known if self.is_closed else (*self.known, max(self.known) + 1)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws random inputs for one model."""

    interface: Interface
    tables: Mapping[int, int]
    """For inputs (by position) that are indices, the size of the smallest table that they index."""
    mask_values: tuple[float, ...]
    """Values that the model's Masking layers mask."""
    compared: tuple[float, ...] = ()
    """Numbers that the model's graph compares values with, such as tokens and thresholds."""
    vocabularies: Mapping[int, Vocabulary] = dataclasses.field(default_factory=dict)
    """Vocabularies of inputs that are looked up directly."""
    integers: int = _INTEGERS
    """Upper bound of integers that index no known table."""
    is_guessed: bool = False
    """``tables`` has every input, because some indices are computed: small values are always accepted, others may be."""

    @property
    def whole(self) -> frozenset[int]:
        """Inputs that are meaningful integers, whatever their type."""
        return frozenset((*self.tables, *self.vocabularies))

    @property
    def exact(self) -> tuple[float, ...]:
        """Numbers with an exact meaning, which must not be perturbed."""
        return (*self.mask_values, *self.compared)

    def draw(
        self, rng: np.random.Generator, temporal: Sequence[bool], steps: int, rows: int = ROWS
    ) -> tuple[Array, ...]:
        """Return one array per input, with ``steps`` time steps if it is temporal."""
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

    def hard(self, rng: np.random.Generator, temporal: Sequence[bool], steps: int) -> tuple[Array, ...]:
        """Return ``HARD_ROWS`` rows of long sequences with different difficulties.

        They differ in scale (0.001 to 1,000) and in the time steps with special values, which masks or comparisons look
        for, or which are the bounds of a vocabulary.
        """
        drawn = self.draw(rng, temporal, steps, HARD_ROWS)
        special = [_special_steps(rng, row, steps) for row in range(HARD_ROWS)]
        arrays = []
        for i, (value, timed) in enumerate(zip(drawn, temporal, strict=True)):
            array = np.array(value)
            floating = np.issubdtype(array.dtype, np.floating) and i not in self.whole
            if floating:
                scales = np.reshape(_SCALES, (HARD_ROWS, *[1] * (array.ndim - 1)))
                held = np.isin(array, self.mask_values)
                array = np.where(held, array, array * scales).astype(array.dtype)
            if timed:
                for row, places in enumerate(special):
                    self._place(rng, i, array[row], places)
            arrays.append(array)
        return tuple(arrays)

    def _place(self, rng: np.random.Generator, i: int, row: Array, places: Array) -> None:
        """Insert special values, the same one for all features of a time step."""
        values = self._special(i, row.dtype)
        if len(values):
            drawn = rng.choice(values, len(places))
            row[places] = drawn.reshape(-1, *[1] * (row.ndim - 1)).astype(row.dtype)

    def _special(self, i: int, dtype: np.dtype[Any]) -> Array:
        if dtype == np.bool_:
            return np.array([False])
        if i in self.vocabularies:
            return np.array(self.vocabularies[i].values)
        if np.issubdtype(dtype, np.floating) and i not in self.tables:
            return np.array([*self.mask_values, *self.compared, 0.0])
        size = self.tables.get(i, self.integers)
        tokens = {int(value) for value in self.compared if value == int(value)} | {0, 1, size - 2, size - 1}
        return np.array(sorted(token for token in tokens if 0 <= token < size))

    def disturbed(
        self, rng: np.random.Generator, temporal: Sequence[bool], inputs: Sequence[Array]
    ) -> tuple[tuple[Array, ...], dict[int, int]]:
        """Return hard rows with one disturbed time step in every second row, and these time steps by row."""
        changed = tuple(np.array(value) for value in inputs)
        steps = next((value.shape[1] for value, timed in zip(inputs, temporal, strict=True) if timed), 1)
        rows = range(1, HARD_ROWS, 2)
        times = {row: (steps * (2 * k + 1)) // (2 * len(rows)) for k, row in enumerate(rows)}
        for i, (array, timed) in enumerate(zip(changed, temporal, strict=True)):
            for k, (row, at) in enumerate(times.items()):
                if timed:
                    array[row, at] = self._other(
                        rng, i, array[row, at], _DISTURBANCES[k % len(_DISTURBANCES)]
                    )
        return changed, times

    def _other(self, rng: np.random.Generator, i: int, value: Array, size: float) -> Array:
        """Return a different value for one time step: a number moved by ``size``, another index, a flipped boolean."""
        array: Any = np.asarray(value)
        if array.dtype == np.bool_:
            return np.asarray(np.logical_not(array), np.bool_)
        if i in self.vocabularies:
            values = np.array(self.vocabularies[i].values)
            others = [rng.choice(values[values != one] if len(values) > 1 else values) for one in array.flat]
            return np.reshape(others, array.shape).astype(array.dtype)
        if np.issubdtype(array.dtype, np.floating) and i not in self.tables:
            noise = rng.standard_normal(array.shape)
            return np.asarray(array + size * (1 + np.abs(noise)) * np.sign(noise), array.dtype)
        count = self.tables.get(i, self.integers)
        return np.asarray((array + rng.integers(1, max(count, 2), array.shape)) % count, array.dtype)

    def _values(self, rng: np.random.Generator, i: int, dtype: str, shape: tuple[int, ...]) -> Array:
        kind = np.dtype(plain_dtype(dtype))
        if i in self.vocabularies:
            return rng.choice(np.array(self.vocabularies[i].values), shape).astype(kind)
        if i in self.tables:
            indices = rng.integers(0, self.tables[i], shape)
            return np.where(rng.random(shape) < _MASKED, 0, indices).astype(kind)
        if kind == np.bool_:
            return rng.random(shape) < 0.5
        if np.issubdtype(kind, np.integer):
            return rng.integers(0, self.integers, shape).astype(kind)
        return rng.standard_normal(shape).astype(kind)


def _special_steps(rng: np.random.Generator, row: int, steps: int) -> Array:
    """Return the time steps of a hard row with special values, in different patterns."""
    everything = np.arange(steps)
    third = max(steps // 3, 1)
    return (
        everything[:0],
        everything[rng.random(steps) < _MASKED],
        everything[:third],
        everything[-third:],
        everything[::2],
        everything[third:-third],
        everything,
        everything[rng.random(steps) < _MASKED / 10],
    )[row % HARD_ROWS]


def plain_dtype(dtype: str) -> str:
    """Return the type that represents ``dtype`` in a program: NumPy has no bfloat16, but float32 holds it exactly."""
    return "float32" if dtype == "bfloat16" else dtype


def fitted(sampler: Sampler, compared: Sequence[float], table_sizes: Sequence[int]) -> Sampler:
    """Return a sampler that knows the values that the graph compares with, and the sizes of its tables."""
    integers = max(min((_INTEGERS, *table_sizes)), 1)
    return dataclasses.replace(sampler, compared=tuple(compared), integers=integers)


def make_sampler(interface: Interface, temporal: Sequence[bool]) -> Sampler:
    """Create a sampler. One call of the model shows which inputs are indices into tables or words of a vocabulary."""
    layers = interface.model._flatten_layers()
    masks = tuple(float(layer.mask_value) for layer in layers if isinstance(layer, keras.layers.Masking))
    sizes = {layer: _table_size(layer) for layer in layers if _table_size(layer)}
    lookups = [layer for layer in layers if isinstance(layer, keras.layers.IntegerLookup)]
    known = {layer: words for layer in lookups if (words := _vocabulary(layer)).known}
    if not sizes and not known:
        return Sampler(interface, {}, masks)
    # Draw every input as indices that fit all tables, and find those that reach a table unchanged.
    everything = dict.fromkeys(range(len(interface.inputs)), min(sizes.values(), default=_INTEGERS))
    inputs = Sampler(interface, everything, ()).draw(np.random.default_rng(0), temporal, 9)
    arrived, made = _arrivals(interface, inputs, sizes, known)
    tables: dict[int, int] = {}
    looked_up: dict[int, Vocabulary] = {}
    for layer, values in arrived:
        source = next((i for i, value in enumerate(inputs) if np.array_equal(value, values)), None)
        if layer in known:
            if source is not None:
                looked_up[source] = known[layer]
        elif source is not None:
            tables[source] = min(sizes[layer], tables.get(source, sizes[layer]))
        elif not any(np.array_equal(value, values) for value in made):
            # Indices are computed: use values that fit all tables.
            return Sampler(interface, everything, (), is_guessed=True)
    for i in tables.keys() & looked_up.keys():  # Both: use what each of them accepts.
        fits = tuple(word for word in looked_up[i].known if 0 <= word < tables[i])
        looked_up[i] = Vocabulary(fits or (0,), is_closed=True)
        del tables[i]
    typed = _with_index_types(interface, (*tables, *looked_up))
    return Sampler(typed, tables, masks, vocabularies=looked_up)


def _table_size(layer: Any) -> int:
    if isinstance(layer, keras.layers.Embedding):
        return int(layer.input_dim)
    if isinstance(layer, keras.layers.CategoryEncoding):
        return int(layer.num_tokens)
    return 0


def _vocabulary(layer: Any) -> Vocabulary:
    mask = () if layer.mask_token is None else (int(layer.mask_token),)
    words = (int(word) for word in layer.get_vocabulary(include_special_tokens=False))
    return Vocabulary((*mask, *words), is_closed=not layer.num_oov_indices)


def _arrivals(
    interface: Interface,
    inputs: Sequence[Array],
    sizes: Mapping[Any, int],
    known: Mapping[Any, Vocabulary],
) -> tuple[list[tuple[Any, Array]], list[Array]]:
    """Call the model; return the values that reach each layer, and the indices that layers computed within bounds."""
    seen: list[tuple[Any, Array]] = []
    made: list[Array] = []

    def recorder(layer: Any) -> Any:
        original = layer.call

        def call(values: Any, *args: Any, **kwargs: Any) -> Any:
            if layer in sizes or layer in known:
                seen.append((layer, np.asarray(values)))
            if layer in known:  # Use known words: another number may be an error.
                words = np.array(known[layer].known)
                values = tf.cast(words[np.asarray(values).astype(int) % len(words)], values.dtype)
            result = original(values, *args, **kwargs)
            if isinstance(layer, _INDEXING):
                made.append(np.asarray(result))
            return result

        return call

    with relaxed(interface.model), contextlib.ExitStack() as stack:
        for layer in interface.model._flatten_layers():
            if layer in sizes or isinstance(layer, _INDEXING):
                stack.enter_context(attribute(layer, "call", recorder(layer)))
        interface.call(
            [tf.cast(value, info.dtype) for value, info in zip(inputs, interface.inputs, strict=True)]
        )
    return seen, made


def _with_index_types(interface: Interface, indices: Collection[int]) -> Interface:
    """Set the type of index inputs to integer: the file of a subclassed model has no input types."""
    if hasattr(interface.model, "_inputs_struct") or getattr(interface.model, "_functional", None):
        return interface
    inputs = tuple(
        dataclasses.replace(info, dtype="int32") if i in indices else info
        for i, info in enumerate(interface.inputs)
    )
    return dataclasses.replace(interface, inputs=inputs)
