"""Links of pages to files of the repository: each becomes a page of the site that shows the file.

Sphinx would offer such a file as a download. A link to a file that does not exist is an error of MyST.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

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
            files_of(app.env).setdefault(page, set()).add(name)
            target = app.builder.get_relative_uri(page, f"{FOLDER}/{name}")
            link = nodes.reference("", "", *node.children, internal=True, refuri=target)
            node.replace_self(link)


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
            {"title": title, "body": f"<h1>{name}</h1>{code}", "parents": []},
            "page.html",
        )


def language_of(path: Path) -> str:
    """The language of a file by its name."""
    from pygments.lexers import find_lexer_class_for_filename

    lexer = find_lexer_class_for_filename(path.name)
    return lexer.aliases[0] if lexer else "text"
