"""Checks the names in `config.json` of a ``.keras`` file, before Keras uses them.

A configuration names classes and functions, which Keras instantiates or calls while it loads the model. Published
attacks name things that are not parts of a model: `keras.utils.get_file` (CVE-2025-8747), `os.system` (CVE-2025-1550),
`keras.config.enable_unsafe_deserialization` (CVE-2025-9906), layers that load files or pickles
(TorchModuleWrapper, CVE-2025-49655; TFSMLayer), vocabularies in other files (CVE-2025-12058). Keras refuses the attacks
that it knows. This module allows only parts of models, for any version of Keras. The operator answers for objects that
`--import` registers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from stepwell_server.compile.errors import ModelError

MAX_BYTES = 32 << 20
MAX_DEPTH = 200
#: Parts of Keras that contain only parts of models.
_CLASSES = frozenset(
    [
        "activations",
        "constraints",
        "dtype_policies",
        "initializers",
        "layers",
        "losses",
        "metrics",
        "models",
        "ops",
        "optimizers",
        "quantizers",
        "random",
        "regularizers",
    ]
)
_FUNCTIONS = _CLASSES - {"dtype_policies", "layers", "models", "optimizers", "quantizers"}
#: Names in the package itself.
_TOP = frozenset(
    [
        "DTypePolicy",
        "FloatDTypePolicy",
        "Functional",
        "Initializer",
        "InputSpec",
        "KerasTensor",
        "Layer",
        "Loss",
        "Metric",
        "Model",
        "Operation",
        "Optimizer",
        "Quantizer",
        "Regularizer",
        "Sequential",
        "Variable",
    ]
)
_SPECIAL = frozenset(
    [
        "__bytes__",
        "__ellipsis__",
        "__keras_tensor__",
        "__numpy__",
        "__slice__",
        "__tensor__",
        "__typespec__",
        "function",
    ]
)
#: Layers that run or load something outside the model: code, graphs, pickles.
_FORBIDDEN = frozenset(["FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"])
#: Packages from which Keras imports any name in a configuration, if they are installed.
_IMPORTED = frozenset(["keras_cv", "keras_hub", "keras_nlp"])
_NOT_FUNCTIONS = re.compile(r"(de)?serialize(_.*)?|get(_.*)?|load(_.*)?|save(_.*)?")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_VOCABULARIES = ("vocabulary", "idf_weights")
CODE = (
    "refused by Keras's safe mode: it contains a Lambda layer, a lambda or other code; "
    "write it as a registered layer and name its module with --import MODULE"
)


def check(text: bytes, is_registered: Callable[[str], bool]) -> None:
    """Check a ``config.json``.

    Args:
        text: its content.
        is_registered: whether a module of the operator has registered a name.

    Raises:
        ModelError: it is not a configuration, or names something that is not a part of models. The message is a
            clause.
    """
    if len(text) > MAX_BYTES:
        raise ModelError(f"config.json must be at most {MAX_BYTES} bytes; it is {len(text)} bytes")
    for node in _nodes(parsed("config.json", text)):
        if problem := _problem(node, is_registered):
            raise ModelError(problem)


def parsed(name: str, text: bytes) -> Any:
    """Parse a JSON member of a ``.keras`` file.

    Raises:
        ModelError: it is not JSON, or nested too deeply. The message is a clause.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ModelError(f"{name} must be nested at most {MAX_DEPTH} deep") from error
    except ValueError as error:
        raise ModelError(f"corrupt .keras file: {name} is not JSON ({error})") from error


def _nodes(document: Any) -> Iterator[Mapping[str, Any]]:
    todo = [(document, 0)]
    while todo:
        item, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise ModelError(f"config.json must be nested at most {MAX_DEPTH} deep")
        if isinstance(item, dict):
            yield item
            todo += [(value, depth + 1) for value in item.values()]
        elif isinstance(item, list):
            todo += [(value, depth + 1) for value in item]


def _problem(node: Mapping[str, Any], is_registered: Callable[[str], bool]) -> str:
    kind = node.get("class_name")
    if not isinstance(kind, str):
        return ""
    if kind == "__lambda__":
        return CODE
    inner, module = node.get("config"), node.get("module")
    if kind in _FORBIDDEN:
        return f"it must contain only Keras's own layers that load nothing else; {kind} does"
    if isinstance(inner, dict) and (problem := _file_problem(kind, inner)):
        return problem
    if module is None:
        return ""
    if not isinstance(module, str):
        return f"its module names must be text; got {module!r:.40}"
    package = module.partition(".")[0]
    if package not in {"keras", "builtins", *_IMPORTED}:
        return ""  # Keras finds such an object only if --import has registered it, because it imports no such module.
    name = inner if kind == "function" else kind
    # A function is looked up by its own name; registered_name is for classes only.
    if is_registered(str(inner if kind == "function" else node.get("registered_name", kind))):
        return ""
    if package in _IMPORTED:
        return f"unknown class {name!r:.80}; name its module with --import {package}"
    if kind in _SPECIAL - {"function"}:
        return ""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not _is_of_models(module, name):
        return f"it must name only parts of models; it names {module}.{name}"
    return ""


def _is_of_models(module: str, name: str) -> bool:
    is_function = name[:1].islower()
    if module == "builtins":  # where Keras looks for its own functions
        return not is_function or not _NOT_FUNCTIONS.fullmatch(name)
    parts = module.split(".")[1:]
    if parts[:1] == ["src"]:
        parts = parts[1:]
    if not parts:
        return name in _TOP
    if is_function:
        return parts[0] in _FUNCTIONS and not _NOT_FUNCTIONS.fullmatch(name)
    return parts[0] in _CLASSES


def _file_problem(kind: str, inner: Mapping[str, Any]) -> str:
    named = next((key for key in _VOCABULARIES if isinstance(inner.get(key), str)), "")
    if not named:
        return ""
    return (
        f"layer {inner.get('name', kind)!r:.80} must have its {named} in the model's file; it names another file,"
        f" {inner[named]!r:.80}"
    )
