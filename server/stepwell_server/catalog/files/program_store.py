"""Stores the programs of models whose files are gone, such as uploads, in the data folder, so that a restart finds them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Collection
from pathlib import Path

from stepwell_server import program_file
from stepwell_server.compile.errors import ModelError
from stepwell_server.errors import Unavailable
from stepwell_server.files import private_files
from stepwell_server.program import Program

FOLDER = "models"
"""The name of the folder."""


NOT_KEPT = "its file was uploaded or is temporary, and is not kept: after a restart the server does not have this version"
"""The remark on a version whose file is gone and whose program is not stored."""


class ProgramStore:
    """A folder of programs that only the server uses. Blocking work runs on threads."""

    def __init__(self, folder: Path) -> None:
        """Initialize it; the folder is created with the first program."""
        self._folder = folder

    async def keep(self, name: str, version: int, program: Program) -> Path:
        """Write a program; return its file.

        Raises:
            Unavailable: it cannot be written.
        """
        return await asyncio.to_thread(self._keep, name, version, program)

    def _keep(self, name: str, version: int, program: Program) -> Path:
        path = self._folder / f"{name}@{version}{program_file.SUFFIX}"
        try:
            private_files.make_folder(self._folder, [f"*{program_file.SUFFIX}", ".*"])
            program_file.save(program, path)
        except OSError as error:
            raise Unavailable(
                f"version {version} of model {name!r} was not loaded, because the server cannot write its program to disk:"
                f" {error.strerror or error}"
            ) from error
        return path

    def holds(self, path: Path) -> bool:
        """Whether a file is in this folder."""
        return path.parent == self._folder

    def load(self, path: Path) -> Program:
        """Read a stored program. Blocking.

        Raises:
            ModelError: it cannot be read.
        """
        try:
            return program_file.load(path, sys.maxsize, is_own=True)
        except program_file.ProgramFileError as error:
            raise ModelError(f"{path}: {error}") from error
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error

    async def drop_others(self, sources: Collection[str]) -> None:
        """Delete programs without a version, left by a server that stopped during a load."""
        await asyncio.to_thread(self._drop_others, sources)

    def _drop_others(self, sources: Collection[str]) -> None:
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if str(path) not in sources:
                    path.unlink(missing_ok=True)

    async def drop(self, path: Path) -> None:
        """Delete the stored program of a version that is no longer served; files elsewhere are left alone."""
        if self.holds(path):
            with contextlib.suppress(OSError):
                await asyncio.to_thread(path.unlink, missing_ok=True)
