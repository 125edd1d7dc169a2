"""`python -m stepwell_server` with other limits of its front, so that a test need not wait for those that a server has.

    low_limits.py {"receive_s": 0.5} [arguments of the server]

`attacked_server` starts it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import NoReturn

from stepwell_server.core.front_limits import FrontLimits


def main() -> NoReturn:
    """Replace the defaults, and serve."""
    limits, *arguments = sys.argv[1:]
    changed = json.loads(limits)
    fields = [field for field in dataclasses.fields(FrontLimits) if field.default is not dataclasses.MISSING]
    assert changed.keys() <= {field.name for field in fields}
    FrontLimits.__init__.__defaults__ = tuple(changed.get(field.name, field.default) for field in fields)
    from stepwell_server.__main__ import main as serve

    serve(arguments)


if __name__ == "__main__":
    main()
