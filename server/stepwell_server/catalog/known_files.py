"""The files that the server knows as versions of a model, so that a call can load one by its number alone."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from stepwell_server.catalog.files.folder import ModelFolder
from stepwell_server.catalog.interfaces import Engine


class KnownFiles:
    """The files of the command line and of the folder, and those loaded before. Used on the event loop."""

    def __init__(
        self, engine: Engine, of_command_line: Mapping[str, Mapping[int, Path]], root: Path | None
    ) -> None:
        self._engine = engine
        self._of_command_line = of_command_line
        self._root = root

    async def __call__(self, name: str) -> dict[int, str]:
        """Return the absolute paths of the existing files of a name, by version."""
        own = self._engine.catalogue().get(name)
        found = {} if own is None else {v: known.source for v, known in own.known.items() if known.source}
        return await asyncio.to_thread(self._look, name, found)

    def _look(self, name: str, loaded_before: Mapping[int, str]) -> dict[int, str]:
        found = dict(loaded_before)
        if name in self._of_command_line:
            found |= {version: str(path) for version, path in self._of_command_line[name].items()}
        elif self._root is not None:
            look = ModelFolder(self._root).settled()
            found |= {version: file.path for version, file in look.versions.get(name, {}).items()}
        return {version: os.path.abspath(path) for version, path in found.items() if os.path.isfile(path)}
