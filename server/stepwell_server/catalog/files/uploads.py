"""Files that admins send: taken into a folder of the server's own, loaded by a name that cannot be guessed, and deleted.

They are gone when they were loaded, an hour after they came, and when the server ends or begins. Lives on the event loop;
disks are written by threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from stepwell_server.catalog.files.folder import SUFFIXES
from stepwell_server.clock import Clock
from stepwell_server.errors import InvalidInput, MessageTooLarge, Overloaded, Unavailable
from stepwell_server.files import private_files
from stepwell_server.logs import Log

LIFETIME_S = 3600.0
"""An upload that is not loaded is deleted after this time, in seconds."""
MAX_UPLOADS = 8
"""Uploads at a time, those among them that are being received."""
FOLDER = "uploads"
"""What the folder is called."""
_RETRY_INTERVAL_S = 5.0
_MAX_NAME_LENGTH = 100
_TOKEN = re.compile(r"u-[0-9a-f]{32}")
_log = Log("uploads")


@dataclasses.dataclass(frozen=True, slots=True)
class UploadResult:
    """A file that is there."""

    token: str
    """Its name in a load."""
    sha256: str


class Uploads:
    """The files. `close` deletes them all."""

    def __init__(self, folder: Path, max_bytes: int, clock: Clock, *, is_temporary: bool = False) -> None:
        """Make the folder, or empty it: uploads of an earlier server have no names any more.

        Args:
            folder: for uploads alone.
            max_bytes: bytes of a file at most.
            clock: says when one has been there for too long.
            is_temporary: `close` deletes the folder, too.

        Raises:
            OSError: it cannot be made, or others can use it.
        """
        private_files.make_folder(folder, ["u-*"])
        self._folder = folder
        self._max_bytes = max_bytes
        self._clock = clock
        self._is_temporary = is_temporary
        self._files: dict[str, Upload] = {}
        for entry in os.scandir(folder):
            if _TOKEN.fullmatch(entry.name):
                shutil.rmtree(entry.path, ignore_errors=True)

    async def begin(self, filename: str, tenant: str) -> Upload:
        """Begin to take a file: see `Catalog.begin_upload`."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", os.path.basename(filename))[-_MAX_NAME_LENGTH:]
        if not name.endswith(SUFFIXES) or name in SUFFIXES:
            raise InvalidInput(
                f"filename must be that of a model, ending in {' or '.join(SUFFIXES)}; got {filename[:300]!r}"
            )
        await self.expire()
        if len(self._files) >= MAX_UPLOADS:
            raise Overloaded(
                f"uploads that are not loaded must be at most {MAX_UPLOADS}; there are {len(self._files)}",
                retry_after_s=_RETRY_INTERVAL_S,
            )
        token = f"u-{secrets.token_hex(16)}"
        file = self._files[token] = Upload(self, token, self._folder / token / name, tenant, self._max_bytes)
        try:
            await asyncio.to_thread(file.open)
        except BaseException:
            await self.delete(token)
            raise
        return file

    def take(self, token: str, tenant: str) -> Path:
        """A file that is whole, to be loaded; `delete` it afterwards.

        Raises:
            InvalidInput: there is none of that name that the tenant has sent.
        """
        file = self._files.get(token)
        if file is None or file.tenant != tenant or not file.is_whole or file.is_taken:
            raise InvalidInput(
                "upload must be what UploadModel has returned, not longer ago than an hour and not loaded since;"
                f" got {token[:80]!r}"
            )
        file.is_taken = True
        return file.path

    async def delete(self, token: str) -> None:
        """Forget a file, whatever has come of it."""
        file = self._files.pop(token, None)
        if file is not None:
            await asyncio.to_thread(file.remove)

    async def expire(self) -> None:
        """Delete what has been there for too long."""
        now = self._clock.monotonic()
        for token, file in list(self._files.items()):
            if now - file.came >= LIFETIME_S and not file.is_taken:
                _log.info("an upload was not loaded, and is deleted", upload=token, file=file.path.name)
                await self.delete(token)

    async def close(self) -> None:
        """Delete all."""
        for token in list(self._files):
            await self.delete(token)
        if self._is_temporary:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    @property
    def now(self) -> float:
        """On the clock's monotonic time."""
        return self._clock.monotonic()


class Upload:
    """A file that is being received. Ends by one of `finish` and `abort`. Lives on the event loop."""

    def __init__(self, uploads: Uploads, token: str, path: Path, tenant: str, max_bytes: int) -> None:
        self._uploads = uploads
        self._token = token
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._size = 0
        self._descriptor = -1
        self._writing = threading.Lock()
        """Held while the descriptor is used: the thread of a cancelled call continues to write."""
        self.path = path
        self.tenant = tenant
        self.came = uploads.now
        self.is_whole = False
        self.is_taken = False
        """It is being loaded."""

    def open(self) -> None:
        """Make it. On a thread."""
        with _unavailable():
            os.mkdir(self.path.parent, private_files.FOLDER_MODE)
            self._descriptor = private_files.create(self.path)

    def remove(self) -> None:
        """Close and delete it. On a thread."""
        self._close()
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def _close(self) -> None:
        with self._writing:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)

    async def write(self, content: bytes) -> None:
        """Take the next bytes.

        Raises:
            MessageTooLarge: the file is larger than a model may be.
            Unavailable: the disk does not take them.
        """
        self._require_there()
        self._size += len(content)
        if self._size > self._max_bytes:
            raise MessageTooLarge(
                f"content must be at most {self._max_bytes} bytes in all (--max-model-bytes); at least {self._size} came"
            )
        await asyncio.to_thread(self._write, content)

    def _write(self, content: bytes) -> None:
        with self._writing, _unavailable():
            self._require_there()
            self._digest.update(content)
            view = memoryview(content)
            while view:
                view = view[os.write(self._descriptor, view) :]

    async def finish(self) -> UploadResult:
        """It is whole.

        Raises:
            InvalidInput: it is empty.
            Unavailable: the disk does not take it.
        """
        self._require_there()
        if not self._size:
            raise InvalidInput("content must be the bytes of a file; got none")
        await asyncio.to_thread(self._close)
        self.is_whole = True
        return UploadResult(self._token, self._digest.hexdigest())

    async def abort(self) -> None:
        """Forget what has come."""
        await self._uploads.delete(self._token)

    def _require_there(self) -> None:
        if self._descriptor < 0:
            raise Unavailable("the upload has taken longer than an hour, and was deleted")


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"the server's disk did not take the upload: {error.strerror}; nothing is kept of it"
        ) from error
