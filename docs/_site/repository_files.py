"""Links of pages to files of the repository: each becomes a page of the site that shows the file.

Sphinx would offer such a file as a download. A link to a file that does not exist is an error of MyST. The path of a
file in backticks, from the root, becomes a link too; `make check-repo` sees that it exists.
"""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from repository import tracked_files
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.adapters.toctree import global_toctree_for_doc

FOLDER = "files"
#: What Pygments calls the language of a file where its name does not say it.
LANGUAGES = {".proto": "protobuf", ".service": "ini", ".pyi": "python"}


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to Sphinx."""
    app.connect("doctree-read", show_files, priority=100)  # before Sphinx collects downloads
    app.connect("env-purge-doc", forget)
    app.connect("env-merge-info", merge)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def files_of(env: BuildEnvironment) -> dict[str, set[str]]:
    """The files to which each page links."""
    if not hasattr(env, "repository_files"):
        env.repository_files = {}
    files: dict[str, set[str]] = env.repository_files
    return files


def show_files(app: Sphinx, doctree: nodes.document) -> None:
    """Point each link to a file at its page."""
    page = app.env.docname
    for node in list(doctree.findall(addnodes.download_reference)):
        name, path = app.env.relfn2path(node["reftarget"], page)
        if is_text(Path(path)):
            node.replace_self(link(app, name, *node.children))
    for code in list(doctree.findall(nodes.literal)):
        name = code.astext()
        is_alone = not isinstance(code.parent, nodes.reference | nodes.title)
        if is_alone and name in tracked() and is_text(Path(app.srcdir, name)):
            code.replace_self(link(app, name, code.deepcopy()))


@functools.cache
def tracked() -> frozenset[str]:
    """The files of the repository."""
    return frozenset(tracked_files())


def link(app: Sphinx, name: str, *shown: nodes.Node) -> nodes.reference:
    """A link from the current page to that of a file, or to the page that the site makes of it."""
    page = app.env.docname
    target = str(Path(name).with_suffix(""))
    if not name.endswith(".md") or target not in app.env.found_docs:
        files_of(app.env).setdefault(page, set()).add(name)
        target = f"{FOLDER}/{name}"
    return nodes.reference("", "", *shown, internal=True, refuri=app.builder.get_relative_uri(page, target))


def is_text(path: Path) -> bool:
    """Whether a file can be shown."""
    return path.is_file() and b"\0" not in path.read_bytes()


def forget(_app: Sphinx, env: BuildEnvironment, page: str) -> None:
    """Forget the links of a page that is read again."""
    files_of(env).pop(page, None)


def merge(_app: Sphinx, env: BuildEnvironment, _pages: list[str], other: BuildEnvironment) -> None:
    """Take over what another process has read."""
    files_of(env).update(files_of(other))


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file to which a page links."""
    for name in sorted(set().union(*files_of(app.env).values())):
        path = Path(app.srcdir, name)
        language = LANGUAGES.get(path.suffix) or language_of(path)
        code = app.builder.highlighter.highlight_block(path.read_text(encoding="utf-8"), language)
        title = posixpath.basename(name)
        yield (
            f"{FOLDER}/{name}",
            {
                "title": title,
                "body": f"<h1>{title}</h1><p><code>{name}</code></p>{code}",
                "parents": [],
                "toctree": functools.partial(navigation, app, name.count("/") + 1),
            },
            "page.html",
        )


@functools.cache
def navigation(app: Sphinx, folders: int, **options: Any) -> str:
    """The tree of pages beside each page of a file that is so deep in folders.

    Sphinx would resolve it for each page, in a quarter of a build's time. But such a page has no place in the tree, so
    the trees of two pages differ only in their links, by the number of folders above the page.
    """
    page = "/".join([FOLDER] * folders + ["file"])
    tree = global_toctree_for_doc(app.env, page, app.builder, tags=app.tags, **{"collapse": True} | options)
    fragment: str = app.builder.render_partial(tree)["fragment"]
    return fragment


def language_of(path: Path) -> str:
    """The language of a file by its name."""
    from pygments.lexers import find_lexer_class_for_filename

    lexer = find_lexer_class_for_filename(path.name)
    return lexer.aliases[0] if lexer else "text"
