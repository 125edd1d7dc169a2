"""The console: a page, its script and its style sheet, from the folder that `make console` fills.

They hold no data and need no token. The page asks the server's public JSON for all data, with the token of its user.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from stepwell_server.rpc.fronts.base import HttpAnswer
from stepwell_server.rpc.http.answers import Headers

METHODS = ("GET", "HEAD")
PAGE = "/console"
_FOLDER = Path(__file__).resolve().parents[2] / "console" / "dist"
_FILES: Mapping[str, tuple[str, str]] = {
    PAGE: ("index.html", "text/html; charset=utf-8"),
    f"{PAGE}/console.js": ("console.js", "text/javascript; charset=utf-8"),
    f"{PAGE}/console.css": ("console.css", "text/css; charset=utf-8"),
    f"{PAGE}/licenses.txt": ("licenses.txt", "text/plain; charset=utf-8"),
}
#: Nothing from elsewhere, no script or style in the page itself, and no other page may frame it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Headers = (
    ("content-security-policy", _POLICY),
    ("cross-origin-opener-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
    # a browser keeps the files, and asks each time whether they are still the same
    ("cache-control", "no-cache"),
    ("vary", "accept-encoding"),
)


class _File(NamedTuple):
    content: bytes
    compressed: bytes
    tag: str


def has(path: str) -> bool:
    """Whether a path is one of the console's."""
    return path == f"{PAGE}/" or path in _FILES


def answer(http_method: str, path: str, headers: Mapping[str, str]) -> HttpAnswer:
    """Return the answer to a GET or HEAD of a path that `has` accepts."""
    if path == f"{PAGE}/":
        # the page's addresses are relative to the path without the slash, also behind a proxy with a prefix
        return HttpAnswer(HTTPStatus.PERMANENT_REDIRECT, (("location", f"..{PAGE}"),), b"")
    name, media_type = _FILES[path]
    file = _file(name)
    zipped = "gzip" in headers.get("accept-encoding", "").lower()
    tag = f'"{file.tag}{"-gzip" if zipped else ""}"'
    found: Headers = (*_HEADERS, ("content-type", media_type), ("etag", tag))
    if tag in headers.get("if-none-match", ""):
        return HttpAnswer(HTTPStatus.NOT_MODIFIED, found, b"")
    if zipped:
        found = (*found, ("content-encoding", "gzip"))
    content = file.compressed if zipped else file.content
    if http_method == "HEAD":
        return HttpAnswer(HTTPStatus.OK, (*found, ("content-length", str(len(content)))), b"")
    return HttpAnswer(HTTPStatus.OK, found, content)


@cache
def _file(name: str) -> _File:
    content = (_FOLDER / name).read_bytes()
    return _File(content, gzip.compress(content, mtime=0), hashlib.sha256(content).hexdigest()[:32])
