"""Changes to a model's layers for a while, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from stepwell_server.compile.graph.tensorflow_setup import keras


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give one object another attribute; afterwards it has again what it had, or none of its own.

    It goes past Keras's ``__setattr__``, which tracks what it sees and locks built layers.
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
    """Let a model run at any batch size and any number of time steps, statelessly.

    Checks against the saved input shape are off (a saved batch size or number of time steps is no part of
    what the model computes), ``stateful`` layers start from their initial state and keep nothing, dropout
    masks are not prepared (it changes a seed, which cannot be frozen) but for ``has_dropout``.
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
