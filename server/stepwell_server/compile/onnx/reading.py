"""Reads an ``.onnx`` file and refuses what no server should run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import inliner

from stepwell_server.compile.errors import ModelError, gist, quoted
from stepwell_server.compile.onnx.rows.walk import nodes_of

#: The domains of operators that are part of ONNX Runtime.
_DOMAINS = frozenset(["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
_ELEMENTS_PER_BYTE = 2
"""The smallest types have four bits."""
_SAVE = "export the model again, for example with torch.onnx.export(..., external_data=False)"


def read(file: Path) -> tuple[onnx.ModelProto, bytes]:
    """Return the model without functions, and the bytes of the file.

    Raises:
        ModelError: it is no such file, or contains something that is refused.
    """
    content = file.read_bytes()
    return parsed(content), content


def parsed(content: bytes) -> onnx.ModelProto:
    """Return the model of a file's bytes without functions, after checks of what it contains.

    Raises:
        ModelError: see `read`.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(f"not an ONNX file, or a truncated one; {_SAVE}") from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"not an ONNX file: it has no operators or no opset; {_SAVE}")
    _require_opset(model)
    if model.functions:
        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:
            raise ModelError(f"its functions cannot be inlined: {gist(error)}") from error
    graphs = [model.graph, *inner_graphs(model.graph)]
    for graph in graphs:
        if graph.sparse_initializer:
            raise ModelError("has sparse weights, which are not supported; store them as dense ones")
        _require_names(*(each.name for each in (*graph.input, *graph.output, *graph.initializer)))
        for tensor in graph.initializer:
            _require_inside(tensor, len(content))
    for node in nodes_of(model.graph):
        _require_names(node.name, node.op_type, node.domain, *node.input, *node.output)
        _require_known(node)
        for attribute in node.attribute:
            for tensor in [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]:
                _require_inside(tensor, len(content))
    return model


def inner_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in operators of a graph, such as branches."""
    for node in nodes_of(graph):
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _require_opset(model: onnx.ModelProto) -> None:
    newest = onnx.defs.onnx_opset_version()
    for each in model.opset_import:
        if each.domain in {"", "ai.onnx"} and not 1 <= each.version <= newest:
            raise ModelError(
                f"its opset must be one from 1 to {newest}, which the installed onnx knows; got {each.version}. Export it "
                f"with opset_version={newest}, or install a newer onnx and onnxruntime"
            )


def _require_known(node: onnx.NodeProto) -> None:
    if node.domain not in _DOMAINS:
        raise ModelError(
            f"operator {quoted(node.op_type)} of {quoted(node.name)} is of the domain {quoted(node.domain)}: custom operators "
            "are code and are not loaded. Export the model with the operators of ONNX only"
        )


def _require_names(*names: object) -> None:
    """Check that names are text: what is not valid UTF-8 is read as bytes."""
    for name in names:
        if not isinstance(name, str):
            raise ModelError(f"the names in it must be text (UTF-8); got {name!r:.80}")


def _require_inside(tensor: onnx.TensorProto, size: int) -> None:
    """Refuse weights outside of the file, and those that claim to be larger than it."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise ModelError(
            f"tensor {quoted(tensor.name)} must be in the file; it is in another file (external data). Save it with "
            "onnx.save(onnx.load(FILE), NEW_FILE, save_as_external_data=False)"
        )
    elements = math.prod(tensor.dims)
    if any(dim < 0 for dim in tensor.dims) or elements > _ELEMENTS_PER_BYTE * size:
        raise ModelError(
            f"tensor {quoted(tensor.name)} must have its elements in the file; its shape is {list(tensor.dims)!r:.60}, and the "
            f"file has {size} bytes"
        )
    try:
        onnx.numpy_helper.to_array(tensor)
    except Exception as error:  # of a wrong type, or another number of elements
        raise ModelError(
            f"tensor {quoted(tensor.name)} must have the elements of its shape {list(tensor.dims)!r:.60}: {gist(error)}"
        ) from error
