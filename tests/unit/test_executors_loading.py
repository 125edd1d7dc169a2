"""Loading TensorFlow costs no more than it must, and leaves Python as it was."""

from __future__ import annotations

import gc
import importlib
import sys

import pytest

from stepwell_server.engine.executors.light_imports import light_imports


@pytest.mark.parametrize("name", ["IPython", "matplotlib", "pandas"])
def test_no_garbage_is_looked_for_and_what_no_server_needs_is_left_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    with light_imports():
        assert not gc.isenabled()
        with pytest.raises(ImportError, match=name):
            importlib.import_module(name)
    assert gc.isenabled()
    assert gc.get_freeze_count()
    assert name not in sys.modules


def test_what_was_imported_or_turned_off_before_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", gc)
    gc.disable()
    try:
        with pytest.raises(ModuleNotFoundError, match="nowhere"), light_imports():
            importlib.import_module("matplotlib.nowhere")
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert sys.modules["matplotlib"] is gc
