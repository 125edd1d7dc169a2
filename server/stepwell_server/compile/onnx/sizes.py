"""Refuses graphs in which values that callers send decide how large a tensor is.

The sizes of all other tensors follow from the number of rows: the compiler's trial in the sandbox bounds the memory
of a run. A size that a caller chooses would have no bound in the server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import onnx

from stepwell_server.compile.errors import ModelError, quoted

#: Operators that make a tensor of the size that some of their inputs say, with the places of these inputs.
_SIZED_BY: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        ["ConstantOfShape", "BlackmanWindow", "HammingWindow", "HannWindow", "ImageDecoder"], (0,)
    ),
    **dict.fromkeys(["Expand", "Tile", "OneHot", "DFT", "AffineGrid", "CenterCropPad"], (1,)),
    **dict.fromkeys(["Resize", "Upsample"], (1, 2, 3)),
    "Range": (0, 1, 2),
    "MelWeightMatrix": (0, 1),
    "Col2Im": (1, 2),
    "MaxUnpool": (2,),
    "Pad": (1, 3),
    "STFT": (1, 3),
    # of ONNX Runtime
    "CropAndResize": (3,),
    **dict.fromkeys(["BeamSearch", "WhisperBeamSearch", "GreedySearch", "Sampling"], (1, 2, 3)),
}
#: Operators whose results are smaller than an input, by how much its values say; by the first input that decides.
_CUT_BY = {
    **dict.fromkeys(["NonZero", "Unique", "NonMaxSuppression"], 0),
    **dict.fromkeys(["Slice", "Compress", "TopK", "Split", "SplitToSequence", "Reshape", "Trilu"], 1),
}
#: Operators that can make a tensor larger with each pass of a loop.
_GROWING = frozenset(["Concat", "ConcatFromSequence", "SequenceInsert", *_SIZED_BY])
_FIX = "Make it constant, or of the shape of an input"


@dataclasses.dataclass(frozen=True)
class _Known:
    """What depends on the values that callers send."""

    values: set[str]
    """Tensors whose elements do."""
    sizes: set[str]
    """Tensors whose shapes do, within bounds."""
    made: set[str]
    """All tensors so far. ONNX Runtime also runs operators that a file lists before those that they need."""

    def inner(self) -> _Known:
        return _Known(set(self.values), set(self.sizes), set(self.made))


def require_bounded(graph: onnx.GraphProto, given: Collection[str]) -> None:
    """Check that no size depends on the values of these inputs.

    Raises:
        ModelError: one does; the message names operator and tensors.
    """
    _walk(graph, _Known(set(given), set(), {*given, *(each.name for each in graph.input)}))


def _walk(graph: onnx.GraphProto, known: _Known) -> None:
    known.made.update(each.name for each in graph.initializer)
    for node in graph.node:
        later = [name for name in node.input if name and name not in known.made]
        _mark(later, known, depends=True, is_open=True)
        sizing = [node.input[at] for at in _SIZED_BY.get(node.op_type, ()) if at < len(node.input)]
        chosen = [name for name in sizing if name in known.values]
        if chosen:
            raise ModelError(
                f"operator {node.op_type} {_name(node)}: the size of its result must not depend on what callers send, else a "
                f"step could take any amount of memory; its input {quoted(chosen[0])} does. {_FIX}"
            )
        if any(True for _ in _graphs(node)):
            _walk_graphs(node, known)
            continue
        cut = _CUT_BY.get(node.op_type)
        depends = any(name in known.values or name in known.sizes for name in node.input)
        is_open = any(name in known.sizes for name in node.input) or (
            cut is not None and any(name in known.values for name in node.input[cut:])
        )
        if node.op_type in {"Shape", "Size"}:
            depends, is_open = is_open, False
        _mark(node.output, known, depends=depends, is_open=is_open)


def _walk_graphs(node: onnx.NodeProto, known: _Known) -> None:
    """If, Loop, Scan and the like: their graphs see the tensors around them."""
    graphs = list(_graphs(node))
    if node.op_type == "Loop" and len(graphs) == 1:
        _walk_loop(node, graphs[0], known)
        return
    # the branches of an If see what is around them: only its condition decides between their sizes
    is_branch = node.op_type == "If"
    used = (
        set(node.input)
        if is_branch
        else {name for graph in graphs for name in _used(graph)} | set(node.input)
    )
    depends = bool(used & (known.values | known.sizes))
    is_open = depends if is_branch else bool(used & known.sizes)
    for graph in graphs:
        inner = known.inner()
        _mark([each.name for each in graph.input], inner, depends=depends, is_open=depends)
        _walk(graph, inner)
        is_open = is_open or any(each.name in inner.sizes for each in graph.output)
        depends = depends or any(each.name in inner.values for each in graph.output)
    _mark(node.output, known, depends=depends, is_open=is_open)


def _walk_loop(node: onnx.NodeProto, body: onnx.GraphProto, known: _Known) -> None:
    """A loop gives the results of a pass to the next one, so its body is walked until no more is found."""
    takes, gives = [each.name for each in body.input], [each.name for each in body.output]
    before = [name in known.values for name in node.input], [name in known.sizes for name in node.input]
    while True:
        inner = known.inner()
        for name, depends, is_open in zip(takes, *before, strict=False):
            _mark([name], inner, depends=depends, is_open=is_open)
        _walk(body, inner)
        after = tuple(
            [was or (at > 0 and at <= len(gives) and gives[at - 1] in found) for at, was in enumerate(each)]
            for each, found in zip(before, (inner.values, inner.sizes), strict=True)
        )
        if after == before:
            break
        before = after[0], after[1]
    ends = [name for name in (*node.input[:2], *gives[:1]) if name in inner.values]
    if ends:
        _require_even(node, body, ends[0])
    for output, result in zip(node.output, gives[1:], strict=False):
        _mark([output], known, depends=bool(ends) or result in inner.values, is_open=result in inner.sizes)


def _require_even(node: onnx.NodeProto, body: onnx.GraphProto, end: str) -> None:
    """Check that a loop whose passes callers decide needs as much memory in the last pass as in the first.

    Raises:
        ModelError: it does not.
    """
    count = max(0, len(node.input) - 2)
    rule = (
        f"operator Loop {_name(node)}: what callers send must not decide how often it runs, by {quoted(end)}, as each pass "
        "takes more memory"
    )
    if len(node.output) > count:
        raise ModelError(f"{rule}: it collects {quoted(body.output[-1].name)}. {_FIX}")
    reached = {each.name for each in body.input[2:]}
    forward = []
    for each in body.node:
        if reached & {*each.input, *(name for graph in _graphs(each) for name in _used(graph))}:
            reached |= set(each.output)
            forward.append(each)
    wanted = {each.name for each in body.output[1:]}
    for each in reversed(forward):
        if not wanted & set(each.output):
            continue
        wanted |= set(each.input)
        kinds = {each.op_type, *(inner.op_type for graph in _graphs(each) for inner in _nodes(graph))}
        if grows := sorted(kinds & _GROWING):
            raise ModelError(f"{rule}: in it, {grows[0]} {_name(each)} may add to what it carries. {_FIX}")


def _mark(names: Collection[str], known: _Known, *, depends: bool, is_open: bool) -> None:
    known.made.update(names)
    for names_of, is_in in ((known.values, depends), (known.sizes, is_open)):
        if is_in:
            names_of.update(names)
        else:
            names_of.difference_update(names)


def _name(node: onnx.NodeProto) -> str:
    return quoted(node.name or (node.output[0] if node.output else ""))


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in _graphs(node):
            yield from _nodes(inner)


def _used(graph: onnx.GraphProto) -> set[str]:
    """The names that a graph and those in it read."""
    return {name for node in _nodes(graph) for name in node.input} | {each.name for each in graph.output}
