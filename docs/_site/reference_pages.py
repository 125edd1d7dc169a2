"""Parts of pages that are made from the code when the site is built.

A comment in a page, such as <!-- made from the code: types -->, becomes what the function of that name returns.
"""

from __future__ import annotations

import ast
import collections
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import protocol
from signatures import Signatures, defined_by, tree_of
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

PLACE = re.compile(r"^<!-- made from the code: ([\w-]+) -->$", re.MULTILINE)
ROOT = Path(__file__).resolve().parents[2]
#: What Markdown would read as markup.
MARKUP = re.compile(r"([\\`*_\[\]<>|#])")
#: What stands in texts of the code as it stands in a terminal: options, 'commands', paths of documents.
CODE = re.compile(r"(?<![\w-])(--[a-z][\w-]*[a-z0-9])|(?<!\w)'([^' ][^']*)'(?!\w)|(docs/[\w/.-]+\.md)")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("source-read", fill_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def fill_in(_app: Sphinx, page: str, source: list[str]) -> None:
    """Put in what is made from the code."""
    source[0] = PLACE.sub(lambda place: PARTS[place[1]](page), source[0])


def prose(text: str, page: str) -> str:
    """A text of the code as Markdown: options and commands become code, pages become links."""
    parts, end = [], 0
    for found in CODE.finditer(text):
        parts.append(MARKUP.sub(r"\\\1", text[end : found.start()]))
        option, command, path = found.groups()
        parts.append(link(path, page) if path else f"`{option or command}`")
        end = found.end()
    return "".join([*parts, MARKUP.sub(r"\\\1", text[end:])])


def link(path: str, page: str) -> str:
    """A link to a document, from a page of the site."""
    return f"[]({os.path.relpath(path, PurePosixPath(page).parent)})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" for line in lines)


def rest(text: str) -> str:
    """A part of a Markdown page in reStructuredText."""
    return f"````{{eval-rst}}\n{text}\n````"


# -------------------------------------------------------------------------------------------------------------- SDK


def types(_page: str) -> str:
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


# ----------------------------------------------------------------------------------------------------------- server


def settings(page: str) -> str:
    """Each setting of a server, with all its names."""
    from stepwell_server.cli.serve import SETTINGS

    parts = []
    for setting in SETTINGS:
        form = setting.format.form
        option = f"`{form}...`" if setting.names.is_argument else f"`{f'{setting.option} {form}'.strip()}`"
        names = [option, f"`{setting.names.alias}`"] if setting.names.alias else [option]
        names.append(f"`{setting.variable}`")
        if setting.default_text:
            names.append(f"default `{setting.default_text}`")
        text = setting.full_help.split("  [env var:")[0].removesuffix(f" Default: {setting.default_text}.")
        parts.append(f"## {setting.name}\n\n{' · '.join(names)}\n\n{prose(text, page)}\n")
    return "\n".join(parts)


def metrics(page: str) -> str:
    """Each metric, with its type and labels."""
    from surface import families

    rows = {}
    for family in families():
        name = family.name if family.type == "histogram" else family.samples[0].name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        kind = f"{family.type} by {', '.join(f'`{label}`' for label in labels)}" if labels else family.type
        rows[name] = (f"`{name}`", f"{kind.capitalize()}. {prose(family.documentation, page)}")
    return table(("metric", "type, labels and meaning"), [row for _, row in sorted(rows.items())])


def errors(page: str) -> str:
    """Each reason with its status, the class of the SDK, and whether the SDK retries."""
    from surface import kinds_of_errors

    rows = collections.defaultdict(list)
    for kind, code in kinds_of_errors():
        rows[kind.reason].append((kind, code))
    return table(
        ("reason", "gRPC status, class of the SDK", "meaning"),
        [row_of_reason(reason, rows[reason], page) for reason in sorted(rows)],
    )


def row_of_reason(reason: str, kinds: list[tuple[type, str]], page: str) -> tuple[str, ...]:
    """A reason by the most general of its classes."""
    import grpc

    from stepwell._transport.retry import RetryPolicy
    from stepwell._transport.status import Status, to_error

    # the base of all errors has a reason too, and says nothing of it
    described = [kind for kind, _ in kinds if kind.__base__ is not Exception]
    kind = min(described, key=lambda each: len(each.__mro__))
    error = to_error(Status(grpc.StatusCode[kinds[0][1]], "text", reason))
    retried = "" if RetryPolicy().delay_s(1, error) is None else " The SDK retries the call."
    codes = ", ".join(f"`{code}`" for code in sorted({code for _, code in kinds}))
    text = prose((kind.__doc__ or "").split("\n\n")[0].replace("`", "'"), page)
    return f"`{reason}`", f"{codes}, {{py:exc}}`~stepwell.{type(error).__name__}`", text + retried


def error_classes(_page: str) -> str:
    """The classes of the SDK's errors, each after its base."""
    import stepwell.errors

    named = {vars(stepwell.errors)[name] for name in stepwell.errors.__all__}
    own = "   :no-inherited-members:\n   :show-inheritance:\n"
    lines = [
        f".. autoexception:: {kind.__name__}\n{own if kind.__base__ in named else ''}"
        for kind in vars(stepwell.errors).values()
        if isinstance(kind, type) and kind in named
    ]
    return rest("\n".join([".. py:module:: stepwell.errors\n\n.. currentmodule:: stepwell\n", *lines]))


def protocol_parts(name: str) -> Callable[[str], str]:
    """The reference of a file of the protocol."""

    def part(_page: str) -> str:
        return "\n".join(lines_of_protocol(name))

    return part


def lines_of_protocol(name: str) -> Iterator[str]:
    """The services, messages and enums of a file, in its order."""
    yield from protocol.File(name).lines()


PARTS: dict[str, Callable[[str], str]] = {
    "error-classes": error_classes,
    "errors": errors,
    "metrics": metrics,
    "settings": settings,
    "types": types,
    **{
        f"protocol-{name}": protocol_parts(f"stepwell/v1/{name}.proto")
        for name in ("sessions", "watch", "models", "tensors", "errors")
    },
}
