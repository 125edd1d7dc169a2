"""Step functions that are refused: each message names the tensor, the rule, the value received, and a fix."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra onnx")

import onnx
from onnx import TensorProto, helper, numpy_helper

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.keras_file import origin
from stepwell_server.compile.onnx import declaration, inspection
from stepwell_server.compile.onnx.pipeline import compile_step_function
from stepwell_server.program import Declaration, ProofOptions
from support.models import step_functions
from support.models.step_functions import FLOAT, INT, model, node
from support.samples import one_in

BRANCHES = {
    "batch_axes": {"state": 1},
    "constants": {"sr": 16000},
    "contexts": {"input": 2},
    "shapes": {"input": (4,)},
}


def other_shape() -> onnx.ModelProto:
    return model(
        [node("Identity", "h", "hn"), node("Identity", "x", "y")],
        {"x": (FLOAT, ["n", 3]), "h": (FLOAT, ["n", 4])},
        {"y": (FLOAT, ["n", 3]), "hn": (FLOAT, ["n", 5])},
    )


def grows() -> onnx.ModelProto:
    return model(
        [node("Concat", "h x", "hn", axis=1), node("Identity", "x", "y")],
        {"x": (FLOAT, ["n", 3]), "h": (FLOAT, ["n", 4])},
        {"y": (FLOAT, ["n", 3]), "hn": (FLOAT, [None, None])},
    )


def other_type() -> onnx.ModelProto:
    return model(
        [node("Cast", "h", "hn", to=FLOAT), node("Identity", "x", "y")],
        {"x": (FLOAT, ["n", 3]), "h": (INT, ["n", 4])},
        {"y": (FLOAT, ["n", 3]), "hn": (FLOAT, ["n", 4])},
    )


def scalar_output() -> onnx.ModelProto:
    return model(
        [node("ReduceSum", "x", "y", keepdims=0), node("Identity", "h", "hn")],
        {"x": (FLOAT, ["n", 3]), "h": (FLOAT, ["n", 4])},
        {"y": (FLOAT, []), "hn": (FLOAT, ["n", 4])},
    )


def test_inspection_shows_no_control_characters() -> None:
    tensors = [{"name": "x\x1b[2J", "dtype": "float", "shape": [None, 3]}]
    found = {"inputs": tensors, "outputs": [], "states": {}, "problem": "", "note": "", "options": []}
    shown = inspection.lines(Path("m.onnx"), found)
    assert shown[1] == r"  x\x1b[2J: float[?, 3]"


def only_states() -> onnx.ModelProto:
    return model(
        [node("Tanh", "h", "hn"), node("Tanh", "hn", "y")],
        {"h": (FLOAT, ["n", 4])},
        {"y": (FLOAT, ["n", 4]), "hn": (FLOAT, ["n", 4])},
    )


def nameless() -> onnx.ModelProto:
    return model(
        [node("Add", "a b", "c"), node("Tanh", "c", "d")],
        {"a": (FLOAT, ["n", 4]), "b": (FLOAT, ["n", 4])},
        {"c": (FLOAT, ["n", 4]), "d": (FLOAT, ["n", 4])},
    )


def custom() -> onnx.ModelProto:
    found = step_functions.cell()
    found.graph.node[3].domain = "org.other"
    found.opset_import.append(helper.make_opsetid("org.other", 1))
    return found


def outside() -> onnx.ModelProto:
    found = step_functions.cell()
    tensor = found.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return found


def outside_in_a_branch() -> onnx.ModelProto:
    found = step_functions.branches()
    branch = next(each for each in found.graph.node if each.op_type == "If").attribute[0].g
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "inner")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    branch.initializer.append(tensor)
    return found


def nameless_bytes() -> onnx.ModelProto:
    found = onnx.ModelProto()
    content = step_functions.cell().SerializeToString()
    found.ParseFromString(content.replace(b"hn", b"\xff\xfe"))
    return found


def misshapen() -> onnx.ModelProto:
    found = step_functions.cell()
    found.graph.initializer[0].dims[:] = [3, 5]
    return found


def one_branch() -> onnx.ModelProto:
    found = step_functions.branches()
    del next(each for each in found.graph.node if each.op_type == "If").attribute[0]
    return found


def huge() -> onnx.ModelProto:
    found = step_functions.cell()
    found.graph.initializer[0].dims[:] = [1 << 30, 1 << 30]
    return found


def newer() -> onnx.ModelProto:
    found = step_functions.cell()
    found.opset_import[0].version = 99
    return found


def unknown_operator() -> onnx.ModelProto:
    found = step_functions.cell()
    found.graph.node[3].op_type = "Tanhh"
    return found


def text() -> onnx.ModelProto:
    return model(
        [node("Identity", "x", "y"), node("Identity", "h", "hn")],
        {"x": (TensorProto.STRING, ["n"]), "h": (FLOAT, ["n", 4])},
        {"y": (TensorProto.STRING, ["n"]), "hn": (FLOAT, ["n", 4])},
    )


def unread() -> onnx.ModelProto:
    """What PyTorch exports if the example of both states is one tensor."""
    return model(
        [node("Add", "x c", "hn"), node("Mul", "hn c", "cn"), node("Identity", "hn", "y")],
        {name: (FLOAT, ["n", 4]) for name in ("x", "h", "c")},
        {name: (FLOAT, ["n", 4]) for name in ("y", "hn", "cn")},
    )


Case = tuple[Callable[[], onnx.ModelProto], dict[str, Any], str]
CASES: dict[str, Case] = {
    "shapes of a pair": (
        other_shape,
        {},
        "--state h:hn: both must have one shape; 'h' has [?, 4], 'hn' has [?, 5]",
    ),
    "shapes of a pair that only a run shows": (
        grows,
        {},
        "--state h:hn: both must have one shape; a row of 'h' has [4], of 'hn' [7]",
    ),
    "types of a pair": (
        other_type,
        {},
        "--state h:hn: both must be of one type; 'h' is int64, 'hn' is float32",
    ),
    "an output that no pair names": (
        step_functions.lstm,
        {"states": {"h0": "hn"}, "batch_axes": {"h0": 1, "c0": 1}},
        (
            "output 'cn' must be in a pair: by its name it holds the state 'c0' after the step. Add --state c0:cn, or make the input "
            "constant, --constant c0=VALUE"
        ),
    ),
    "one output for two states": (
        step_functions.two,
        {"states": {"past_a": "present_a", "past_b": "present_a"}},
        "--state: each output must hold one state; got 'present_a' for 'past_a', 'past_b'",
    ),
    "a state that no operator reads": (
        unread,
        {},
        (
            "--state h:hn: an operator must read the state; none reads 'h'. Exporters merge example inputs that are one tensor: give "
            "each input and state an example of its own, and export the model again"
        ),
    ),
    "a name for the output of a state": (
        step_functions.cell,
        {"names": {"hn": "memory"}},
        (
            "--name: must name an input, or an output that holds no state; got 'hn', which holds the state 'h'. Name that, --name "
            "h=NAME"
        ),
    ),
    "a shape of a constant": (
        step_functions.branches,
        {**BRANCHES, "shapes": {"input": (4,), "sr": (1,)}},
        "--shape: must not name a constant; got 'sr'. Leave it out",
    ),
    "a state of no name": (
        step_functions.cell,
        {"states": {"g": "hn"}},
        "--state: must name an input of the model; there is no 'g', there are 'x', 'h'",
    ),
    "an output of no name": (
        step_functions.cell,
        {"states": {"h": "h1"}},
        "--state: must name an output of the model; there is no 'h1', there are 'y', 'hn'",
    ),
    "names that reveal nothing": (
        nameless,
        {},
        (
            "must have a state: no names of inputs and outputs reveal one. Name the input and the output that holds it after the step, "
            "--state INPUT:OUTPUT; the inputs are 'a', 'b', the outputs 'c', 'd'"
        ),
    ),
    "a number without a batch axis": (
        step_functions.branches,
        {**BRANCHES, "constants": {}},
        "input 'sr' must have a batch axis; it is a single number. Make it constant, --constant sr=VALUE",
    ),
    "a fixed axis": (
        step_functions.branches,
        {**BRANCHES, "batch_axes": {}},
        (
            "input 'state' must have a batch axis, open or of size 1; its axis 0 has the size 2 in [2, ?, 3]. Name the batch axis, "
            "--batch-axis state=1"
        ),
    ),
    "a batch of four": (
        lambda: step_functions.cell(batch=4),
        {},
        (
            "input 'x' must have a batch axis, open or of size 1; its axis 0 has the size 4 in [4, 3]. Name the batch axis, "
            "--batch-axis x=AXIS, or export the model with an open one (dynamic axes)"
        ),
    ),
    "an axis that may be the batch": (
        step_functions.lstm,
        {},
        (
            "input 'h0' must have one batch axis; axis 0 has the size 1 and axis 1 is open in [1, ?, 5]. Name the batch axis, "
            "--batch-axis h0=1 (or h0=0 for a batch of one row)"
        ),
    ),
    "no such axis": (
        step_functions.cell,
        {"batch_axes": {"h": 2}},
        "--batch-axis: must be an axis of the tensor; 'h' has the shape [?, 4], and got 2",
    ),
    "an axis of an output that is not the rows'": (
        step_functions.cell,
        {"batch_axes": {"y": 1}},
        "--batch-axis: the rows of output 'y' are on axis 0 by the graph; got 1",
    ),
    "an output without rows": (
        scalar_output,
        {},
        (
            "output 'y' must have a batch axis, which follows the number of rows; its shape is [] for 2 rows and [] for 3 rows. Change "
            "the model so that it gives one value for each row of its input"
        ),
    ),
    "an open shape": (
        step_functions.branches,
        {**BRANCHES, "shapes": {}},
        "input 'input' must have a known shape; the file leaves [?] of a row open. Give it, --shape input=SIZES, without the context",
    ),
    "another shape": (
        step_functions.cell,
        {"shapes": {"x": (4,)}},
        "--shape: must fit the shape of a row of 'x', [3]; got [4]",
    ),
    "a shape that the graph does not take": (
        step_functions.branches,
        {**BRANCHES, "shapes": {"input": (5,)}},
        "ONNX Runtime cannot load the graph: ",
    ),
    "a context longer than the input": (
        step_functions.branches,
        {**BRANCHES, "contexts": {"input": 4}, "shapes": {"input": (2,)}},
        "--context: must be at most as long as the new part of the input, 2 of the 6 elements of 'input'; got 4",
    ),
    "a context of the whole input": (
        step_functions.cell,
        {"contexts": {"x": 3}},
        "--context: must be shorter than the last axis of 'x', which is [?, 3]; got 3",
    ),
    "a context of a state": (
        step_functions.cell,
        {"contexts": {"h": 1}},
        "--context: must name an input that is neither state nor constant; got 'h'",
    ),
    "a constant of another type": (
        step_functions.branches,
        {**BRANCHES, "constants": {"sr": 0.5}},
        "--constant: 'sr' must be numbers of int64; got 0.5",
    ),
    "a constant of another shape": (
        step_functions.branches,
        {**BRANCHES, "constants": {"sr": [1, 2]}},
        "--constant: 'sr' must have the shape []; got [2]",
    ),
    "an initial state of another shape": (
        step_functions.cell,
        {"initial": {"h": [1.0, 2.0]}},
        "--initial: state 'h' must have the shape of one row, [4]; got [2]",
    ),
    "an initial state that is not a number": (
        step_functions.cell,
        {"initial": {"h": float("nan")}},
        "--initial: state 'h' must be finite; got nan",
    ),
    "a constant beyond its type": (
        lambda: step_functions.cell(kind=step_functions.HALF),
        {"constants": {"x": 1e9}},
        "--constant: 'x' must be numbers of float16; got 1000000000.0",
    ),
    "an initial state that is no whole number": (
        step_functions.embedding,
        {"initial": {"count": 0.5}},
        "--initial: state 'count' must be numbers of int64; got 0.5",
    ),
    "a name that moves the cursor": (
        step_functions.cell,
        {"names": {"y": "a\x1b[2Jb"}},
        (
            "--name: outputs must have names of printable characters; got 'a\\x1b[2Jb'. Give another one, --name TENSOR=NAME"
        ),
    ),
    "an initial value of an input": (
        step_functions.cell,
        {"initial": {"x": 1}},
        "--initial: must name the input of a state; got 'x'; the states are 'h'",
    ),
    "one name for two tensors": (
        step_functions.two,
        {"names": {"a": "b"}},
        "--name: inputs must have different names; got 'b' twice",
    ),
    "no input": (
        only_states,
        {},
        (
            "must have an input that is neither state nor constant, which takes what a step brings; its inputs are 'h', all of them "
            "states or constants"
        ),
    ),
    "a custom operator": (
        custom,
        {},
        (
            "operator 'Tanh' of '' is of the domain 'org.other': custom operators are code and are not loaded. Export the model with the "
            "operators of ONNX only"
        ),
    ),
    "weights outside": (
        outside,
        {},
        (
            "tensor 'W' must be in the file; it is in another file (external data). Save it with onnx.save(onnx.load(FILE), NEW_FILE, "
            "save_as_external_data=False)"
        ),
    ),
    "weights outside, in a branch": (
        outside_in_a_branch,
        BRANCHES,
        "tensor 'inner' must be in the file; it is in another file (external data)",
    ),
    "a huge weight": (
        huge,
        {},
        "tensor 'W' must have its elements in the file; its shape is [1073741824, 1073741824], and the file has ",
    ),
    "names that are no text": (nameless_bytes, {}, r"the names in it must be text (UTF-8); got b'\xff\xfe'"),
    "a weight of another shape": (
        misshapen,
        {},
        "tensor 'W' must have the elements of its shape [3, 5]: cannot reshape array of size 12 into shape (3,5)",
    ),
    "an If of one branch": (one_branch, BRANCHES, "ONNX Runtime cannot load the graph: "),
    "a newer opset": (newer, {}, "its opset must be one from 1 to "),
    "an unknown operator": (unknown_operator, {}, "ONNX Runtime cannot load the graph: "),
    "texts": (
        text,
        {},
        "tensor 'x' must be of a type that sessions hold, such as float32 or int64; it is string. Cast it in the model",
    ),
    "random numbers": (
        step_functions.noisy,
        {},
        "the same row run twice alone gives different bits: does the graph draw random numbers? Remove that operator",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    make, declared, message = CASES[name]
    file = step_functions.saved(tmp_path, "model", make)
    with pytest.raises(ModelError) as refusal:
        compile_step_function(file, ProofOptions(declaration=Declaration(**declared)))
    assert str(refusal.value).startswith(f"{file}: {message}")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04 no model", b"a text, not a model" * 10])
def test_a_file_that_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx: not an ONNX file"):
        compile_step_function(file, ProofOptions())


def test_an_empty_file_and_a_folder_get_advice_for_onnx(tmp_path: Path) -> None:
    empty, folder = tmp_path / "empty.onnx", tmp_path / "folder.onnx"
    empty.touch()
    folder.mkdir()
    assert origin.other_problem(empty) == "is empty; export the model again"
    assert origin.folder_problem(folder) == "is a folder; give the .onnx file in it"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    content = step_functions.cell().SerializeToString()
    file = tmp_path / "model.onnx"
    for size in (10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ModelError, match=re.escape(f"{file}: ")):
            compile_step_function(file, ProofOptions())


DECLARED = {
    "[states]\nh = 'hn'": "there is no table [states]; the tables are state, batch-axis, constant, initial, context, shape, name",
    "state = 'h:hn'": "state must be a table, [state]; got 'h:hn'",
    "[batch-axis]\nh = -1": "[batch-axis] 'h': must be TENSOR=AXIS, such as state=1; got -1",
    "[context]\nx = 0": "[context] 'x': must be INPUT=N, the elements that precede the next input; got 0",
    "[shape]\nx = 'wide'": "[shape] 'x': must be INPUT=SIZES, the shape of one row, such as input=512 or image=3,32; got 'wide'",
    "[constant]\nsr = 'fast'": "[constant] 'sr': must be INPUT=VALUE, such as sr=16000; got 'fast'",
    "[initial]\nh = 'ones'": "[initial] 'h': must be STATE=NUMBER or STATE=FILE.npz; got 'ones'",
    "[name]\nh = ''": "[name] 'h': must be TENSOR=NAME; got ''",
    "[[state]]": "state must be a table, [state]; got [{}]",
    "state = ": "must be TOML: ",
}


@pytest.mark.parametrize("text", DECLARED)
def test_a_wrong_declaration_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "model.toml"
    file.write_text(text)
    with pytest.raises(ModelError) as refusal:
        declaration.read(file)
    assert str(refusal.value).startswith(f"{file}: {DECLARED[text]}")


OPTIONS = {
    ("state", "h"): "--state: must be INPUT:OUTPUT, the state before a step and after it; got 'h'",
    ("batch-axis", "h=one"): "--batch-axis: must be TENSOR=AXIS, such as state=1; got 'h=one'",
    (
        "shape",
        "x=3,-1",
    ): "--shape: must be INPUT=SIZES, the shape of one row, such as input=512 or image=3,32; got 'x=3,-1'",
    ("initial", "h=none.npz"): "--initial: " + str(Path.cwd() / "none.npz") + ": there is no such file",
    ("context", "=3"): "--context: must be INPUT=N, the elements that precede the next input; got '=3'",
}


@pytest.mark.parametrize(("option", "text"), OPTIONS)
def test_a_wrong_option_is_refused(option: str, text: str) -> None:
    with pytest.raises(ModelError, match=re.escape(OPTIONS[option, text])):
        declaration.parse(option, (text,))


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("h:hn", "h", "hn"),
        ("h:27", "h", "27"),
        ("h:0:27", "h:0", "27"),
        ("a:h:hn", "a:h", "hn"),
        ("h:Identity:1", "h", "Identity:1"),
        ("serving_default_h:0:StatefulPartitionedCall:1", "serving_default_h:0", "StatefulPartitionedCall:1"),
    ],
)
def test_names_of_tensors_may_hold_a_colon(text: str, before: str, after: str) -> None:
    assert declaration.parse("state", (text,)) == {before: after}


def test_an_option_that_names_a_tensor_twice_is_refused() -> None:
    with pytest.raises(ModelError, match="--batch-axis: must name each tensor once; got 'h' twice"):
        declaration.parse("batch-axis", ("h=1", "h=0"))


@pytest.mark.parametrize("seed", one_in(5, range(40)))
def test_changed_bytes_are_refused_or_compiled(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but a refusal may come of a file that is not what an exporter wrote."""
    from stepwell_server.engine.executors import trial

    monkeypatch.setattr(trial, "LITERT_SIZES", (1, 2))
    rng = np.random.default_rng(seed)
    declared: dict[str, Any] = {} if seed % 2 else BRANCHES
    make = step_functions.two if seed % 2 else step_functions.branches
    content = bytearray(make().SerializeToString())
    for place in rng.integers(0, len(content), rng.integers(1, 5)):
        content[place] = rng.integers(0, 256)
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with contextlib.suppress(ModelError):
        compile_step_function(file, ProofOptions(declaration=Declaration(**declared)))
