"""Why the graph does not admit a model: the reasons, and what a user can do about each."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """A kind of refusal; the value is the way on, for people."""

    TIME = (
        "let a recurrent layer sum up the sequence, which carries what it needs from step to step, or give each step "
        "the values that it needs as features"
    )
    BACKWARDS = "use layers that read forwards: a step knows only what came before it"
    POSITION = "give the position as an input feature, or leave it out"
    LENGTH = "make it independent of the length: what is served has no end"
    END = (
        "repeat it for a fixed number of steps, which then run inside one step, or let a recurrent layer return "
        "sequences"
    )
    ROWS = "what it needs of other rows must come in as features: every session's rows are computed by themselves"
    RANDOM = (
        "leave it out at inference (training=False), or draw the numbers outside and give them as an input"
    )
    WRITES = "do it in a cell, whose state is carried for each session"
    STATE = (
        "leave the state's inputs out of the model, and pass those values as the states of open_session() or "
        "reset_states()"
    )
    LAYOUT = "give each output the batch as its first axis, and the time, if it has one, as its second"
    PYTHON = "write what it computes with keras.ops, which become part of the model"
    UNPROVEN = "if you know that it does, --trust-causality NAME serves the model on the evidence of samples"


class Refusal(Exception):
    """An operation that the proof does not let pass. The message is a clause, such as "takes a mean over time"."""

    def __init__(self, reason: Reason, clause: str) -> None:
        super().__init__(clause)
        self.reason = reason
