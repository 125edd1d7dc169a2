"""The reasons why a graph does not admit a model, each with its fix."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """A kind of refusal; the value is the fix, as part of a message."""

    TIME = "use a recurrent layer, which carries what it needs from step to step, or pass the values that each step needs as features"
    PAIRS = (
        "attend to the last n steps only: pad the sequence by n - 1 in front, and let each step take them by "
        "keras.ops.take(padded, arange(T)[:, None] + arange(n), axis=1); or use a recurrent layer"
    )
    MATRIX = (
        "sum equal weights by keras.ops.cumsum, weigh the last n steps by a causal convolution, and let weights decay by "
        "keras.ops.scan, which hands a state to the next step; or use a recurrent layer"
    )
    BEGINNING = "take only the first one, x[:, :1], or pass what the model makes of them as a static input"
    BACKWARDS = "use forward layers: a step knows only earlier time steps"
    AHEAD = (
        "use forward layers: a step knows only earlier time steps, so pad a window at its front only (padding='causal', or "
        "ZeroPadding1D((n, 0)))"
    )
    PADDING = "do that before the padding, or pass the value as a feature of each time step"
    POSITION = "pass the position as an input feature, or remove it"
    LENGTH = "make it independent of the length: a served sequence has no end"
    TABLE = "let the numbers stay within it, by keras.ops.minimum or a remainder (%), or pass what it returns as an input feature"
    RATE = (
        "use strides of 1 over time, or let each time step bring as many elements, as an input (batch, time, elements) that "
        "the model reshapes to (batch, time * elements, 1)"
    )
    END = (
        "repeat it for a fixed number of steps, which then run inside one step, or let a recurrent layer return "
        "sequences"
    )
    ROWS = (
        "pass what it needs from other rows as features: the rows of each session are computed independently"
    )
    RANDOM = "disable it at inference (training=False), or draw the numbers outside the model and pass them as an input"
    WRITES = "keep the value in the state of a cell, which each session carries"
    STATE = "let each state be an input that nothing else reads, and return it after the last time step (return_state=True) as an output: then sessions keep it; or remove the state inputs from the model, and pass those values as the states of open_session() or reset_states()"
    LAYOUT = "make the batch the first axis of each output, and time, if it has any, the second"
    PYTHON = "write the computation with keras.ops, which become part of the model"
    UNPROVEN = "if you know that the model can be stepped, --trust-causality NAME serves it on the evidence of samples"


class Refusal(Exception):
    """The proof does not accept an operation. The message is a clause, such as "takes a mean over time"."""

    def __init__(self, reason: Reason, clause: str) -> None:
        super().__init__(clause)
        self.reason = reason
