"""Which lines of the product run in this process, for `make coverage`.

A trace function, all that Python 3.11 has for it, makes a test two to four times as long. SlipCover puts a probe into each
line as a module is imported; a test takes a twentieth longer. What it finds becomes data of coverage.py, which reports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import slipcover
from coverage import Coverage, CoverageData

ROOT = Path(__file__).parents[2]
#: A probe never changes the code around it: SlipCover's default, to take probes out while tests run, searches all
#: functions of all modules, and fails if another thread adds one.
_KEEP_PROBES = -1
_SETTINGS = Coverage(config_file=ROOT / "pyproject.toml")
DATA_FILE = ROOT / str(_SETTINGS.get_option("run:data_file"))


class LineCoverage:
    """Notes the lines that run in modules which are imported from now on."""

    def __init__(self) -> None:
        omit: Any = _SETTINGS.get_option("run:omit")
        self._lines = slipcover.Slipcover(d_miss_threshold=_KEEP_PROBES, exclude_lines=[])
        self._files = slipcover.FileMatcher(sources=list(_packages()), omit=omit)
        slipcover.ImportManager(self._lines, self._files).__enter__()
        # pytest rewrites asserts in packages that have a plugin for it, ours among them, and compiles them itself
        slipcover.wrap_pytest(self._lines, self._files)

    def save(self, data_file: Path = DATA_FILE) -> None:
        """Write which lines ran, beside the data of other processes. Files of which none did are in it too."""
        unseen: dict[str, list[int]] = {
            str(path): [] for folder in _packages() for path in folder.rglob("*.py")
        }
        found = self._lines.get_coverage()["files"]
        seen = {str(Path(name).resolve()): file["executed_lines"] for name, file in found.items()}
        data = CoverageData(str(data_file), suffix=True)
        data.add_lines({name: lines for name, lines in (unseen | seen).items() if self._files.matches(name)})
        data.write()


def _packages() -> Iterator[Path]:
    names: Any = _SETTINGS.get_option("run:source_pkgs")
    for name in names:
        spec = find_spec(name)
        assert spec is not None, name
        yield Path(str(spec.origin)).parent
