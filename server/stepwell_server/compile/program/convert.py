"""Converts the traced step into an artefact: a LiteRT flatbuffer or a SavedModel."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.python.lite import TFLiteFrozenGraphConverterV2
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from stepwell_server.compile.errors import gist
from stepwell_server.compile.graph.scopes import layer_of, named
from stepwell_server.compile.graph.tensorflow_setup import tf
from stepwell_server.compile.program.rewrite import rewritten
from stepwell_server.compile.program.sizes import with_known_sizes
from stepwell_server.program import SAVED_MODEL

#: LiteRT's argument reduction of these loses digits from 1e7 on, and its results leave [-1, 1] from 1e9 on.
#: Timestamps in seconds or milliseconds are that large.
_INEXACT = frozenset({"Sin", "Cos"})


#: NumPy's names of types by the converter's names.
_TYPES = {"i1": "bool", "i8": "int8", "i16": "int16", "i32": "int32", "i64": "int64", "ui8": "uint8"}


class ConversionError(Exception):
    """The step cannot be converted. The message is a clause."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A function of one time step with its weights as constants: LiteRT packs constants once, for example of FULLY_CONNECTED."""

    function: Any
    """With what LiteRT needs to compute as TensorFlow does."""
    inlined: Any
    """Without that."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    signature: Mapping[str, Any]

    def traced(self) -> Any:
        """Return it as a concrete function whose arguments and results have names."""

        def step(**tensors: Any) -> dict[str, Any]:
            results = self.function(*(tensors[key] for key in self.inputs))
            return dict(zip(self.outputs, (tf.identity(result) for result in results), strict=True))

        return tf.function(step, autograph=False).get_concrete_function(**self.signature)


def freeze(function: Any) -> Frozen:
    """Return the function with its weights as constants.

    Raises:
        ConversionError: the function reads anything other than variables, such as a lookup table.
    """
    try:
        inlined = convert_variables_to_constants_v2(function)
        frozen = with_known_sizes(rewritten(inlined))
    except (KeyError, ValueError, tf.errors.OpError) as error:
        raise ConversionError(f"its variables cannot be converted to constants ({gist(error)})") from error
    signature = function.structured_input_signature[1]
    inputs = tuple(tensor.name.split(":")[0] for tensor in frozen.inputs)
    if not set(inputs) <= set(signature):
        raise ConversionError("it reads a lookup table, as IntegerLookup does, and LiteRT has none")
    # Freezing drops the names, and flattening had sorted them.
    return Frozen(frozen, inlined, inputs, tuple(sorted(function.structured_outputs)), signature)


def to_litert(frozen: Frozen, model: Any) -> bytes:
    """Return the function as a flatbuffer with built-in operators only.

    ``model`` is its source, for the names of layers in messages.

    Raises:
        ConversionError: LiteRT has no built-in operators for it, or only some that are inaccurate for large numbers.
    """
    inexact = sorted(_INEXACT & _kinds_on_data(frozen.function.graph))
    if inexact:
        names = " and ".join(inexact).lower()
        raise ConversionError(f"its {names} {'is' if len(inexact) == 1 else 'are'} wrong for large numbers")
    converter = TFLiteFrozenGraphConverterV2([])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        with tempfile.TemporaryDirectory(prefix="stepwell-") as folder:
            document = _saved_model(frozen)
            (Path(folder) / "saved_model.pb").write_bytes(document.SerializeToString())
            converter.saved_model_dir = folder
            converter._saved_model_tags = set(document.meta_graphs[0].meta_info_def.tags)
            converter._saved_model_exported_names = list(document.meta_graphs[0].signature_def)
            converter._saved_model_version = document.saved_model_schema_version
            content = bytes(converter._convert_from_saved_model(document.meta_graphs[0].graph_def))
    except Exception as error:  # The converter raises its own and built-in types.
        raise ConversionError(_complaint(str(error), frozen.function, model)) from error
    return _with_placed_slices(content)


def _saved_model(frozen: Frozen) -> Any:
    """Return the document of a SavedModel with this function only.

    The converter reads one. Given a function, it saves that with TensorFlow, loads it again and describes the result,
    which takes twice as long as everything else that it does.
    """
    document = saved_model_pb2.SavedModel(saved_model_schema_version=1)
    meta = document.meta_graphs.add()
    meta.meta_info_def.tags.append(tf.saved_model.SERVING)
    meta.graph_def.CopyFrom(frozen.function.graph.as_graph_def())
    signature = meta.signature_def[tf.saved_model.DEFAULT_SERVING_SIGNATURE_DEF_KEY]
    for key, tensor in zip(frozen.inputs, frozen.function.inputs, strict=True):
        signature.inputs[key].CopyFrom(_described(tensor, tensor.name))
    for key, tensor in zip(frozen.outputs, frozen.function.outputs, strict=True):
        # One tensor may be several results, or an input, too.
        node = meta.graph_def.node.add(name=f"results/{key}", op="Identity", input=[tensor.name])
        node.attr["T"].type = tensor.dtype.as_datatype_enum
        signature.outputs[key].CopyFrom(_described(tensor, f"{node.name}:0"))
    return document


def _described(tensor: Any, name: str) -> Any:
    return meta_graph_pb2.TensorInfo(
        name=name, dtype=tensor.dtype.as_datatype_enum, tensor_shape=tensor.shape.as_proto()
    )


def _with_placed_slices(content: bytes) -> bytes:
    """Let LiteRT place the results of slices when it allocates tensors, not in each run.

    It does the latter where a slice's input has an open size, the rows, although it knows them after a resize. Each run
    then moves tensors: that takes up to half of its time, and XNNPACK may read and write where they were. Only a remark
    about open sizes changes, in place.
    """
    changed = bytearray(content)
    model = schema.Model.GetRootAsModel(changed, 0)
    for graph in (model.Subgraphs(i) for i in range(model.SubgraphsLength())):
        slices = [
            op
            for op in (graph.Operators(i) for i in range(graph.OperatorsLength()))
            if model.OperatorCodes(op.OpcodeIndex()).BuiltinCode() == schema.BuiltinOperator.SLICE
        ]
        made = {op.Outputs(0) for op in slices}  # LiteRT takes their sizes for final without the remark.
        for place in {op.Inputs(0) for op in slices} - made:
            tensor = graph.Tensors(place)
            if tensor.ShapeSignatureLength():
                tensor.ShapeSignatureAsNumpy()[:] = tensor.ShapeAsNumpy()
    return bytes(changed)


def to_tensorflow(function: Any, model: Any) -> dict[str, bytes]:
    """Return the files of a SavedModel with the signature ``step``; ``model`` owns the function's variables.

    Raises:
        ConversionError: TensorFlow cannot save it.
    """
    holder = tf.Module()
    holder.step = function
    holder.model = model
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)  # It is never trained.
    with tempfile.TemporaryDirectory(prefix="stepwell-") as name:
        folder = Path(name)
        try:
            tf.saved_model.save(holder, name, signatures={"step": function}, options=options)
        except Exception as error:  # TensorFlow may raise anything.
            raise ConversionError(gist(error)) from error
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return {f"{SAVED_MODEL}{file.relative_to(folder).as_posix()}": file.read_bytes() for file in files}


def _kinds_on_data(graph: Any) -> set[str]:
    """Return the kinds of operations that process inputs, including those in called functions.

    The converter computes constants.
    """
    found = dict[str, str]()
    for op in graph.get_operations():
        if op.type == "Placeholder" or any(value.op.name in found for value in op.inputs):
            found[op.name] = op.type
    kinds = set(found.values())
    for function in graph._functions.values():
        if hasattr(function, "graph"):
            kinds |= _kinds_on_data(function.graph)
        else:  # A function of an imported graph has only its definition.
            kinds |= {node.op for node in function.definition.node_def}
    return kinds


def _operations(graph: Any) -> Iterator[tuple[str, str]]:
    """Yield kind and name of each operation, including those in called functions."""
    yield from ((op.type, op.name) for op in graph.get_operations())
    for function in graph._functions.values():
        if hasattr(function, "graph"):
            yield from _operations(function.graph)
        else:  # A function of an imported graph has only its definition.
            yield from ((node.op, node.name) for node in function.definition.node_def)


def _complaint(text: str, function: Any, model: Any) -> str:
    """Summarize the converter's error as a clause."""
    missing = re.search(r"(?:TF Select ops|Custom ops): ([\w, ]+)", text)
    if missing:
        kinds = missing[1].strip()
        return f"it has no operation for {kinds}{_where(set(kinds.split(', ')), function, model)}"
    types = re.search(r"'tfl\.(\w+)' op operand #\d+ must be .* but got 'tensor<[\dx?*]*(\w+)>'", text)
    if types:
        kind, dtype = types.groups()
        return f"its {kind} takes no {_TYPES.get(dtype, dtype)} values"
    place = re.search(r'(?:^|\n|error: )loc\((?:callsite\()?fused\["(\w+):"', text)
    if place:
        return f"its converter fails on {place[1]}{_where({place[1]}, function, model)}"
    error = re.search(r"error: (.+)", text)
    return f"its converter fails ({(error[1] if error else gist(text))[:120]})"


def _where(kinds: set[str], function: Any, model: Any) -> str:
    """Return the layers with operations of these kinds, for the end of a clause."""
    found = [layer_of(model, name) for kind, name in _operations(function.graph) if kind in kinds]
    layers = dict.fromkeys(named(model, layer) for layer in found if layer is not None)
    return f" ({', '.join(layers)})" if layers else ""
