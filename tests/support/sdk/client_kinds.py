"""Both clients behind one face, so that a test is written once and run for each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Self

import stepwell

SHELLS = ("sync", "sync without frames", "async", "async without frames")


class InThreads:
    """A sync client, session or group, whose calls run in a thread and are awaited."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value) or name == "record":  # makes no call
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            result = await asyncio.to_thread(value, *args, **kwargs)
            handle = isinstance(result, stepwell.Session | stepwell.SessionGroup)
            return InThreads(result) if handle else result

        return call

    def __len__(self) -> int:
        return len(self._target)

    def __getitem__(self, index: Any) -> InThreads:
        return InThreads(self._target[index])

    def __iter__(self) -> Iterator[InThreads]:
        return (InThreads(one) for one in self._target)

    async def __aenter__(self) -> Self:
        self._target.__enter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self._target.__exit__, *error)


def connect(shell: str, address: str, **kwargs: Any) -> Any:
    """A client of the shell asked for, to be used in `async with`."""
    coalesce = not shell.endswith("without frames")
    if shell.startswith("sync"):
        return InThreads(stepwell.connect(address, coalesce=coalesce, **kwargs))
    return stepwell.aio.connect(address, coalesce=coalesce, **kwargs)
