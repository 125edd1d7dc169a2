"""The kinds of stores that tests of the engine run on, by what a kind can do.

`memory` keeps sessions while the server runs. `async` and `sync` are on disk, for one server at a time. `awaited` is the
fake of a store that several servers share, and `valkey` is that store on a real `valkey-server`.
"""

from __future__ import annotations

import pytest

ON_DISK = pytest.mark.stores("async", "sync")
SHARED = pytest.mark.stores("awaited", "valkey")
"""Two servers can use it."""
LASTING = pytest.mark.stores("async", "sync", "awaited", "valkey")
"""Sessions are there when the server is killed and another one starts."""
IN_PROCESS = pytest.mark.stores("memory", "async", "sync", "awaited")
"""No network takes time of its own."""
