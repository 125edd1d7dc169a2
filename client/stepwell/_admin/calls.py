"""The methods of `Client` that list, close, export and import many sessions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
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
from stepwell._admin.session_list import Page, SessionList
from stepwell._base.tracebacks import end_here
from stepwell._core.driver import Driver
from stepwell.errors import StepwellError

T = TypeVar("T")

Progress = Callable[[int], Any]
"""Called from time to time with the number of sessions done so far."""


@end_here
class AdminCalls:
    """Lists, closes, exports and imports many sessions."""

    _driver: Driver

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
    ) -> SessionList:
        """Returns the live sessions, sorted by id, as a list that reads page after page when you use it.

        Iterating takes little memory and no long call, however many sessions there are. `len`, an index or `list`
        read the whole list once: see `SessionList`.

        Args:
            model: Only sessions of this model, or of this version of it: `NAME@VERSION` or `NAME:LABEL`.
            prefix: Only sessions whose ids start with this.
            idle_longer_s: Only sessions that nobody has changed, read or resumed for more than this many seconds.
            limit: How many sessions to return at most.
            timeout_s: Time limit of each page over all its attempts, in seconds; None: the client's.

        Raises:
            ModelNotFoundError: The server has no model of that name.
            InvalidInputError: An argument breaks a rule.

        Example:
            >>> session.id in [info.session_id for info in client.sessions(model="forecast")]
            True
            >>> client.sessions(prefix=session.id, limit=1)[0].session_id == session.id
            True
        """
        wanted = SessionFilter(model, prefix, idle_longer_s)
        request = self._admin.list_request(wanted, limit)

        def read(token: str) -> Page:
            return self._driver.run(self._admin.page(request, token, self._driver.core.deadline(timeout_s)))

        return SessionList(read(""), read, limit)

    def count_sessions(
        self,
        model: str | None = None,
        prefix: str | None = None,
        *,
        idle_longer_s: float | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Counts the sessions, or those that match the filters of `sessions`, without reading them.

        Example:
            >>> client.count_sessions(prefix="nobody-")
            0
        """
        wanted = SessionFilter(model, prefix, idle_longer_s)
        return self._driver.run(self._admin.count(wanted, self._driver.core.deadline(timeout_s)))

    def close_sessions(
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

        Ids in `session_ids` that no longer exist are skipped. With filters, a session must match both when the call
        begins and when the server reaches it. A session that is used in the meantime is not idle, and stays.

        Args:
            session_ids: The sessions to delete. None: those that match the filters.
            model: Only sessions of this model, or of this version of it: `NAME@VERSION` or `NAME:LABEL`.
            prefix: Only sessions whose ids start with this.
            idle_longer_s: Only sessions that nobody has changed, read or resumed for more than this many seconds.
            everything: Delete all sessions, without a filter.
            progress: Called with the number of sessions deleted so far.
            timeout_s: Time limit of each part over all its attempts, in seconds; None: the client's.

        Raises:
            InvalidInputError: There is no `session_ids`, filter or `everything`, or more than one of them.
            UnavailableError: The server did not delete all of them.

        Example:
            >>> group = client.open_sessions("forecast", 3)
            >>> client.close_sessions(group.ids)
            3
            >>> client.close_sessions(prefix="experiment-7-", idle_longer_s=3600)
            0
        """
        wanted = SessionFilter(model, prefix, idle_longer_s)
        closed = 0
        if session_ids is not None and not everything and wanted == SessionFilter():
            for some in self._admin.close_parts(session_ids):
                closed += self._driver.run(
                    self._driver.core.close_sessions(some, self._driver.core.deadline(timeout_s))
                )
                _report(progress, closed)
            return closed
        request = self._admin.close_request(wanted, everything=everything or session_ids is not None)
        while True:
            count, request.page_token = self._driver.run(
                self._admin.close_page(request, self._driver.core.deadline(timeout_s))
            )
            closed += count
            _report(progress, closed)
            if not request.page_token:
                return closed

    def export_sessions(
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

        The file holds each session's state, revision, position and creation time, and the answer to its last change,
        so that a retry after the move gets that answer. A session is written as of its last completed change. Nothing
        changes for it, and this does not count as use. The file replaces an old one of that name once it is complete.

        Args:
            path: Path of the file to write.
            session_ids: The sessions to export. None: those that match the filters, or all without filters.
            model: Only sessions of this model, or of this version of it: `NAME@VERSION` or `NAME:LABEL`.
            prefix: Only sessions whose ids start with this.
            idle_longer_s: Only sessions that nobody has changed, read or resumed for more than this many seconds.
            progress: Called with the number of sessions written so far.
            timeout_s: Time limit of each part over all its attempts, in seconds; None: the client's.

        Raises:
            InvalidInputError: There are both `session_ids` and filters.
            OSError: The file cannot be written; the error names the path.

        Example:
            >>> client.export_sessions("some.sessions", [session.id]).exported
            1
        """
        requests = self._admin.export_requests(session_ids, SessionFilter(model, prefix, idle_longer_s))
        done, failed = 0, dict[str, StepwellError]()
        with session_file.Writer(path) as writer:
            for request in requests:
                while True:
                    page = self._driver.run(
                        self._admin.export_page(request, self._driver.core.deadline(timeout_s))
                    )
                    writer.add(page.sessions)
                    failed.update(failures(page.errors))
                    done += len(page.sessions)
                    _report(progress, done)
                    if not page.next_page_token:
                        break
        return ExportReport(done, failed)

    def import_sessions(
        self,
        path: str | os.PathLike[str],
        *,
        existing: ExistingSession = "refuse",
        progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> ImportReport:
        """Creates sessions from a file that `export_sessions` wrote, here or on another server.

        Each session is imported separately, with its id, and continues where it was. The server must have a model
        with the same name and fingerprint. You can repeat an import safely.

        Args:
            path: Path of the file. The whole file is checked before the first session is sent.
            existing: What to do with a live session of the same id: "refuse" keeps it and reports a failure, "skip"
                keeps it, "replace" replaces it.
            progress: Called with the number of sessions sent so far.
            timeout_s: Time limit of each part over all its attempts, in seconds; None: the client's.

        Returns:
            How many sessions were imported, replaced or skipped, and the failures by id.

        Raises:
            InvalidInputError: The file is not an export, or is corrupt.
            OSError: The file cannot be read; the error names the path.

        Example:
            >>> exported = client.export_sessions("some.sessions", [session.id])
            >>> report = client.import_sessions("some.sessions")
            >>> report.imported, report.failures
            (1, {})
        """
        report, done = ImportReport(), 0
        for request in self._admin.import_requests(session_file.read(path), existing):
            report += self._driver.run(
                self._admin.import_some(request, self._driver.core.deadline(timeout_s))
            )
            done += len(request.sessions)
            _report(progress, done)
        return report


def _report(progress: Progress | None, done: int) -> None:
    if progress is not None:
        progress(done)
