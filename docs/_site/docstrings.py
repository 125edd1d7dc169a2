"""The SDK's docstrings as pages: Google's sections, names in backticks that become links, annotations as written.

`Client.step` in backticks becomes a link. A name that looks like one of the SDK (`Session`, `Session.fork`, `refresh()`,
`stepwell.events`) and is none is a warning, so that docstrings name nothing that is gone.
"""

from __future__ import annotations

import builtins
import functools
import re
import types
import typing
from typing import Any

import sphinx.util.inspect
import sphinx.util.typing
from docutils import nodes
from signatures import Signatures
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.nodes import make_refnode

#: Classes that callers make themselves: only these show the arguments of their constructor.
MADE_BY_CALLERS = {"ClientConfig", "LocalServer", "State", "TlsConfig"}
NAME = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:\(\))?")
#: A name that must exist: of the package, of a class, or called.
CHECKED = re.compile(r"stepwell\.[\w.]+|(?:[A-Z]\w*[a-z]\w*)(?:\.\w+)*(?:\(\))?|(?:\w+\.)*\w+\(\)")
#: What examples call their objects.
VARIABLES = {"client": "Client", "session": "Session", "group": "SessionGroup", "server": "LocalServer"}
CONFIG = Config(napoleon_use_rtype=False, napoleon_use_ivar=True)
ROLE = "stepwell-name"


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    without_evaluation()
    app.add_role(ROLE, name_role)
    app.connect("autodoc-process-docstring", sections)
    app.connect("autodoc-process-signature", signature)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def without_evaluation() -> None:
    """Let signatures have annotations as their source does: Sphinx would show what `Inputs` and numpy's types stand for."""

    def get_type_hints(*_: object, **__: object) -> None:
        raise NameError("annotations stay text")

    shown = types.SimpleNamespace(**{**vars(typing), "get_type_hints": get_type_hints})
    sphinx.util.inspect.typing = shown
    sphinx.util.typing.typing = shown


def sections(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Read the sections of a docstring.

    Of an attribute, Sphinx's own napoleon would take all before a colon for a type.
    """
    kind = "method" if what in {"attribute", "data", "property"} else what
    lines[:] = GoogleDocstring(lines, CONFIG, app, kind, name, obj, options).lines()


def signature(_app: Sphinx, what: str, name: str, *_: object) -> tuple[str, None] | None:
    """Hide the constructors of classes that only the SDK makes."""
    if what in {"class", "exception"} and name.rsplit(".", 1)[-1] not in MADE_BY_CALLERS:
        return "", None
    return None


def name_role(
    _role: str, rawtext: str, text: str, _line: int, inliner: Any, *_: object
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """What stands in backticks: a name that may be one of the SDK, or any code."""
    shown = nodes.literal(rawtext, text, classes=["py"])
    if not NAME.fullmatch(text):
        return [shown], []
    context = inliner.document.settings.env.ref_context
    link = addnodes.pending_xref(
        rawtext,
        shown,
        refdomain="py",
        reftype="obj",
        reftarget=text.removesuffix("()"),
        refdoc=inliner.document.settings.env.docname,
        refwarn=True,
    )
    link["py:module"] = context.get("py:module")
    link["py:class"] = context.get("py:class")
    link["checked"] = CHECKED.fullmatch(text) is not None
    return [link], []


def resolve(app: Sphinx, env: BuildEnvironment, node: Any, shown: nodes.TextElement) -> nodes.Element | None:
    """Find a name of the SDK under its public name; let names pass that are none of the SDK.

    Returns None for what is missing, which Sphinx then warns of.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    objects = env.get_domain("py").objects
    names = candidates(target, node.get("py:module"), node.get("py:class"))
    # a class of a private module, which a signature has without it
    names += [name for name in objects if name.startswith("stepwell._") and name.endswith(f".{target}")]
    for name in names:
        if found := objects.get(name):
            return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, shown, name)
    if "checked" in node:
        passes = not node["checked"] or hasattr(builtins, target)
    else:
        passes = is_in_signature(node) and target.rsplit(".", 1)[-1] not in types_of_package()
    return shown if passes else None


def candidates(target: str, module: str | None, owner: str | None) -> list[str]:
    """The full names that a name may stand for."""
    first, _, rest = target.partition(".")
    names = [target]
    if first == "stepwell":  # where a class is defined
        names.append(f"stepwell.{target.rsplit('.', 1)[-1]}")
    if rest and first in VARIABLES:
        names.insert(0, f"{VARIABLES[first]}.{rest}")
    places = [
        f"{module}.{owner}",
        str(module),
        "stepwell",
        "stepwell.aio",
        "stepwell.aio_session",
        "stepwell.testing",
    ]
    return [full for name in names for full in (*(f"{place}.{name}" for place in places), name)]


def is_in_signature(node: nodes.Element) -> bool:
    """Whether a name is part of an annotation."""
    while node is not None and not isinstance(node, addnodes.desc_signature):
        node = node.parent
    return node is not None


@functools.cache
def types_of_package() -> frozenset[str]:
    """The types that public signatures of the SDK name: each must have its place in the reference."""
    return frozenset(re.findall(r"^type (\w+)(?: =|:)", "\n".join(Signatures().lines()), re.MULTILINE))
