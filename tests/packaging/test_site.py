"""The documents build as a site without a warning, and a broken link, anchor or reference fails the build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PAGES = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
#: What loads a file with the page, by tag.
LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src"}


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs-site` does."""
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--nitpicky", "--conf-dir", "docs"]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(out)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=280, check=False)


class Loaded(HTMLParser):
    """The files that a page of the site loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.files: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in LOADS:
            self.files.append(dict(attrs).get(LOADS[tag]) or "")


def test_the_site_builds_and_loads_nothing_from_elsewhere(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    built = build(root, out)
    assert built.returncode == 0, built.stderr

    pages = sorted(out.rglob("*.html"))
    documents = {path.relative_to(root).with_suffix(".html") for path in (root / "docs").rglob("*.md")}
    assert {page.relative_to(out) for page in pages} > documents
    for page in pages:
        for file in Loaded(page.read_text()).files:
            assert not re.match(r"\w+:|//", file), f"{page.name} loads {file}"
            assert (page.parent / re.split("[?#]", file)[0]).exists(), f"{page.name} loads {file}"
    assert "setIndex" in (out / "searchindex.js").read_text()


def test_what_is_broken_fails_the_build(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(root / "docs", source / "docs")
    for name in ("pyproject.toml", *PAGES):
        shutil.copy(root / name, source / name)
    planted = source / "docs" / "guides" / "planted.md"
    planted.write_text("# Planted\n\n[page](gone.md) [anchor](steps.md#gone) [file](../../gone.py)\n")

    built = build(source, tmp_path / "site")

    assert built.returncode != 0
    found = [line for line in built.stderr.splitlines() if "planted.md" in line]
    for wrong in ("gone.md", "local id not found in doc 'docs/guides/steps': 'gone'", "../../gone.py"):
        assert any(wrong in line for line in found), f"{wrong}: {built.stderr}"
