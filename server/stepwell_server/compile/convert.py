"""The traced step as an artefact: a LiteRT flatbuffer, or a SavedModel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from stepwell_server.compile.errors import gist
from stepwell_server.compile.rewrite import rewritten
from stepwell_server.compile.tensorflow_setup import tf

#: LiteRT reduces the argument of these to a period in a way that loses digits from 1e7 on, and leaves [-1, 1] from 1e9
#: on: a clock in seconds or milliseconds is such a number.
_INEXACT = frozenset({"Sin", "Cos"})


class ConversionError(Exception):
    """The step cannot be converted. The message is one clause for people."""


def freeze(function: Any) -> Any:
    """Return the function with its weights as constants: LiteRT packs them once, as those of FULLY_CONNECTED.

    Raises:
        ConversionError: the function reads something else than variables, such as a lookup table.
    """
    try:
        frozen = rewritten(convert_variables_to_constants_v2(function))
    except (KeyError, ValueError, tf.errors.OpError) as error:
        raise ConversionError(f"its variables cannot be made constants ({gist(error)})") from error
    signature = function.structured_input_signature[1]
    order = [tensor.name.split(":")[0] for tensor in frozen.inputs]
    if not set(order) <= set(signature):
        raise ConversionError("it reads a lookup table")
    keys = sorted(function.structured_outputs)  # Freezing forgets the names; flattening sorted them.

    def step(**tensors: Any) -> dict[str, Any]:
        results = frozen(*(tensors[key] for key in order))
        return dict(zip(keys, (tf.identity(result) for result in results), strict=True))

    return tf.function(step, autograph=False).get_concrete_function(**signature)


def to_litert(function: Any, folder: Path) -> None:
    """Write the frozen ``function`` as ``program.tflite``, of built-in operators only.

    Raises:
        ConversionError: LiteRT has no built-in operators for it, or some that are wrong for large numbers.
    """
    inexact = sorted(_INEXACT & _kinds(function.graph))
    if inexact:
        names = " and ".join(inexact).lower()
        raise ConversionError(f"its {names} {'is' if len(inexact) == 1 else 'are'} wrong for large numbers")
    holder = tf.Module()
    holder.step = function
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], holder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        content = converter.convert()
    except Exception as error:  # The converter raises types of its own, and plain ones.
        raise ConversionError(_complaint(str(error))) from error
    (folder / "program.tflite").write_bytes(content)


def to_tensorflow(function: Any, model: Any, folder: Path) -> None:
    """Write ``saved_model/`` with the signature ``step``; ``model`` owns what the function reads.

    Raises:
        ConversionError: TensorFlow cannot save it.
    """
    holder = tf.Module()
    holder.step = function
    holder.model = model
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)  # Nobody trains it.
    try:
        tf.saved_model.save(
            holder, str(folder / "saved_model"), signatures={"step": function}, options=options
        )
    except Exception as error:  # TensorFlow raises whatever it likes here.
        raise ConversionError(gist(error)) from error


def _kinds(graph: Any) -> set[str]:
    """Return what kinds of operations there are, in functions that are called too."""
    found = {op.type for op in graph.get_operations()}
    for function in graph._functions.values():
        if hasattr(function, "graph"):
            found |= _kinds(function.graph)
        else:  # One of an imported graph has its definition only.
            found |= {node.op for node in function.definition.node_def}
    return found


def _complaint(text: str) -> str:
    missing = re.search(r"(?:TF Select ops|Custom ops): ([\w, ]+)", text)
    if missing:
        return f"no built-in operator for {missing[1].strip()}"
    error = re.search(r"error: (.+)", text)
    return (error[1] if error else gist(text))[:200]
