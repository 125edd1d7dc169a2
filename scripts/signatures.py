"""The signatures of the SDK as lines of text, one fact a line, for `scripts/surface.py`.

Public are the modules that have an `__all__`, what these name, and the pytest plugin. A type of a private module counts
where a public signature names it: callers hold such values too.

    stepwell.Session.step() -> Outputs                         a function or method and what it returns
    stepwell.Session.step(1 x: Inputs)                         its first argument, which can be given by position
    stepwell.Session.step(keyword mask: Mask | None = None)    one that can only be given by its name
    stepwell.Session.id: property: str
    type Inputs = npt.ArrayLike | ...                          a name of a private module that signatures use

Annotations are text as it stands in the source, so that each version of Python shows them alike.
"""

from __future__ import annotations

import abc
import ast
import contextlib
import dataclasses
import enum
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import stepwell

PACKAGE = "stepwell"
PLUGIN = f"{PACKAGE}.pytest_plugin"
#: Its commands are a file of their own.
COMMANDS = "cli"
FOLDER = Path(stepwell.__file__).parent
# What says nothing about how a class is used.
PLAIN_BASES: set[object] = {object, dict, abc.ABC, typing.Generic, typing.Protocol}
HIDDEN_METHODS = {"__init__", "__post_init__", "__repr__", "__del__", "__getattr__", "__init_subclass__"}

Name = tuple[str, str]
"""A module, and a name that is defined in it."""


@functools.cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise LookupError(f"module {module} must have a source file")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


@functools.cache
def bindings_of(module: str) -> dict[str, Name]:
    """Where the names that a module uses are defined: in itself or in another module of the package.

    Imports for type checkers alone count too, so this reads the source.
    """
    found: dict[str, Name] = {}
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                found[alias.asname or alias.name] = (node.module or "", alias.name)
    for node in tree_of(module).body:
        for name in defined_by(node):
            found[name] = (module, name)
    return found


