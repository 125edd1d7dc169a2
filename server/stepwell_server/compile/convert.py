"""The traced step as an artefact: a LiteRT flatbuffer, or a SavedModel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stepwell_server.compile.archive import first_line
from stepwell_server.compile.tensorflow_setup import tf


class ConversionError(Exception):
    """LiteRT has no built-in operators for this step. The message is one clause for people."""


def to_litert(function: Any, folder: Path) -> None:
    """Write ``program.tflite``, of built-in operators only.

    Raises:
        ConversionError: the step cannot be converted.
    """
    holder = tf.Module()
    holder.step = function
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], holder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        content = converter.convert()
    except Exception as error:  # The converter raises types of its own, and plain ones.
        raise ConversionError(_complaint(str(error))) from error
    (folder / "program.tflite").write_bytes(content)


def to_tensorflow(function: Any, folder: Path) -> None:
    """Write ``saved_model/`` with the signature ``step``."""
    holder = tf.Module()
    holder.step = function
    tf.saved_model.save(holder, str(folder / "saved_model"), signatures={"step": function})


def _complaint(text: str) -> str:
    missing = re.search(r"(?:TF Select ops|Custom ops): ([\w, ]+)", text)
    if missing:
        return f"no built-in operator for {missing[1].strip()}"
    return first_line(text)[:200]
