"""Which files the modules of --import are, found without an import."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepwell_server.compile import cache
from stepwell_server.compile.errors import ModelError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with modules in it."""
    (tmp_path / "of_mine" / "layers").mkdir(parents=True)
    (tmp_path / "of_mine" / "layers" / "cells.py").touch()
    (tmp_path / "alone.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", ["of_mine", "of_mine.layers", "of_mine.layers.cells"])
def test_folders_may_do_without_an_init_file(folder: Path, module: str) -> None:
    assert cache.module_files(module) == [folder / "of_mine" / "layers" / "cells.py"]


def test_a_plain_module_has_no_modules_in_it() -> None:
    with pytest.raises(ModelError, match=r"^--import alone\.alone: there is no module 'alone\.alone' here"):
        cache.module_files("alone.alone")
