"""``python -m stepwell_server``, and what ``stepwell serve`` calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from stepwell_server.settings import SettingsError, read_settings


def main(argv: Sequence[str] | None = None, prog: str = "python -m stepwell_server") -> int:
    """Serve until told to stop.

    Args:
        argv: the arguments; those of the process if None.
        prog: how the program is called, for its help.

    Returns:
        The exit code: 0 after a stop by signal, 2 if the server could not be started, 1 after a defect.
    """
    try:
        settings = read_settings(sys.argv[1:] if argv is None else argv, os.environ, prog)
    except SettingsError as error:
        sys.stderr.write(f"stepwell: {error}\n")
        return 2
    except SystemExit as exit_:  # argparse has printed the help or the version
        return exit_.code if isinstance(exit_.code, int) else 0
    # gRPC would write lines of its own into the log, one for each handshake of TLS that fails
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from stepwell_server.app import serve

    return serve(settings)


if __name__ == "__main__":
    sys.exit(main())
