"""What a sync client does for those who look after many sessions. Part of `Client`."""

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
"""Called with the number of sessions that are done, now and then."""


@end_here
class AdminCalls:
    """Lists, closing, export and import of many sessions."""

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
        """The live sessions, in the order of their ids: a list that is read as it is used.

        However many there are, to iterate over it takes little memory and no long call, for it asks for a page when it
        comes to it. `len`, an index or `list` read all of it once: see `SessionList`.

        Args:
            model: Only those of this model.
            prefix: Only those whose ids begin with this.
            idle_longer_s: Only those that nobody has changed, read or resumed for longer than this.
            limit: At most so many.
            timeout_s: Time limit of each page over all attempts; None: the client's.

        Raises:
            ModelNotFoundError: No model is served under that name.
            InvalidInputError: An argument breaks its rule.

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
        """How many sessions there are, or fit the filters, which are those of `sessions`; none is read.

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
        """Deletes many sessions and their states, some thousands at a time; returns how many.

        Those of `session_ids` that are not there are passed over. With filters, those of `sessions`, it deletes what
        fits when it begins, and still does when its turn comes: a session that is used meanwhile is not idle, and stays.

        Args:
            session_ids: The sessions. None: those that fit the filters.
            model: Only those of this model.
            prefix: Only those whose ids begin with this.
            idle_longer_s: Only those that nobody has changed, read or resumed for longer than this.
            everything: All sessions, without a filter.
            progress: Called with how many were deleted so far.
            timeout_s: Time limit of each part over all attempts; None: the client's.

        Raises:
            InvalidInputError: There is neither a session, a filter nor `everything`, or more than one of these.
            UnavailableError: The server did not delete all.

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
                _tell(progress, closed)
            return closed
        request = self._admin.close_request(wanted, everything=everything or session_ids is not None)
        while True:
            count, request.page_token = self._driver.run(
                self._admin.close_page(request, self._driver.core.deadline(timeout_s))
            )
            closed += count
            _tell(progress, closed)
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
        """Writes sessions with all that is kept of them to a file, for `import_sessions`.

        That is their state, revision, position and creation, and the answer to each one's last change, so that a retry
        after the move is answered with it. A session is written as of its last completed change; nothing changes for it,
        and it does not count as use. The file appears when all of it is there, in place of an old one of that name.

        Args:
            path: The file.
            session_ids: The sessions. None: those that fit the filters, all if there are none.
            model: Only those of this model.
            prefix: Only those whose ids begin with this.
            idle_longer_s: Only those that nobody has changed, read or resumed for longer than this.
            progress: Called with how many were written so far.
            timeout_s: Time limit of each part over all attempts; None: the client's.

        Raises:
            InvalidInputError: There are sessions and filters.
            OSError: The file cannot be written; names the path.

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
                    _tell(progress, done)
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
        """Makes sessions of a file that `export_sessions` wrote, here or on another server; returns what became of them.

        Each is made by itself, with its id, and continues where it was. Its model must be served under its name with the
        same fingerprint. To repeat an import does no harm.

        Args:
            path: The file. It is looked through to its end before the first session is sent.
            existing: What becomes of a session that is there when one of its id is imported: "refuse" leaves it and
                counts as a failure, "skip" leaves it, "replace" replaces it.
            progress: Called with how many were sent so far.
            timeout_s: Time limit of each part over all attempts; None: the client's.

        Raises:
            InvalidInputError: It is no such file, or it is not as it was written.
            OSError: It cannot be read; names the path.

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
            _tell(progress, done)
        return report


def _tell(progress: Progress | None, done: int) -> None:
    if progress is not None:
        progress(done)
