"""Explains why code in a layer's call cannot be traced, from the error that TensorFlow raises."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from stepwell_server.compile.errors import ModelError, gist
from stepwell_server.compile.graph.scopes import layer_in, named


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Code that works on values, but not in a graph."""

    regex: str
    """Matches the text of the error."""
    does: str
    """What the layer does, as a clause."""
    fix: str
    """What to do instead."""


_PATTERNS = (
    Pattern(
        r"to a numpy array|NumPy|has no attribute '(?:numpy|item|tolist)'|"
        r"(?:float|int)\(\) argument must be .*Tensor|Tensor' object cannot be interpreted as an integer|"
        r"len is not well defined",
        "reads values of tensors in its call() (NumPy, .numpy(), float(), int(), len()), which do not exist while the "
        "model is compiled",
        "write it with keras.ops, which become part of the model",
    ),
    Pattern(
        r"as a Python `?bool|Iterating over a symbolic|iterate over a (?:scalar )?tensor|as a Python bool",
        "branches in Python (if, while, for, bool()) on values of tensors, which do not exist while the model is "
        "compiled",
        "compute both branches and select with keras.ops.where",
    ),
    Pattern(
        r"'NoneType' object is not (?:subscriptable|iterable)",
        "uses an argument of its call() that is None, because nothing passes it (Keras 3 passes no constants to a cell)",
        "pass what it needs as features of each time step, or keep it in a weight",
    ),
    Pattern(
        r"assertion failed: \[",
        "contains an assertion that fails for some numbers; the samples contain large and small ones",
        "remove the assertion from the model, and check the values before you send them",
    ),
)


def pattern_of(error: BaseException | None) -> Pattern | None:
    """Return the known cause of an error, or None."""
    text = str(error)
    return next((each for each in _PATTERNS if re.search(each.regex, text)), None)


def failed(model: Any, problem: str, error: Exception) -> ModelError:
    """Return the error for a model that raised ``error``; ``problem`` describes where."""
    pattern, layer = pattern_of(error), layer_in(model, str(error))
    if pattern is not None:
        return ModelError(f"{problem}: {named(model, layer)} {pattern.does}; {pattern.fix}")
    who = "" if layer is None else f"{named(model, layer)} fails: "
    return ModelError(f"{problem}: {who}{type(error).__name__}: {gist(error)}")


@contextlib.contextmanager
def explained(model: Any, problem: str) -> Iterator[None]:
    """Convert errors of Keras and user code in the block into a `ModelError`; ``problem`` describes where."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # They may raise anything.
        raise failed(model, problem, error) from error
