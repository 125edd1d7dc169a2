"""Figures of a server that has no metrics."""

from __future__ import annotations

from stepwell_server.clock import SystemClock
from stepwell_server.metrics.figures import Figures
from stepwell_server.process.readiness import Readiness


def no_figures() -> Figures:
    """Figures that are all 0."""
    return Figures([], Readiness(), SystemClock())
