"""The canonical form of a Keras configuration: names that Keras generated are replaced by numbers.

Keras names an unnamed layer after its class (``lstm``), and numbers them from the second one in a process on
(``lstm_1``). The configuration does not say which names were generated. Names of this pattern count as generated: a
user's own ``lstm_1`` may be renamed too, but only if the graphs agree in everything else.

Keras lists the layers of a graph in an order that follows from their wiring alone. So two models with the same wiring have
the same canonical form.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

#: Parts of the configuration that do not change what the model computes.
NOISE = frozenset({"compile_config", "shared_object_id", "build_config"})
#: Arguments of Keras's own layers that matter in training alone, and one that the server replaces.
_TRAINING = frozenset(
    {
        "trainable", "seed", "dropout", "recurrent_dropout", "rate", "stateful", "unit_forget_bias",
        "kernel_initializer", "recurrent_initializer", "bias_initializer",
        "kernel_regularizer", "recurrent_regularizer", "bias_regularizer", "activity_regularizer",
        "kernel_constraint", "recurrent_constraint", "bias_constraint",
    }
)  # fmt: skip
_COUNT = re.compile(r"(?:_([1-9][0-9]*))?")
_WRAPPED = ("", "forward_", "backward_")
"""The prefixes that `Bidirectional` adds to the names of its layers."""
_CLONED_INPUT = "keras_tensor"
"""The name that `clone_model` gives to an unnamed input."""


@dataclasses.dataclass(frozen=True, slots=True)
class Canonical:
    """A configuration in canonical form."""

    config: Any
    """The configuration, with generated names replaced by ``#N``, their index in `names`."""
    names: tuple[str, ...]
    """The names that Keras generated, in order of first appearance."""


def is_generated(name: str, class_name: str) -> bool:
    """Whether Keras generates this name for an unnamed object of a class."""
    return count_of(name, class_name) is not None


def count_of(name: str, class_name: str) -> int | None:
    """Return the number at the end of a generated name, 0 if there is none; None: the user chose the name."""
    snake = _snake_case(class_name)
    stems = [prefix + snake for prefix in _WRAPPED]
    if class_name == "InputLayer":
        stems.append(_CLONED_INPUT)
    for stem in stems:
        if name.startswith(stem):
            found = _COUNT.fullmatch(name, len(stem))
            if found:
                return int(found[1] or 0)
    return None


def canonical(config: Any, *, of_training: bool = True) -> Canonical:
    """Return a model's configuration (the content of ``config.json``) in canonical form.

    Args:
        config: the configuration, nested at most as deep as `compile.configuration` allows.
        of_training: keep what only matters for training, and the model's own name.
    """
    form = _Form(of_training)
    return Canonical(form.of(config, {}), tuple(form.names))


def comparable(config: Any) -> bytes:
    """Return a text that is equal for two models that only differ in weights and generated names."""
    shapes = [each.get("build_config") for each in objects(config)]
    return json.dumps([canonical(config).config, shapes], sort_keys=True).encode()


