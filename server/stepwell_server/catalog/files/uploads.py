"""Files that admins upload: stored in a private folder, loaded by a token that cannot be guessed, and then deleted.

They are deleted after being loaded, after an hour, and when the server stops or starts. Used on the event loop; threads
write to the disk.
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
"""The time after which an upload that is not loaded is deleted, in seconds."""
MAX_UPLOADS = 8
"""The maximum number of uploads, including those being received."""
FOLDER = "uploads"
"""The name of the folder."""
_RETRY_INTERVAL_S = 5.0
_MAX_NAME_LENGTH = 100
_TOKEN = re.compile(r"u-[0-9a-f]{32}")
_log = Log("uploads")


@dataclasses.dataclass(frozen=True, slots=True)
class UploadResult:
    """A complete upload."""

    token: str
    """Names the upload in a load."""
    sha256: str


class Uploads:
    """The uploads. `close` deletes all of them."""

    def __init__(self, folder: Path, max_bytes: int, clock: Clock, *, is_temporary: bool = False) -> None:
        """Create the folder or empty it: the tokens of an earlier server are no longer valid.

        Args:
            folder: only for uploads.
            max_bytes: the maximum size of a file.
            clock: for expiry.
            is_temporary: `close` deletes the folder too.

        Raises:
            OSError: it cannot be created, or others can access it.
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
        """Begin to receive a file: see `Catalog.begin_upload`."""
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
        """Return the path of a complete upload to load; call `delete` afterwards.

        Raises:
            InvalidInput: the tenant has no such upload.
        """
        file = self._files.get(token)
        if file is None or file.tenant != tenant or not file.is_whole or file.is_taken:
            raise InvalidInput(
                "upload must be a token that UploadModel returned less than an hour ago and that no load has used;"
                f" got {token[:80]!r}"
            )
        file.is_taken = True
        return file.path

    async def delete(self, token: str) -> None:
        """Delete an upload in any state."""
        file = self._files.pop(token, None)
        if file is not None:
            await asyncio.to_thread(file.remove)

    async def expire(self) -> None:
        """Delete uploads that have expired."""
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
        """The clock's monotonic time."""
        return self._clock.monotonic()


class Upload:
    """A file that is being received, until `finish` or `abort`. Used on the event loop."""

    def __init__(self, uploads: Uploads, token: str, path: Path, tenant: str, max_bytes: int) -> None:
        self._uploads = uploads
        self._token = token
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._size = 0
        self._descriptor = -1
        self._writing = threading.Lock()
        """Held while the descriptor is used, as the thread of a cancelled call continues to write."""
        self.path = path
        self.tenant = tenant
        self.came = uploads.now
        self.is_whole = False
        self.is_taken = False
        """It is being loaded."""

    def open(self) -> None:
        """Create the file. Runs on a thread."""
        with _unavailable():
            os.mkdir(self.path.parent, private_files.FOLDER_MODE)
            self._descriptor = private_files.create(self.path)

    def remove(self) -> None:
        """Close and delete it. Runs on a thread."""
        self._close()
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def _close(self) -> None:
        with self._writing:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor >= 0:
                os.close(descriptor)

    async def write(self, content: bytes) -> None:
        """Write the next bytes.

        Raises:
            MessageTooLarge: the file is too large.
            Unavailable: they cannot be written.
        """
        self._require_there()
        self._size += len(content)
        if self._size > self._max_bytes:
            raise MessageTooLarge(
                f"content must be at most {self._max_bytes} bytes in all (--max-model-bytes); got at least {self._size}"
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
        """Complete the file.

        Raises:
            InvalidInput: it is empty.
            Unavailable: it cannot be written.
        """
        self._require_there()
        if not self._size:
            raise InvalidInput("content must be the bytes of a file; got none")
        await asyncio.to_thread(self._close)
        self.is_whole = True
        return UploadResult(self._token, self._digest.hexdigest())

    async def abort(self) -> None:
        """Delete the incomplete file."""
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
            f"the server cannot write the upload to its disk: {error.strerror}; nothing is kept of it"
        ) from error
