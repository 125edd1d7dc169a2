"""Lists of sessions that are read as they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from stepwell._state.display import Listing
from stepwell._state.infos import SessionInfo


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Some sessions of a list."""

    sessions: list[SessionInfo]
    token: str
    """Where the next page begins; empty: this is the last."""


class SessionList(Sequence[SessionInfo]):
    """Sessions of a server, read page by page as they are gone through. Made by `Client.sessions`.

    To iterate over it keeps nothing, however many sessions there are; to do so again asks the server again. What needs
    all of it (`len`, an index, `list`, a comparison) reads the rest once and keeps it: from then on it is as a list that
    does not change. Safe to use from many threads.

    Example:
        >>> found = client.sessions(model="forecast")
        >>> session.id in [info.session_id for info in found], len(found) == len(list(found))
        (True, True)
    """

    def __init__(self, first: Page, read: Callable[[str], Page], limit: int | None) -> None:
        self._shown = first
        self._first: Page | None = first
        """What the first who goes through the list begins with."""
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
        more = (
            "" if not self._shown.token or len(shown) == self._limit else ", more are read when they are used"
        )
        return f"<{type(self).__name__} of {len(shown)} sessions{more}>"
