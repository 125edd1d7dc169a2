"""The models of a mixture of calls: several inputs and outputs, several types, and wide dense layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.checks.mixture_replay import CARRIED
from support.models import programs, zoo
from support.servers import served, server_process

WIDE = "wide"
"""The native module computes its dense layers."""
#: Others of the zoo, by the names that the server has for them.
OF_ZOO = {
    "tokens": served.MODELS["tokens"],
    "multi": served.MODELS["multi"],
    "half": "half_precision",
    "brief": "mixed_bfloat16",
    "mask": "mask_over_conv_lstm",
}


def files(names: Sequence[str] = (WIDE, *OF_ZOO)) -> dict[str, Path]:
    """The files of these models and of both versions of the one that is moved."""
    found = {
        f"{CARRIED}@1": programs.saved(served.MODELS[CARRIED]).path,
        f"{CARRIED}@2": server_process.retrained().path,
    }
    for name in names:
        if name == WIDE:
            kept = programs.kept_folder()
            found[name] = programs.saved("mixture_wide", _build_wide, kept=kept).path
        else:
            found[name] = programs.saved(OF_ZOO[name]).path
    return found


def _build_wide() -> Any:
    from stepwell_server.compile.graph.tensorflow_setup import keras

    model = keras.Sequential(
        [
            keras.Input((None, 7)),
            keras.layers.LSTM(100, return_sequences=True),
            keras.layers.Dense(9),
        ]
    )
    zoo.randomize(model, 0)
    return model
