"""One case of the larger zoo: a model, and its refusal or that it is served."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from support.models import zoo

Layer = Callable[[Any], Any]
"""Makes a layer; takes ``keras.layers``."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One model. Keras is imported when it is built."""

    name: str
    make: Callable[[Any, int | None], Any]
    """Makes the model; takes ``keras`` and the number of time steps, None for any."""
    refused: str = ""
    """Pattern of the refusal; empty: it is served."""
    lengths: tuple[int | None, ...] = (None,)
    """Time axes to build it with."""

    def build(self, steps: int | None = None, seed: int = 0) -> Any:
        """Build the model with random weights."""
        from stepwell_server.compile.graph.tensorflow_setup import keras

        model = self.make(keras, steps)
        zoo.randomize(model, seed)
        return model


def before_rnn(name: str, layer: Layer, refused: str = "", *, fixed: bool = False) -> Case:
    """A layer under test in front of a recurrent one; ``fixed``: also with a fixed time axis."""

    def make(keras: Any, steps: int | None) -> Any:
        x = keras.Input((steps, 4))
        rnn = keras.layers.SimpleRNN(3, return_sequences=True, name="rnn")
        return keras.Model(x, rnn(layer(keras.layers)(x)))

    return Case(name, make, refused, (None, 40) if fixed else (None,))


def behind_rnn(name: str, layer: Layer, refused: str = "", *, fixed: bool = False) -> Case:
    """A layer under test behind a recurrent one: what leaves it leaves the model."""

    def make(keras: Any, steps: int | None) -> Any:
        x = keras.Input((steps, 3))
        rnn = keras.layers.SimpleRNN(4, return_sequences=True, name="rnn")
        return keras.Model(x, layer(keras.layers)(rnn(x)))

    return Case(name, make, refused, (None, 40) if fixed else (None,))


# Patterns of the refusals by kind: the layer, what it does, and the fix.


def _who(layer: str) -> str:
    kind = "operation" if layer.startswith("ops.") else "layer"
    return rf"the {kind} '{re.escape(layer.removeprefix('ops.'))}\w*' \(\w+\)"


def ahead(layer: str, does: str = "") -> str:
    return rf"^model is not causal: {_who(layer)} looks ahead: it .*{does}.*; use forward layers: "


def back(layer: str, does: str = "") -> str:
    return (
        rf"^model cannot be run step by step: {_who(layer)} looks back over several time steps and keeps no state: "
        rf"it .*{does}.*; use a recurrent layer"
    )


def pairs(layer: str) -> str:
    return (
        rf"^model cannot be run step by step: {_who(layer)} depends on the whole sequence so far: it relates all time steps "
        r"to each other, as attention with a causal mask does, .*; attend to the last n steps only: .*take\(padded, "
    )


def matrix(layer: str) -> str:
    return (
        rf"^model cannot be run step by step: {_who(layer)} looks back over several time steps and keeps no state: it has a "
        r"weight for each pair of time steps; sum equal weights by keras\.ops\.cumsum, .* decay by keras\.ops\.scan"
    )


def beginning(layer: str, count: int) -> str:
    return (
        rf"^model is not causal: {_who(layer)} looks ahead: it takes the first {count} elements of the time axis, of which the "
        r"first step brings 1; take only the first one, x\[:, :1\], or"
    )


def rate(layer: str) -> str:
    does = r"(moves by \d+|takes one of every \d+ elements of the time axis)"
    return (
        rf"^model cannot be run step by step: {_who(layer)} .*{does}, but a time step brings one element; use"
    )


def elements(layer: str, count: int) -> str:
    return (
        rf"^model cannot be run step by step: {_who(layer)} returns {count} elements for each time step; use"
    )


def mixes(layer: str, does: str = "") -> str:
    return rf"^model cannot be run step by step: {_who(layer)} mixes time steps: it .*{does}.*; use a recurrent layer"


def position(layer: str) -> str:
    return rf"^model cannot be run step by step: {_who(layer)} has a different constant for each time step.*; pass the position as"


def given_position(layer: str, what: str) -> str:
    return rf"^model cannot be run step by step: {_who(layer)} is given {what} that depends on the number of the time step alone; pass"


def length(layer: str, does: str = "") -> str:
    return rf"^model cannot be run step by step: {_who(layer)} .*{does}.*; make it independent of the length"


def end(layer: str) -> str:
    return rf"^model is not causal: {_who(layer)} spreads a value of the whole sequence over its time steps; repeat it"


def rows(layer: str, does: str = "") -> str:
    return (
        rf"^the rows of a batch are not independent of each other: {_who(layer)} .*{does}.*; pass what it needs from "
        "other rows as features"
    )


def random(layer: str) -> str:
    return rf"^two calls of the model differ: {_who(layer)} draws random numbers; disable it at inference"


def writes(layer: str) -> str:
    return rf"^two calls of the model differ: {_who(layer)} changes a variable during the call \(.*\); keep the value in the state"


def layout(layer: str) -> str:
    return rf"^the rows and time steps of an output cannot be identified: {_who(layer)} moves the batch or the time axis of an output; make the batch the first axis"


def unproven(layer: str, does: str = "") -> str:
    return (
        rf"^the model is not proven to be steppable: {_who(layer)} .*{does}.*; if you know that the model can be stepped, "
        "--trust-causality NAME serves"
    )


def python(layer: str) -> str:
    return rf"^the model cannot become a program: {_who(layer)} runs Python code when it is called .*; write the computation"


def untraced(layer: str, does: str, way: str) -> str:
    return rf"^the model cannot be traced: {_who(layer)} {does} .*; {way}"


def only_length(layer: str, way: str = "build .* with keras.Input") -> str:
    return (
        rf"^the model accepts only sequences of 40 time steps, but a served sequence has no end: {_who(layer)} fails on "
        rf"another length \(.*\); .*{way}"
    )
