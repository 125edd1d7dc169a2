"""The limit of open files and connections of the process."""

from __future__ import annotations

import contextlib
import resource

#: Used where there is no limit. Some libraries allocate tables of the limit's size.
_ENOUGH = 1 << 20
#: Files reserved for models and the store, not for connections.
RESERVE = 256


def raise_limit() -> int:
    """Raise the process's limit of open files to the maximum that the system allows, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _ENOUGH if soft == resource.RLIM_INFINITY else soft
    with contextlib.suppress(OSError, ValueError):  # macOS allows less than its hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
