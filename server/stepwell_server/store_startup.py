"""Opens the store given in the settings, or reports why the server cannot start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from stepwell_server.errors import ServerError, StartError
from stepwell_server.logs import Log
from stepwell_server.store.base import KeyFileError, Store, StoreBusy, StoreError, WriteObserver
from stepwell_server.store.factory import open_shared_store, open_store

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.settings import Settings

_log = Log("app")
WAIT_S = 30.0
"""How long the start waits for a shared store that does not answer, in seconds."""
_PAUSE_S = 0.5
_Found = TypeVar("_Found")


class Abandoned(Exception):
    """The server was stopped before it was ready."""


def open_own(settings: Settings, clock: Clock, observer: WriteObserver) -> Store | None:
    """Open a store that only this server uses; `observer` is notified of its writes to the disk. None if it is shared.

    Raises:
        StartError: it cannot be opened.
    """
    if settings.store == "disk" or settings.store == "memory":
        kind = settings.store
    else:
        return None
    try:
        store = open_store(
            kind,
            data_dir=settings.data_dir,
            durability=settings.durability,
            clock=clock,
            observer=observer,
            key_file=settings.encryption_key_file,
        )
    except StoreBusy as error:
        raise StartError(
            f"--data-dir: {error}; give this server another folder, or --store memory"
        ) from error
    except KeyFileError as error:
        raise StartError(f"--encryption-key-file: {error}") from error
    except StoreError as error:
        raise StartError(f"--data-dir: {error}") from error
    return store


async def open_shared(settings: Settings, clock: Clock, stop: asyncio.Event) -> Store:
    """Open a shared store, waiting for it if it does not answer.

    Raises:
        StartError: it cannot be used, or did not answer in time.
        Abandoned: `stop` was set.
    """
    url = settings.shared_store
    assert url is not None, "the store is this server's own"

    def opening() -> Coroutine[Any, Any, Store]:
        return open_shared_store(
            url, durability=settings.durability, clock=clock, key_file=settings.encryption_key_file
        )

    try:
        return await once_it_answers(opening, settings, clock, stop)
    except KeyFileError as error:
        raise StartError(f"--encryption-key-file: {error}") from error
    except StoreError as error:
        raise StartError(f"--store: {error}") from error


async def once_it_answers(
    ask: Callable[[], Coroutine[Any, Any, _Found]], settings: Settings, clock: Clock, stop: asyncio.Event
) -> _Found:
    """Call the store at the start; calls of a shared store that does not answer are retried for a while.

    Raises:
        StartError: it did not answer in time.
        Abandoned: `stop` was set.
        Exception: any other error of `ask`.
    """
    end = clock.monotonic() + (0.0 if settings.shared_store is None else WAIT_S)
    is_logged = False
    while True:
        try:
            return await unless_stopped(ask(), stop)
        except ServerError as error:
            if settings.shared_store is None:
                raise StartError(f"--data-dir: {error.message}") from error
            if clock.monotonic() >= end:
                raise StartError(
                    f"--store: {error.message}; the server waited {WAIT_S:g} s for it"
                ) from error
            if not is_logged:
                where = str(settings.shared_store)
                _log.warning("the store does not answer yet", store=where, reason=error.message)
                is_logged = True
        await unless_stopped(asyncio.sleep(_PAUSE_S), stop)


async def unless_stopped(work: Coroutine[Any, Any, _Found], stop: asyncio.Event) -> _Found:
    """Await some work of the start, and cancel it when `stop` is set.

    Raises:
        Abandoned: `stop` was set.
    """
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Abandoned
    finally:
        for each in (task, stopped):
            each.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)
