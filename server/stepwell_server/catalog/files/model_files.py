"""The files of models that calls name, send, or leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from stepwell_server.catalog.files import paths
from stepwell_server.catalog.files.kept_programs import ProgramStore
from stepwell_server.catalog.files.uploads import Upload, Uploads
from stepwell_server.errors import UploadOff
from stepwell_server.program import Program


class ModelFiles:
    """What the catalog asks for files. Lives on the event loop; threads use the disk."""

    def __init__(
        self, root: Path | None = None, uploads: Uploads | None = None, kept: ProgramStore | None = None
    ) -> None:
        """Wire it.

        Args:
            root: `--models`: paths that calls name must lie in it; None: anywhere.
            uploads: takes files; None: none are taken.
            kept: keeps programs of files that will be gone; None: nothing outlives the server.
        """
        self._root = root
        self._uploads = uploads
        self._kept = kept

    async def named(self, path: str, *, is_found: bool) -> Path:
        """The real path of a file. With `is_found` the server has found it itself, and it may lie anywhere.

        Raises:
            InvalidInput: there is no such file, or it must not be loaded.
        """
        return await asyncio.to_thread(paths.checked, path, None if is_found else self._root)

    def sent(self, token: str, tenant: str) -> Path:
        """The path of a file that a tenant has sent, to be loaded once.

        Raises:
            UploadOff: The server takes none.
            InvalidInput: There is none of that name.
        """
        return self._taken().take(token, tenant)

    async def begin_upload(self, filename: str, tenant: str) -> Upload:
        """Begin to take a file: see `Catalog.begin_upload`."""
        return await self._taken().begin(filename, tenant)

    async def delete_upload(self, token: str) -> None:
        """Forget a file that was sent."""
        if self._uploads is not None:
            await self._uploads.delete(token)

    async def keep(self, name: str, version: int, program: Program) -> str:
        """Keep the program of a file that will be gone; return the path of what is kept, empty if nothing is.

        Raises:
            Unavailable: the disk does not take it.
        """
        return "" if self._kept is None else str(await self._kept.keep(name, version, program))

    async def drop(self, source: str) -> None:
        """Delete what was kept of a version; any other file stays."""
        if self._kept is not None and source:
            await self._kept.drop(Path(source))

    async def drop_others(self, sources: Collection[str]) -> None:
        """Delete what is kept of no version, after a start."""
        if self._kept is not None:
            await self._kept.drop_others(sources)

    async def expire(self) -> None:
        """Delete what was sent long ago, and not loaded."""
        if self._uploads is not None:
            await self._uploads.expire()

    async def close(self) -> None:
        """Delete what was sent."""
        if self._uploads is not None:
            await self._uploads.close()

    def _taken(self) -> Uploads:
        if self._uploads is None:
            raise UploadOff(
                "the server takes no files: it must be started with --allow-model-upload; or give the path of a "
                "file on its disk"
            )
        return self._uploads
