"""Why code in a layer's call cannot become part of a graph, read from what TensorFlow raises there."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from stepwell_server.compile.errors import ModelError, gist
from stepwell_server.compile.graph.scopes import layer_in, named


@dataclasses.dataclass(frozen=True)
class Habit:
    """Something that works on values, and not in a graph."""

    pattern: str
    """Found in the text of the error."""
    does: str
    """What the layer does: a clause."""
    way: str
    """What to do instead."""


_HABITS = (
    Habit(
        r"to a numpy array|NumPy|has no attribute '(?:numpy|item|tolist)'|"
        r"(?:float|int)\(\) argument must be .*Tensor|Tensor' object cannot be interpreted as an integer|"
        r"len is not well defined",
        "takes values out of tensors in its call() (NumPy, .numpy(), float(), int(), len()), and they have none while the "
        "model is made a program",
        "write it with keras.ops, which become part of the model",
    ),
    Habit(
        r"as a Python `?bool|Iterating over a symbolic|iterate over a (?:scalar )?tensor|as a Python bool",
        "decides in Python (if, while, for, bool()) by values of tensors, and they have none while the model is made a "
        "program",
        "compute both and choose with keras.ops.where",
    ),
    Habit(
        r"'NoneType' object is not (?:subscriptable|iterable)",
        "uses an argument of its call() that is None, because nothing passes it (Keras 3 passes no constants to a cell)",
        "give what it needs as features of each time step, or keep it in a weight",
    ),
    Habit(
        r"assertion failed: \[",
        "asserts something of its values that does not hold of all numbers, of which the samples hold large and small ones",
        "leave the assertion out of the model, and look at the values before they are sent",
    ),
)


def habit_of(error: BaseException | None) -> Habit | None:
    """Return what is known to raise such an error; None if nothing is."""
    text = str(error)
    return next((habit for habit in _HABITS if re.search(habit.pattern, text)), None)


def failed(model: Any, problem: str, error: Exception) -> ModelError:
    """Return the error for a model that raised ``error``; ``problem`` says where."""
    habit, layer = habit_of(error), layer_in(model, str(error))
    if habit is not None:
        return ModelError(f"{problem}: {named(model, layer)} {habit.does}; {habit.way}")
    who = "" if layer is None else f"{named(model, layer)} fails: "
    return ModelError(f"{problem}: {who}{type(error).__name__}: {gist(error)}")


@contextlib.contextmanager
def explained(model: Any, problem: str) -> Iterator[None]:
    """Raise what Keras and user code raise in the block as a `ModelError`; ``problem`` says where it happened."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # They raise whatever they like.
        raise failed(model, problem, error) from error
