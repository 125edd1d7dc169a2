"""``python -m stepwell_server`` is ``stepwell serve``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from stepwell.cli import main as stepwell


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Serve until told to stop, and exit.

    Args:
        arguments: those of the process if None.
    """
    stepwell(["serve", *(sys.argv[1:] if arguments is None else arguments)], prog_name="stepwell")
    raise AssertionError("click has exited")


if __name__ == "__main__":
    main()
