"""How many files and connections the process may have open."""

from __future__ import annotations

import contextlib
import resource

#: More than anybody needs: where there is no limit, tables of that size are made by some.
_ENOUGH = 1 << 20
#: Kept for files, models and the store: not for connections.
RESERVE = 256


def raise_limit() -> int:
    """Let the process open as many files as the system allows it. Returns how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _ENOUGH if soft == resource.RLIM_INFINITY else soft
    with contextlib.suppress(OSError, ValueError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
