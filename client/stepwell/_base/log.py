"""The SDK's logger, `stepwell`: connections, retries, streams that are opened anew, what happens in the background.

Nothing is logged per step. Level INFO is for what a caller learns anyway, sooner or later, by a result or an error;
WARNING for what nobody else learns.
"""

from __future__ import annotations

import logging

LOG = logging.getLogger("stepwell")
# Where nobody has configured logging, nothing is printed.
LOG.addHandler(logging.NullHandler())
