"""The SDK's logger, `stepwell`: connections, retries, reopened streams, background work.

Nothing is logged per step. INFO is for events that the caller also learns from a result or an error; WARNING for
events that nobody else reports.
"""

from __future__ import annotations

import logging

LOG = logging.getLogger("stepwell")
# Without a logging configuration, nothing is printed.
LOG.addHandler(logging.NullHandler())
