"""What a release is refused for, what its notes say, and that its checksums are those of its files."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import release

DATED = "# Changelog\n\n## [0.2.0] - 2026-12-01\n\nTwo.\n\n### Added\n\n- One.\n\n## [0.1.0] - unreleased\n\nOld.\n"
SAME = {"pyproject.toml": "0.2.0", "server/front/Cargo.toml": "0.2.0"}


@pytest.mark.parametrize(
    ("version", "changes", "expected"),
    [
        ("0.2.0", {}, []),
        (
            "0.2.0",
            {"named": {**SAME, "server/front/Cargo.toml": "0.1.9"}},
            ["server/front/Cargo.toml: the version must be 0.2.0; got 0.1.9"],
        ),
        (
            "0.2.0",
            {"changed": [" M README.md"]},
            ["the tree must have no uncommitted changes; got  M README.md"],
        ),
        ("0.3.0", {"named": {}}, ["CHANGELOG.md: must have a section ## [0.3.0]"]),
        (
            "0.1.0",
            {"named": {}},
            ["CHANGELOG.md: the section [0.1.0] must have a date such as 2026-12-01; got 'unreleased'"],
        ),
    ],
)
def test_what_hinders_a_release_is_named(version: str, changes: dict[str, Any], expected: list[str]) -> None:
    given: dict[str, Any] = {"changelog": DATED, "named": SAME, "changed": [], **changes}
    assert list(release.hindrances(version, **given)) == expected


def test_the_notes_are_the_section_of_the_version() -> None:
    assert release.notes("0.2.0", DATED) == "# Stepwell 0.2.0\n\nTwo.\n\n### Added\n\n- One.\n"
    assert release.notes("0.1.0", DATED) == "# Stepwell 0.1.0\n\nOld.\n"
    with pytest.raises(LookupError, match=r"CHANGELOG\.md has no section \[0\.3\.0\]"):
        release.notes("0.3.0", DATED)


def test_sha256sum_accepts_the_checksums(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(release, "DIST", tmp_path)
    for name in ("a.whl", "b.tar.gz"):
        (tmp_path / name).write_bytes(name.encode())
    for _ in range(2):  # the sums of an earlier run are not part of the release
        release.write_sums()
        subprocess.run(["sha256sum", "--check", "--strict", release.SUMS], cwd=tmp_path, check=True)
    assert len((tmp_path / release.SUMS).read_text().splitlines()) == 2