def objects(config: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of a configuration that has a name, in the order of appearance."""
    if isinstance(config, dict):
        if is_named(config):
            yield config
        for value in config.values():
            yield from objects(value)
    elif isinstance(config, list):
        for value in config:
            yield from objects(value)


def is_named(config: Any) -> bool:
    """Whether this is a named object, such as a layer, a cell or a model."""
    return (
        isinstance(config, dict)
        and isinstance(config.get("class_name"), str)
        and isinstance(config.get("config"), dict)
        and isinstance(config["config"].get("name"), str)
    )


def kind(config: dict[str, Any]) -> str:
    """Describe a layer as a text, without its name, its connections, and what only matters for training."""
    alone = {key: value for key, value in config.items() if key not in {"name", "inbound_nodes"}}
    return json.dumps(canonical(alone, of_training=False).config, sort_keys=True)


def layers_of(config: Any) -> list[dict[str, Any]]:
    """Return the layers that a model's configuration lists; none: the model is of the user's own class."""
    listed = config.get("config", {}).get("layers") if isinstance(config, dict) else None
    return [layer for layer in listed if is_named(layer)] if isinstance(listed, list) else []


def is_graph(config: Any) -> bool:
    """Whether the layers of a model refer to each other by name."""
    return "output_layers" in config.get("config", {}) and bool(layers_of(config))


def with_references(value: Any, renamed: Callable[[str], str]) -> Any:
    """Return the arguments of a call, or the inputs or outputs of a graph, with layers renamed."""
    if isinstance(value, list):
        if len(value) == 3 and isinstance(value[0], str) and isinstance(value[1], int):
            return [renamed(value[0]), *value[1:]]
        return [with_references(item, renamed) for item in value]
    if isinstance(value, dict):
        return {key: with_references(item, renamed) for key, item in value.items()}
    return value


def references(value: Any, place: str = "") -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Yield the tensors that a structure refers to (layer, call, output), each with its position."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from references(item, f"{place}/{key}")
    elif isinstance(value, list):
        if len(value) == 3 and isinstance(value[0], str) and isinstance(value[1], int):
            yield place, (value[0], value[1], int(value[2]))
            return
        for index, item in enumerate(value):
            yield from references(item, f"{place}/{index}")


class _Form:
    def __init__(self, of_training: bool) -> None:
        self.names: list[str] = []
        self._of_training = of_training
        self._is_first = True
        self._shared: dict[Any, int] = {}
        """Numbers of objects that are used in several places, by their Keras ids."""

    def of(self, value: Any, local: dict[str, str]) -> Any:
        """Return the canonical form of a value; `local` has the new names of layers of the graph that contains it."""
        if isinstance(value, list):
            return [self.of(item, local) for item in value]
        if not isinstance(value, dict):
            return value
        if is_named(value):
            return self._object(value, local)
        return {key: self.of(item, local) for key, item in value.items() if key not in NOISE}

    def _object(self, value: dict[str, Any], local: dict[str, str]) -> dict[str, Any]:
        name, class_name, config = value["config"]["name"], value["class_name"], value["config"]
        is_model = self._is_first
        self._is_first = False
        if name in local:
            name = local[name]
        elif is_generated(name, class_name) or (is_model and not self._of_training):
            name = self._numbered(name)
        inner: dict[str, str] = {}
        if is_graph(value):
            for layer in layers_of(value):
                own = layer["config"]["name"]
                inner[own] = self._numbered(own) if is_generated(own, layer["class_name"]) else own
        form: dict[str, Any] = {}
        shared = value.get("shared_object_id")
        if isinstance(shared, int) and not class_name.endswith("DTypePolicy"):
            form["shared"] = self._shared.setdefault(shared, len(self._shared))
        for key, item in value.items():
            if key in NOISE:
                continue
            if key == "config":
                form[key] = self._config(config, inner, name, is_own=_is_keras(value))
            elif key == "name":
                form[key] = name
            elif key == "inbound_nodes":
                form[key] = with_references(self.of(item, {}), lambda one: local.get(one, one))
            else:
                form[key] = self.of(item, {})
        return form

    def _config(
        self, config: dict[str, Any], inner: dict[str, str], name: str, *, is_own: bool
    ) -> dict[str, Any]:
        form: dict[str, Any] = {}
        for key, item in config.items():
            if key in NOISE or (not self._of_training and is_own and key in _TRAINING):
                continue
            if key == "name":
                form[key] = name
            elif inner and key in {"input_layers", "output_layers"}:
                form[key] = with_references(item, lambda one: inner.get(one, one))
            else:
                form[key] = self.of(item, inner if key == "layers" else {})
        return form

    def _numbered(self, name: str) -> str:
        self.names.append(name)
        return f"#{len(self.names) - 1}"


def _is_keras(value: dict[str, Any]) -> bool:
    module = value.get("module")
    return isinstance(module, str) and module.partition(".")[0] == "keras"


def _snake_case(name: str) -> str:
    """Convert the name of a class as Keras does."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
