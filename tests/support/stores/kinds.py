"""The kinds of stores that tests of the engine run on, by what a kind can do.

`memory` keeps sessions while the server runs. `async` and `sync` are on disk, for one server at a time. `sync_python` is
`sync` with the log's writer in Python although the native one is installed. `fake_shared` is the
fake of a store that several servers share, and `valkey` is that store on a real `valkey-server`.
"""

from __future__ import annotations

import pytest

ON_DISK = pytest.mark.stores("async", "sync", "sync_python")
SHARED = pytest.mark.stores("fake_shared", "valkey")
"""Two servers can use it."""
DURABLE = pytest.mark.stores("async", "sync", "sync_python", "fake_shared", "valkey")
"""Sessions are there when the server is killed and another one starts."""
IN_PROCESS = pytest.mark.stores("memory", "async", "sync", "fake_shared")
"""No network takes time of its own."""
