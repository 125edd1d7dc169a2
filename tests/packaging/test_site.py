"""The documents build as a site without a warning, and a broken link, anchor or reference fails the build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

import stepwell
import stepwell.testing

pytestmark = pytest.mark.slow

PAGES = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
MODULES = (stepwell.aio, stepwell.config, stepwell.errors, stepwell.events, stepwell.testing)
#: What loads a file with the page, by tag.
LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src"}


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs-site` does."""
    options = ["--quiet", "--fail-on-warning", "--keep-going", "--nitpicky", "--conf-dir", "docs"]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(out)]
    own = os.environ | {"PYTHONPATH": str(source / "client")}
    return subprocess.run(
        command, cwd=source, env=own, capture_output=True, text=True, timeout=280, check=False
    )


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
    inventory = zlib.decompress((out / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    described = {line.split()[0] for line in inventory.splitlines()}
    public = {f"stepwell.{name}" for name in stepwell.__all__}
    public |= {f"{module.__name__}.{name}" for module in MODULES for name in module.__all__}
    elsewhere = {name for name in public if f"stepwell.{name.rsplit('.', 1)[-1]}" in described}
    assert public - elsewhere <= described
    assert "setIndex" in (out / "searchindex.js").read_text()


def test_what_is_broken_fails_the_build(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("docs", "client", "scripts", "proto"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "buf.yaml", *PAGES):
        shutil.copy(root / name, source / name)
    planted = source / "docs" / "guides" / "planted.md"
    planted.write_text("# Planted\n\n[page](gone.md) [anchor](steps.md#gone) [file](../../gone.py)\n")
    module = source / "client" / "stepwell" / "session.py"
    text = '"""One user\'s'
    assert text in module.read_text()
    module.write_text(module.read_text().replace(text, f"{text} `Session.gone`"))

    built = build(source, tmp_path / "site")

    assert built.returncode != 0
    for place, wrong in (
        ("planted.md:3", "'myst' cross-reference target not found: 'gone.md'"),
        ("planted.md:3", "local id not found in doc 'docs/guides/steps': 'gone'"),
        ("planted.md:3", "'myst' cross-reference target not found: '../../gone.py'"),
        ("session.py:docstring of stepwell.session.Session", "not found: Session.gone"),
    ):
        assert any(place in line and wrong in line for line in built.stderr.splitlines()), built.stderr
