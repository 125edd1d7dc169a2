"""A server whose model is reloaded again and again ends with what it took in between.

The short version of what `make soak` does.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.load.reloads import reload
from support.samples import examples

pytestmark = pytest.mark.plain("it loads models, for which a secured server wants an admin")


@pytest.mark.slow
def test_reloads_leave_nothing_behind(tmp_path: Path) -> None:
    reload(tmp_path, examples(40), 41).require_level()
