"""`python -m stepwell_server` with segments so small that checkpoints are made all the time.

    small_segments.py BYTES [arguments of the server]

`fault_servers.SmallSegments` starts it.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from stepwell_server.store.disk.store import DiskStore


def main() -> NoReturn:
    """Set the size of segments unless an argument does, and serve."""
    segment_bytes, *arguments = sys.argv[1:]
    defaults = DiskStore.__init__.__kwdefaults__
    assert defaults is not None
    assert "segment_bytes" in defaults
    defaults["segment_bytes"] = int(segment_bytes)
    from stepwell_server.__main__ import main as serve

    serve(arguments)


if __name__ == "__main__":
    main()