def defined_by(node: ast.stmt) -> list[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def home_of(name: Name) -> Name:
    """Where a name is defined in truth: what a module imports is another's."""
    module, own = name
    while (further := bindings_of(module).get(own)) and further != (module, own):
        module, own = further
    return module, own


def names_in(annotation: str, module: str) -> Iterator[Name]:
    """The names of the package that an annotation of a module uses."""
    for node in ast.walk(ast.parse(annotation, mode="eval")):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            # a type in quotes, or a value of a Literal
            with contextlib.suppress(SyntaxError):
                yield from names_in(node.value, module)
            continue
        if isinstance(node, ast.Name):
            used = bindings_of(module).get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = bindings_of(module).get(node.value.id)
            used = (f"{owner[0]}.{owner[1]}", node.attr) if owner and is_module(".".join(owner)) else None
        else:
            used = None
        if used and not is_module(".".join(used)):
            yield home_of(used)


@functools.cache
def is_module(name: str) -> bool:
    """Whether a dotted name of the package is a module."""
    relative = name.split(".")[1:]
    path = FOLDER.joinpath(*relative)
    return path.is_dir() or path.with_suffix(".py").is_file()


def value_of(name: Name) -> object:
    """What a module has under a name."""
    value: object = getattr(importlib.import_module(name[0]), name[1])
    return value


def home_of_class(kind: type) -> Name:
    """Where a class is defined."""
    return kind.__module__, kind.__qualname__


def text_of_value(value: object) -> str:
    """A default or a constant, the same in each run."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, type) or inspect.isroutine(value):
        return value.__qualname__
    text = repr(value)
    return f"<{type(value).__qualname__}>" if " at 0x" in text else text


def text_of_annotation(annotation: object) -> str:
    """An annotation as the source has it."""
    if annotation is inspect.Parameter.empty:
        return "?"
    if isinstance(annotation, typing.ForwardRef):  # of a TypedDict or a NamedTuple
        return annotation.__forward_arg__
    if not isinstance(annotation, str):
        raise TypeError(
            f"annotation {annotation!r} must be text: its module needs `from __future__ import annotations`"
        )
    return annotation


class Signatures:
    """Collects the lines of the SDK."""

    def __init__(self) -> None:
        self._lines: set[str] = set()
        self._public: dict[Name, str] = {}
        """Under which name each public object is described; its other names refer to that one."""
        self.reached: set[Name] = set()
        """Names of private modules that public signatures use."""

    def lines(self) -> list[str]:
        """All lines, sorted."""
        exported = [(module, name) for module in public_modules() for name in names_of(module)]
        for module, name in exported:
            self._public.setdefault(home_of((module, name)), f"{module}.{name}")
        for module, name in exported:
            full = f"{module}.{name}"
            home = home_of((module, name))
            value = value_of((module, name))
            if isinstance(value, types.ModuleType):
                self._lines.add(f"{full}: module")
            elif self._public[home] != full:
                self._lines.add(f"{full} is {self._public[home]}")
            else:
                self._describe(full, home, value)
        done: set[Name] = set()
        while left := self.reached - done - self._public.keys():
            for home in left:
                self._describe(f"type {home[1]}", home, value_of(home))
            done |= left
        return sorted(self._lines)

    def _describe(self, full: str, home: Name, value: object) -> None:
        function = inspect.unwrap(value) if callable(value) else value
        if isinstance(value, type):
            self._class(full, value)
        elif isinstance(function, types.FunctionType):
            kind = "" if value is function or not is_fixture(value) else "fixture"
            self._function(full, function, kind=kind)
        else:
            self._value(full, home, value)

    def _value(self, full: str, home: Name, value: object) -> None:
        """A constant has its value, another name of a type what the source says."""
        if isinstance(value, bool | int | float | str | bytes | tuple | frozenset | None):
            self._lines.add(f"{full} = {text_of_value(value)}")
            return
        module, name = home
        node = next(node for node in tree_of(module).body if name in defined_by(node))
        assert isinstance(node, ast.Assign | ast.AnnAssign)
        assert node.value is not None
        text = ast.unparse(node.value)
        self._lines.add(f"{full} = {text}")
        self.reached.update(names_in(text, module))

    def _annotation(self, annotation: object, module: str) -> str:
        text = text_of_annotation(annotation)
        if text != "?":
            self.reached.update(names_in(text, module))
        return text

    def _function(self, full: str, value: Callable[..., object], *, kind: str = "", skip: int = 0) -> None:
        """`skip` arguments come first that no caller gives: `self` or the class."""
        function = inspect.unwrap(value)
        overloads = typing.get_overloads(function)
        for number, overload in enumerate(overloads, 1):
            self._signature(f"{full}[overload {number}]", overload, kind, skip)
        if not overloads:
            self._signature(full, function, kind, skip)

    def _signature(self, full: str, function: Callable[..., object], kind: str, skip: int) -> None:
        module = function.__module__
        signature = inspect.signature(function)
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            kind = f"{kind} async".strip()
        returned = self._annotation(signature.return_annotation, module)
        self._lines.add(f"{full}() {kind + ' ' if kind else ''}-> {returned}")
        for place, parameter in enumerate(list(signature.parameters.values())[skip:], 1):
            annotation = self._annotation(parameter.annotation, module)
            default = "" if parameter.default is parameter.empty else f" = {text_of_value(parameter.default)}"
            before = {
                parameter.POSITIONAL_ONLY: f"{place} positional-only ",
                parameter.POSITIONAL_OR_KEYWORD: f"{place} ",
                parameter.KEYWORD_ONLY: "keyword ",
                parameter.VAR_POSITIONAL: "*",
                parameter.VAR_KEYWORD: "**",
            }[parameter.kind]
            self._lines.add(f"{full}({before}{parameter.name}: {annotation}{default})")

    def _class(self, full: str, kind: type) -> None:
        self._lines.add(f"{full}: {kind_of_class(kind)}")
        for base in self._bases(kind):
            self._lines.add(f"{full}: is a {base}")
        if issubclass(kind, enum.Enum):
            for member in kind:
                self._lines.add(f"{full}.{member.name} = {member.value!r}")
        elif home_of_class(kind) in self._public:
            self._constructor(full, kind)
        seen = set()
        for owner in filter(is_ours, kind.__mro__):
            for name, text in self._attributes(owner):
                if name not in seen:
                    self._lines.add(f"{full}.{name}: {text}")
                seen.add(name)
            for name, value in vars(owner).items():
                if name not in seen and is_public(name):
                    self._member(f"{full}.{name}", name, value)
                seen.add(name)

    def _bases(self, kind: type) -> Iterator[str]:
        """The public bases, in place of private ones those of these."""
        for base in kind.__bases__:
            if not is_ours(base):
                if base not in PLAIN_BASES:
                    yield base.__name__
            elif home_of_class(base) in self._public:
                yield self._public[home_of_class(base)]
            else:
                yield from self._bases(base)

    def _constructor(self, full: str, kind: type) -> None:
        """An `__init__` that takes what no user has is none for users."""
        function = next(
            (vars(owner)["__init__"] for owner in kind.__mro__ if "__init__" in vars(owner)), None
        )
        if not isinstance(function, types.FunctionType) or typing.is_typeddict(kind):
            return
        module = function.__module__ or kind.__module__
        annotations = [text for text in function.__annotations__.values() if isinstance(text, str)]
        used = {name for text in annotations for name in names_in(text, module)}
        if any(isinstance(value_of(name), type) for name in used - self._public.keys()):
            self._lines.add(f"{full}: made by the SDK alone")
        elif is_written(function):
            self._signature(full, function, "", 1)

    def _attributes(self, owner: type) -> Iterator[tuple[str, str]]:
        """Fields, attributes with an annotation in the class, and those that `__init__` sets."""
        module = owner.__module__
        annotations = vars(owner).get("__annotations__", {})
        fields = (
            {field.name: field for field in dataclasses.fields(owner)}
            if dataclasses.is_dataclass(owner)
            else {}
        )
        places = {name: place for place, name in enumerate(fields, 1)}
        for name, annotation in annotations.items():
            if not is_public(name):
                continue
            text = self._annotation(annotation, module)
            field = fields.get(name)
            if field is None:
                yield name, f"attribute: {text}"
                continue
            given = "" if field.init else "not given "
            place = "keyword" if field.kw_only else f"{places[name]}"
            yield name, f"{given}field {place}: {text}{default_of(field)}"
        constructor = vars(owner).get("__init__")
        if isinstance(constructor, types.FunctionType) and is_written(constructor):
            for name, annotation in attributes_set_by(owner):
                if is_public(name) and name not in annotations:
                    text = self._annotation(annotation, module) if annotation else ""
                    yield name, f"attribute: {text or '?'}"

    def _member(self, full: str, name: str, value: object) -> None:
        if isinstance(value, property | functools.cached_property):
            getter = value.fget if isinstance(value, property) else value.func
            assert getter is not None
            annotation = inspect.signature(inspect.unwrap(getter)).return_annotation
            text = self._annotation(annotation, inspect.unwrap(getter).__module__)
            can_be_set = isinstance(value, property) and value.fset is not None
            self._lines.add(f"{full}: property{' that can be set' if can_be_set else ''}: {text}")
        elif isinstance(value, classmethod | staticmethod):
            kind = type(value).__name__
            if is_written(value.__func__):
                self._function(full, value.__func__, kind=kind, skip=int(kind == "classmethod"))
        elif isinstance(value, types.FunctionType):
            if is_written(value) and name not in HIDDEN_METHODS:
                self._function(full, value, skip=1)
        elif isinstance(value, types.MemberDescriptorType | enum.Enum) or name.startswith("__"):
            pass  # a slot, whose attribute is described already; a member of an enum; Python's own
        else:
            self._lines.add(f"{full} = {text_of_value(value)}")


def public_modules() -> list[str]:
    """The package, its modules with an `__all__`, and the plugin."""
    found = [
        f"{PACKAGE}.{module.name}"
        for module in pkgutil.iter_modules([str(FOLDER)])
        if not module.name.startswith("_") and module.name != COMMANDS
    ]
    declaring = [name for name in found if any("__all__" in defined_by(node) for node in tree_of(name).body)]
    return [PACKAGE, *sorted(declaring), PLUGIN]


def names_of(module: str) -> list[str]:
    """The public names of a module."""
    if module != PLUGIN:
        return sorted(importlib.import_module(module).__all__)
    names = [name for node in tree_of(module).body for name in defined_by(node)]
    return sorted(
        name for name in names if is_public(name) and not name.startswith("pytest_")
    )  # but for its hooks


def is_public(name: str) -> bool:
    """Whether a name is for users: Python's own double underscores are."""
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def is_ours(kind: type) -> bool:
    """Whether a class is of the SDK."""
    return kind.__module__.split(".")[0] == PACKAGE


def is_written(function: Callable[..., object]) -> bool:
    """Whether people wrote a function; dataclasses and other tools make some."""
    inner = inspect.unwrap(function)
    return isinstance(inner, types.FunctionType) and Path(inner.__code__.co_filename).is_relative_to(FOLDER)


def is_fixture(value: object) -> bool:
    """Whether pytest made a fixture of a function."""
    return type(value).__name__ == "FixtureFunctionDefinition"


def kind_of_class(kind: type) -> str:
    """What kind of class it is, in a word or two."""
    if issubclass(kind, BaseException):
        return "exception"
    if issubclass(kind, enum.Enum):
        return "enum"
    if typing.is_typeddict(kind):
        return "TypedDict with optional keys" if vars(kind)["__optional_keys__"] else "TypedDict"
    if dataclasses.is_dataclass(kind):
        return "frozen dataclass" if kind.__dataclass_params__.frozen else "dataclass"  # type: ignore[attr-defined]
    return "class"


def default_of(field: dataclasses.Field[object]) -> str:
    """The default of a field, if it has one."""
    if field.default is not dataclasses.MISSING:
        return f" = {text_of_value(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {text_of_value(field.default_factory)}()"
    return ""


def attributes_set_by(owner: type) -> Iterator[tuple[str, str]]:
    """The attributes that a class's `__init__` sets, with their annotation or that of the argument they are set to."""
    classes = [node for node in ast.walk(tree_of(owner.__module__)) if isinstance(node, ast.ClassDef)]
    body = next(node.body for node in classes if node.name == owner.__name__)
    constructor = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    arguments = [*constructor.args.posonlyargs, *constructor.args.args, *constructor.args.kwonlyargs]
    given = {each.arg: ast.unparse(each.annotation) for each in arguments if each.annotation}
    for node in ast.walk(constructor):
        if isinstance(node, ast.AnnAssign):
            pairs: list[tuple[ast.expr, str]] = [(node.target, ast.unparse(node.annotation))]
        elif isinstance(node, ast.Assign):
            source = given.get(node.value.id, "") if isinstance(node.value, ast.Name) else ""
            targets = [each for target in node.targets for each in getattr(target, "elts", [target])]
            pairs = [(target, source) for target in targets]
        else:
            continue
        for target, annotation in pairs:
            if (
                isinstance(target, ast.Attribute)
                and isinstance(target.value, ast.Name)
                and target.value.id == "self"
            ):
                yield target.attr, annotation
