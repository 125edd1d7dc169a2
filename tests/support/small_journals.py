"""`python -m stepwell_server` with journals so small that changes are brought over into LMDB all the time.

    small_journals.py BYTES [arguments of the server]

`faults.SmallJournals` starts it.
"""

from __future__ import annotations

import sys

from stepwell_server.store.disk.store import DiskStore


def main() -> int:
    """Replace how large journals are unless someone says so, and serve."""
    journal_bytes, *arguments = sys.argv[1:]
    defaults = DiskStore.__init__.__kwdefaults__
    assert defaults is not None
    assert "journal_bytes" in defaults
    defaults["journal_bytes"] = int(journal_bytes)
    from stepwell_server.__main__ import main as serve

    return serve(arguments)


if __name__ == "__main__":
    sys.exit(main())
