"""Figures of a server that has no metrics."""

from __future__ import annotations

from collections.abc import Sequence

from stepwell_server.clock import SystemClock
from stepwell_server.metrics.figures import Figures
from stepwell_server.process.readiness import Readiness
from stepwell_server.process.replicas import Replica


def no_figures(replicas: Sequence[Replica] = ()) -> Figures:
    """Figures that are all 0, of one of these servers."""
    return Figures([], Readiness(), SystemClock(), lambda: replicas)
