"""Imports the operator's functions that convert states to another version of a model."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from stepwell_server.engine.versions.record_upgrade import Migration
from stepwell_server.errors import StartError

_MAX_SHOWN = 100


def load_migrations(named: Mapping[str, str]) -> dict[str, Migration]:
    """Import functions, given as MODULE:FUNCTION; the current folder is searched for modules first.

    Raises:
        StartError: one does not exist or is not a function, or its module cannot be imported.
    """
    if named and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return {name: _function(name, text) for name, text in named.items()}


def _function(name: str, text: str) -> Migration:
    module, _, path = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
    # SystemExit: a module may call sys.exit().
    except (Exception, SystemExit) as error:
        raise _error(name, text, f"cannot be imported: {type(error).__name__}: {error}") from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise _error(name, text, f"{module} has no {path}")
        found = getattr(found, attribute)
    if not callable(found):
        raise _error(name, text, f"must be a function; it is {found!r:.{_MAX_SHOWN}}")
    function: Migration = found
    return function


def _error(name: str, text: str, why: str) -> StartError:
    return StartError(f"--migration: {name}={text}: {' '.join(why.split())}")
