"""The methods of `AsyncClient` that list, close, export and import many sessions."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from typing import Any, TypeVar

from stepwell._admin import session_file
from stepwell._admin.admin import (
    Admin,
    ExistingSession,
    ExportReport,
    ImportReport,
    SessionFilter,
    failures,
)
from stepwell._admin.calls import Progress, _report
from stepwell._admin.session_list import Page
from stepwell._base.tracebacks import end_here
from stepwell._base.unawaited import Unawaited
from stepwell._core.aio_driver import AsyncDriver
from stepwell._state.infos import SessionInfo
from stepwell.errors import StepwellError

T = TypeVar("T")


class AsyncSessionList(Unawaited):
    """Sessions of a server, returned by `AsyncClient.sessions`. Await it for a list of all of them.

    `async for` reads them page by page and keeps nothing in memory, however many there are.

    Example:
        >>> session.id in [info.session_id async for info in client.sessions(model="forecast")]
        True
        >>> session.id in [info.session_id for info in await client.sessions(model="forecast")]
        True
    """

    _call = "AsyncClient.sessions"
    _instead = "use `async for`"

    def __init__(self, read: Callable[[str], Awaitable[Page]], limit: int | None) -> None:
        self._read = read
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[SessionInfo]:
        left, token = self._limit, ""
        while True:
            page = await self._read(token)
            for info in page.sessions[:left]:
                yield info
            left = None if left is None else max(0, left - len(page.sessions))
            token = page.token
            if not token or left == 0:
                return

    def __await__(self) -> Generator[Any, None, list[SessionInfo]]:
        return self._whole().__await__()

    async def _whole(self) -> list[SessionInfo]:
        return [info async for info in self]


@end_here
class AsyncAdminCalls:
    """Lists, closes, exports and imports many sessions."""

    _driver: AsyncDriver

    @property
    def _admin(self) -> Admin:
        return Admin(self._driver.core)

    def sessions(
        self,
        model: str | None = None,
        prefix: str | None = None,
        *,
        idle_longer_s: float | None = None,
        limit: int | None = None,
        timeout_s: float | None = None,
    ) -> AsyncSessionList:
        """Returns the live sessions, sorted by id.

        Await the result for a list, or read it page by page with `async for`. Arguments and errors are those of
        `Client.sessions`.

        Example:
            >>> session.id in [info.session_id async for info in client.sessions(model="forecast")]
            True
        """
        wanted = SessionFilter(model, prefix, idle_longer_s)
        request = self._admin.list_request(wanted, limit)

        async def read(token: str) -> Page:
            return await self._driver.run(
                self._admin.page(request, token, self._driver.core.deadline(timeout_s))
            )

        return AsyncSessionList(read, limit)

    async def count_sessions(
        self,
        model: str | None = None,
        prefix: str | None = None,
        *,
        idle_longer_s: float | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Counts the sessions, or those that match the filters of `sessions`, without reading them.

        Arguments and errors are those of `Client.count_sessions`.

        Example:
            >>> await client.count_sessions(prefix="nobody-")
            0
        """
        wanted = SessionFilter(model, prefix, idle_longer_s)
        return await self._driver.run(self._admin.count(wanted, self._driver.core.deadline(timeout_s)))

    async def close_sessions(
        self,
        session_ids: Iterable[str] | None = None,
        *,
        model: str | None = None,
        prefix: str | None = None,
        idle_longer_s: float | None = None,
        everything: bool = False,
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Deletes many sessions and their states, some thousand at a time, and returns how many it deleted.

        Arguments and errors are those of `Client.close_sessions`.

        Example:
            >>> await client.close_sessions((await client.open_sessions("forecast", 3)).ids)
            3
        """
        wanted = SessionFilter(model, prefix, idle_longer_s)
        closed = 0
        if session_ids is not None and not everything and wanted == SessionFilter():
            for some in self._admin.close_parts(session_ids):
                closed += await self._driver.run(
                    self._driver.core.close_sessions(some, self._driver.core.deadline(timeout_s))
                )
                _report(progress, closed)
            return closed
        request = self._admin.close_request(wanted, everything=everything or session_ids is not None)
        while True:
            count, request.page_token = await self._driver.run(
                self._admin.close_page(request, self._driver.core.deadline(timeout_s))
            )
            closed += count
            _report(progress, closed)
            if not request.page_token:
                return closed

    async def export_sessions(
        self,
        path: str | os.PathLike[str],
        session_ids: Iterable[str] | None = None,
        *,
        model: str | None = None,
        prefix: str | None = None,
        idle_longer_s: float | None = None,
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> ExportReport:
        """Writes sessions to a file for `import_sessions`.

        Arguments, result and errors are those of `Client.export_sessions`.

        Example:
            >>> (await client.export_sessions("some.sessions", [session.id])).exported
            1
        """
        requests = self._admin.export_requests(session_ids, SessionFilter(model, prefix, idle_longer_s))
        done, failed = 0, dict[str, StepwellError]()
        with session_file.Writer(path) as writer:
            for request in requests:
                while True:
                    page = await self._driver.run(
                        self._admin.export_page(request, self._driver.core.deadline(timeout_s))
                    )
                    await asyncio.to_thread(writer.add, page.sessions)
                    failed.update(failures(page.errors))
                    done += len(page.sessions)
                    _report(progress, done)
                    if not page.next_page_token:
                        break
        return ExportReport(done, failed)

    async def import_sessions(
        self,
        path: str | os.PathLike[str],
        *,
        existing: ExistingSession = "refuse",
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> ImportReport:
        """Creates sessions from a file that `export_sessions` wrote, here or on another server.

        Arguments, result and errors are those of `Client.import_sessions`.

        Example:
            >>> exported = await client.export_sessions("some.sessions", [session.id])
            >>> report = await client.import_sessions("some.sessions")
            >>> report.imported, report.failures
            (1, {})
        """
        report, done = ImportReport(), 0
        requests = self._admin.import_requests(session_file.read(path), existing)
        while (request := await asyncio.to_thread(next, requests, None)) is not None:
            report += await self._driver.run(
                self._admin.import_some(request, self._driver.core.deadline(timeout_s))
            )
            done += len(request.sessions)
            _report(progress, done)
        return report
