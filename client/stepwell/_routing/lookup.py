"""Looks up names, for clients that treat each address of a name as a replica."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import socket
import threading
from collections.abc import Sequence
from typing import Any

from stepwell._base import addresses
from stepwell._transport.connecting import ConnectError


@dataclasses.dataclass(frozen=True, slots=True)
class Lookup:
    """Look up a name; the answer is the list of its addresses, HOST:PORT each."""

    host: str
    port: int


def look_up(ask: Lookup, limit_s: float) -> list[str]:
    """The addresses of a name, each once.

    Raises:
        ConnectError: There is none, or no answer came in time.
    """
    answers: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(_addresses(ask, socket.getaddrinfo(ask.host, ask.port, type=socket.SOCK_STREAM)))
        except OSError as error:
            answers.put(error)

    # the system's own time limit is many seconds long, and a lookup cannot be cancelled
    threading.Thread(target=work, name="stepwell-lookup", daemon=True).start()
    try:
        answer = answers.get(timeout=limit_s)
    except queue.Empty:
        raise _silent(ask, limit_s) from None
    if isinstance(answer, OSError):
        raise _failed(answer) from None
    return answer


async def look_up_async(ask: Lookup, limit_s: float) -> list[str]:
    """As `look_up`."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(limit_s):
            return _addresses(ask, await loop.getaddrinfo(ask.host, ask.port, type=socket.SOCK_STREAM))
    except TimeoutError:
        raise _silent(ask, limit_s) from None
    except OSError as error:
        raise _failed(error) from None


def _addresses(ask: Lookup, found: Sequence[tuple[Any, ...]]) -> list[str]:
    return list(dict.fromkeys(addresses.of_host(str(each[4][0]), ask.port) for each in found))


def _silent(ask: Lookup, limit_s: float) -> ConnectError:
    return ConnectError(
        f"its name cannot be resolved: no name server answered for {ask.host} within {limit_s:g} s"
    )


def _failed(error: OSError) -> ConnectError:
    what = f"its name cannot be resolved: {error.strerror or error}"
    if isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
        return ConnectError(what, patience=0, hint="is the name right?")
    return ConnectError(what)
