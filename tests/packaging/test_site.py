"""A broken link, anchor or reference fails the build of the site, and what `make docs-site` checks of it afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from unittest import mock

import check_site
import pytest

PAGES = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
#: Enough of the site: pages of other folders cost most of the time.
BUILT = "docs/index.md,docs/guides/**,docs/reference/sdk/**"


@pytest.mark.slow
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

    options = ["--quiet", "--fail-on-warning", "--keep-going", "--nitpicky", "--conf-dir", "docs"]
    built = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "--builder", "dummy", *options),
            *("--define", f"include_patterns={BUILT}", ".", str(tmp_path / "site")),
        ],
        cwd=source,
        env=os.environ | {"PYTHONPATH": str(source / "client")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )

    assert built.returncode != 0
    for place, wrong in (
        ("planted.md:3", "'myst' cross-reference target not found: 'gone.md'"),
        ("planted.md:3", "local id not found in doc 'docs/guides/steps': 'gone'"),
        ("planted.md:3", "'myst' cross-reference target not found: '../../gone.py'"),
        ("session.py:docstring of stepwell.session.Session", "not found: Session.gone"),
    ):
        assert any(place in line and wrong in line for line in built.stderr.splitlines()), built.stderr


def test_pages_that_load_other_sites_or_missing_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "own.js").touch()
    tags = '<script src="own.js?v=1"></script><img src="gone.png"><link href="https://example.com/a.css">'
    (tmp_path / "page.html").write_text(tags)
    assert list(check_site.wrong_files(tmp_path)) == [
        "page.html: loads gone.png, which does not exist",
        "page.html: loads https://example.com/a.css from another site",
    ]


def test_documents_without_a_page_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "there.html").touch()
    (tmp_path / "searchindex.js").write_text("Search.setIndex({})")
    documents = [Path("docs/there.md"), Path("docs/gone.md")]
    assert list(check_site.missing_pages(tmp_path, documents)) == [f"docs/gone.md: has no page in {tmp_path}"]


def test_public_names_that_no_page_describes_are_found(tmp_path: Path) -> None:
    names = [name for name in check_site.public_names() if name != "stepwell.Client"]
    described = [f"{name} py:class 1 - -" for name in names]
    header = b"# Sphinx inventory version 2\n# Project: a\n# Version: 1\n# zlib\n"
    (tmp_path / "objects.inv").write_bytes(header + zlib.compress("\n".join(described).encode()))
    assert list(check_site.missing_names(tmp_path)) == ["stepwell.Client: no page describes it"]


def test_pages_of_files_share_the_navigation_of_their_depth(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(root / "docs" / "_site")
    import repository_files  # imports Sphinx

    resolved: list[str] = []

    def resolve(_env: object, page: str, _builder: object, **options: object) -> str:
        resolved.append(page)
        return f"{page} {options['maxdepth']}"

    monkeypatch.setattr(repository_files, "global_toctree_for_doc", resolve)
    app = mock.Mock()
    app.builder.render_partial = lambda tree: {"fragment": tree}
    asked = [(1, 2), (2, 2), (1, 2), (2, 2), (1, 3)]
    found = [repository_files.navigation(app, folders, maxdepth=depth) for folders, depth in asked]
    assert found == [
        "files/file 2",
        "files/files/file 2",
        "files/file 2",
        "files/files/file 2",
        "files/file 3",
    ]
    assert resolved == ["files/file", "files/files/file", "files/file"]
