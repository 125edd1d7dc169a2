"""Check the site that Sphinx built, for `make docs-site`.

    python scripts/check_site.py out/site     prints each problem; the exit code is 1 if there is one

Every document has its page, every public name of the SDK is described, and no page loads a file from another site or
one that does not exist.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import stepwell
import stepwell.testing

ROOT = Path(__file__).resolve().parent.parent
MODULES = (stepwell.aio, stepwell.config, stepwell.errors, stepwell.events, stepwell.testing)
#: The attribute with the address of a file that a page loads, by tag.
LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src"}


def main(site: Path) -> int:
    """Print the problems; the exit code."""
    documents = [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")]
    found = [*missing_pages(site, documents), *wrong_files(site), *missing_names(site)]
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


def missing_pages(site: Path, documents: list[Path]) -> Iterator[str]:
    """Documents without a page, and a search that finds nothing."""
    for document in documents:
        if not (site / document).with_suffix(".html").exists():
            yield f"{document}: has no page in {site}"
    index = site / "searchindex.js"
    if not index.exists() or "setIndex" not in index.read_text():
        yield f"{index}: is no search index"


class _Loaded(HTMLParser):
    """The files that a page loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.files: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in LOADS:
            self.files.append(dict(attrs).get(LOADS[tag]) or "")


def wrong_files(site: Path) -> Iterator[str]:
    """Files that a page loads from another site, and those that do not exist."""
    for page in sorted(site.rglob("*.html")):
        for file in _Loaded(page.read_text()).files:
            if re.match(r"\w+:|//", file):
                yield f"{page.relative_to(site)}: loads {file} from another site"
            elif not (page.parent / re.split("[?#]", file)[0]).exists():
                yield f"{page.relative_to(site)}: loads {file}, which does not exist"


def public_names() -> list[str]:
    """The full names that the SDK exports."""
    names = {f"stepwell.{name}" for name in stepwell.__all__}
    return sorted(names | {f"{module.__name__}.{name}" for module in MODULES for name in module.__all__})


def missing_names(site: Path) -> Iterator[str]:
    """Public names of the SDK that no page describes, under their own module or as one of `stepwell`."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    described = {line.split()[0] for line in inventory.splitlines()}
    for name in public_names():
        if not described & {name, f"stepwell.{name.rsplit('.', 1)[-1]}"}:
            yield f"{name}: no page describes it"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
