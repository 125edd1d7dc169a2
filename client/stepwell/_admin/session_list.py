"""Lists of sessions that read page after page as you iterate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from stepwell._state.display import Listing
from stepwell._state.infos import SessionInfo


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """One page of a list of sessions."""

    sessions: list[SessionInfo]
    token: str
    """Token of the next page; empty on the last page."""


class SessionList(Sequence[SessionInfo]):
    """Sessions of a server, returned by `Client.sessions` and read page by page.

    Iterating keeps nothing in memory, however many sessions there are, and iterating again asks the server again.
    `len`, an index, `list` or a comparison read the rest once and keep it: from then on the list does not change.
    Safe to use from many threads.

    Example:
        >>> found = client.sessions(model="forecast")
        >>> session.id in [info.session_id for info in found], len(found) == len(list(found))
        (True, True)
    """

    def __init__(self, first: Page, read: Callable[[str], Page], limit: int | None) -> None:
        self._shown = first
        self._first: Page | None = first
        """The page with which the first iteration starts."""
        self._read = read
        self._limit = limit
        self._all: list[SessionInfo] | None = None

    def __iter__(self) -> Iterator[SessionInfo]:
        if self._all is not None:
            return iter(self._all)
        return self._pages()

    def _pages(self) -> Iterator[SessionInfo]:
        page, self._first = self._first or self._read(""), None
        left = self._limit
        while True:
            yield from page.sessions[:left]
            left = None if left is None else max(0, left - len(page.sessions))
            if not page.token or left == 0:
                return
            page = self._read(page.token)

    def _whole(self) -> list[SessionInfo]:
        if self._all is None:
            self._all = list(self._pages())
        return self._all

    def __len__(self) -> int:
        return len(self._whole())

    def __bool__(self) -> bool:
        return bool(self._shown.sessions) or next(iter(self), None) is not None

    @overload
    def __getitem__(self, index: int) -> SessionInfo: ...

    @overload
    def __getitem__(self, index: slice) -> list[SessionInfo]: ...

    def __getitem__(self, index: int | slice) -> SessionInfo | list[SessionInfo]:
        return self._whole()[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | SessionList):
            return NotImplemented
        return self._whole() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _repr_html_(self) -> str:
        return Listing(self._all or self._shown.sessions[: self._limit])._repr_html_()

    def __repr__(self) -> str:
        if self._all is not None:
            return repr(self._all)
        shown = self._shown.sessions[: self._limit]
        more = "" if not self._shown.token or len(shown) == self._limit else ", more are read as you iterate"
        return f"<{type(self).__name__} of {len(shown)} sessions{more}>"
