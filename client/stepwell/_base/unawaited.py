"""The result of an async call that has not been awaited yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn


class Unawaited:
    """The result of a call that must be awaited. Any other use of it raises an error that explains this."""

    _call = "the call"
    """Name of the public method, such as "AsyncClient.open_session"."""
    _instead = "use `async with`"

    if not TYPE_CHECKING:  # type checkers know already what it lacks

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"{self._call}(...) {self._rule()}; got .{name}", name=name, obj=self)

        def __getitem__(self, key: object) -> NoReturn:
            raise TypeError(f"{self._call}(...) {self._rule()}; got [{key!r:.40}]")

        def __enter__(self) -> NoReturn:
            raise TypeError(f"{self._call}(...) {self._rule()}; got `with`")

        def __exit__(self, *error: object) -> None:
            pass

    def _rule(self) -> str:
        return f"is not awaited yet: await it first, or {self._instead}"
