"""What `make test` keeps for its next run is taken while it is whole, and never else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import samples
from support.models import programs


class Built(Exception):
    """The model was built, so that it is compiled again."""


def build() -> Any:
    raise Built


def test_a_program_is_taken_from_an_earlier_run_if_it_is_whole(tmp_path: Path) -> None:
    known = programs.saved("lstm_dense")
    for name in ("whole", "damaged", "of_others"):
        programs._keep(known.path, None, tmp_path / name)
    taken = programs.saved("whole", build, kept=tmp_path)
    assert (
        programs.program("whole", build, kept=tmp_path).fingerprint
        == programs.program("lstm_dense").fingerprint
    )
    assert taken.path.read_bytes() == known.path.read_bytes()

    (entry,) = (path for path in (tmp_path / "damaged").iterdir() if path.name != "model.keras")
    entry.write_bytes(b"something else")
    with pytest.raises(Built):
        programs.saved("damaged", build, kept=tmp_path)
    # other frameworks, or another processor, give its key another name
    (entry,) = (path for path in (tmp_path / "of_others").iterdir() if path.name != "model.keras")
    entry.rename(entry.with_name("0" * 64))
    with pytest.raises(Built):
        programs.saved("of_others", build, kept=tmp_path)
    with pytest.raises(Built):
        programs.saved("never_kept", build, kept=tmp_path)


def test_nothing_is_kept_for_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in programs._SOURCES:
        assert list(programs._ROOT.glob(pattern)), pattern
    source = tmp_path / "tests" / "support" / "models" / "zoo.py"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(programs, "_ROOT", tmp_path)
    monkeypatch.setattr(samples, "ALL", False)
    monkeypatch.setenv("TEST_KEEP_PROGRAMS", "1")
    folders = []
    for text in ("one", "other"):
        source.write_text(text)
        folder = programs.kept_folder.__wrapped__()
        assert folder is not None
        assert list(folder.parent.iterdir()) == [folder]
        folders.append(folder)
    assert folders[0] != folders[1]
    own = tmp_path / "test_own.py"
    monkeypatch.setattr(programs, "kept_folder", lambda: folders[1])
    of_own = []
    for text in ("one", "other", "one"):
        own.write_text(text)
        of_own.append(programs.kept_with(str(own)))
    assert of_own[0] == of_own[2] != of_own[1]
    assert {folder.parent for folder in of_own if folder} == {folders[1]}
    monkeypatch.undo()
    monkeypatch.delenv("TEST_KEEP_PROGRAMS", raising=False)
    assert programs.kept_folder.__wrapped__() is None
