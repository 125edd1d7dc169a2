"""Parts of pages that are made from the code when the site is built.

A comment in a page, such as <!-- made from the code: types -->, becomes what the function of that name returns.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

from signatures import Signatures, defined_by, tree_of
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

PLACE = re.compile(r"^<!-- made from the code: ([\w-]+) -->$", re.MULTILINE)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def fill_in(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Put in what is made from the code."""
    source[0] = PLACE.sub(lambda place: PARTS[place[1]](), source[0])


def types() -> str:
    """The names of types that signatures of the SDK use, and what each stands for."""
    signatures = Signatures()
    signatures.lines()
    aliases: dict[str, str] = {}
    for module, name in sorted(signatures.reached):
        if name not in aliases and (value := value_of_alias(module, name)):
            text = docstring_after(module, name)
            aliases[name] = f".. py:type:: {name}\n   :canonical: {value}\n\n   {text}\n"
    return rest("\n".join(text for _, text in sorted(aliases.items())))


def value_of_alias(module: str, name: str) -> str | None:
    """What a name of a type stands for, as the source has it."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and name in defined_by(node) and node.value:
            text = ast.unparse(node.value)
            return None if "TypeVar(" in text else text.strip("'")
    return None


def docstring_after(module: str, name: str) -> str:
    """The docstring of a name of a module."""
    text = ModuleAnalyzer.for_module(module).find_attr_docs()
    if ("", name) not in text:
        raise LookupError(f"{module}.{name} must have a docstring: signatures of the SDK use it")
    return "\n   ".join(text["", name]).rstrip()


def rest(text: str) -> str:
    """A part of a Markdown page in reStructuredText."""
    return f"````{{eval-rst}}\n{text}\n````"


PARTS: dict[str, Callable[[], str]] = {"types": types}
