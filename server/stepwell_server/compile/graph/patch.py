"""Temporary changes to a model's layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from stepwell_server.compile.graph.tensorflow_setup import keras


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of one object, and restore it afterwards.

    This bypasses Keras's ``__setattr__``, which tracks values and locks built layers.
    """
    own = vars(owner)
    had, before = name in own, own.get(name)
    own[name] = value
    try:
        yield
    finally:
        if had:
            own[name] = before
        else:
            own.pop(name, None)


@contextlib.contextmanager
def relaxed(model: Any, *, has_dropout: bool = False) -> Iterator[None]:
    """Allow a model to run at any batch size and number of time steps, without keeping state.

    Checks against the saved input shape are disabled, because a saved batch size or number of time steps does not
    affect the computation. ``stateful`` layers start from their initial state and keep nothing. Dropout masks are not
    prepared, unless ``has_dropout``, because that changes a seed, which cannot be frozen.
    """
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.Model):
                stack.enter_context(attribute(layer, "_assert_input_compatibility", _nothing))
            if isinstance(layer, keras.layers.RNN):
                stack.enter_context(attribute(layer, "stateful", False))
                if not has_dropout:
                    stack.enter_context(attribute(layer, "_maybe_config_dropout_masks", _nothing))
        yield


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None
