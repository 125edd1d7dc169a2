"""The files of models: named by calls, uploaded, or stored as programs."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

from stepwell_server.catalog.files import paths
from stepwell_server.catalog.files.program_store import ProgramStore
from stepwell_server.catalog.files.uploads import Upload, Uploads
from stepwell_server.errors import UploadOff
from stepwell_server.program import Program


class ModelFiles:
    """The catalog's access to files. Used on the event loop; threads use the disk."""

    def __init__(
        self, root: Path | None = None, uploads: Uploads | None = None, kept: ProgramStore | None = None
    ) -> None:
        """Initialize it.

        Args:
            root: `--models`, where the paths of calls must be; None: anywhere.
            uploads: receives files; None: uploads are refused.
            kept: stores programs of files that will be gone; None: they do not outlive the server.
        """
        self._root = root
        self._uploads = uploads
        self._kept = kept

    async def named(self, path: str, *, is_found: bool) -> Path:
        """Return the resolved path of a file. With `is_found`, the server itself found it and it may be anywhere.

        Raises:
            InvalidInput: it does not exist or may not be loaded.
        """
        return await asyncio.to_thread(paths.checked, path, None if is_found else self._root)

    def sent(self, token: str, tenant: str) -> Path:
        """Return the path of a tenant's upload, which can be loaded once.

        Raises:
            UploadOff: the server accepts no uploads.
            InvalidInput: there is no such upload.
        """
        return self._taken().take(token, tenant)

    async def begin_upload(self, filename: str, tenant: str) -> Upload:
        """Begin to receive a file: see `Catalog.begin_upload`."""
        return await self._taken().begin(filename, tenant)

    async def delete_upload(self, token: str) -> None:
        """Delete an upload."""
        if self._uploads is not None:
            await self._uploads.delete(token)

    async def keep(self, name: str, version: int, program: Program) -> str:
        """Store the program of a file that will be gone; return its path, empty if programs are not stored.

        Raises:
            Unavailable: it cannot be written.
        """
        return "" if self._kept is None else str(await self._kept.keep(name, version, program))

    async def drop(self, source: str) -> None:
        """Delete the stored program of a version; other files are left alone."""
        if self._kept is not None and source:
            await self._kept.drop(Path(source))

    async def drop_others(self, sources: Collection[str]) -> None:
        """Delete stored programs without a version, after a start."""
        if self._kept is not None:
            await self._kept.drop_others(sources)

    async def expire(self) -> None:
        """Delete uploads that have expired."""
        if self._uploads is not None:
            await self._uploads.expire()

    async def close(self) -> None:
        """Delete all uploads."""
        if self._uploads is not None:
            await self._uploads.close()

    def _taken(self) -> Uploads:
        if self._uploads is None:
            raise UploadOff(
                "the server accepts no uploads: start it with --allow-model-upload, or give the path of a "
                "file on its disk"
            )
        return self._uploads
