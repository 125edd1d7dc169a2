"""The code in docs/tutorials/seed.md runs, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepwell.testing import LocalServer

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "seed.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:__array__ implementation:DeprecationWarning"
    ),  # Keras's own, when saving
    pytest.mark.timeout(180),
]


def blocks() -> list[tuple[int, str, str]]:
    """Each piece of code: its line in the page, itself, and the text that it must print."""
    text = PAGE.read_text()
    found: list[tuple[int, str, str]] = []
    for match in BLOCK.finditer(text):
        kind, content = match.groups()
        if kind == "python":
            found.append((text.count("\n", 0, match.start()) + 1, content, ""))
        else:
            line, code, _ = found.pop()
            found.append((line, code, content))
    return found


@pytest.mark.slow
def test_every_block_runs_and_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_CACHE_DIR", str(tmp_path / "cache"))
    names: dict[str, object] = {}
    try:
        run_all(names, capsys)
    finally:
        server = names.get("server")
        if isinstance(server, LocalServer) and server.pid is not None:
            server.stop()


def run_all(names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    shown = 0
    for line, code, expected in blocks():
        capsys.readouterr()
        exec(compile("\n" * line + code, str(PAGE), "exec"), names)  # noqa: S102  # our own page
        printed = capsys.readouterr().out
        assert printed == expected, f"docs/tutorials/seed.md, the code at line {line}"
        shown += bool(expected)
    assert shown >= 8
