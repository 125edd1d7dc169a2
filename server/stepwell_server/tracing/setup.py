"""Starts tracing if it is configured. Only then is OpenTelemetry imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stepwell import _install
from stepwell_server.errors import StartError
from stepwell_server.logs import Log
from stepwell_server.rpc.server import SERVICES

if TYPE_CHECKING:
    from stepwell_server.clock import Clock
    from stepwell_server.tracing.spans import Tracing

_log = Log("tracing")
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_HOW = _install.advice(_install.OTEL)


def start(endpoint: str | None, share: float, clock: Clock) -> Tracing | None:
    """Return the tracing of a server; None: no collector is configured.

    Args:
        endpoint: URL of the collector. None: the one in OpenTelemetry's environment variables.
        share: Share of calls to trace, 0 to 1.
        clock: The time.

    Raises:
        StartError: `endpoint` is given, but OpenTelemetry is not installed.
    """
    found = endpoint or next((value for name in _ENDPOINTS if (value := os.environ.get(name))), None)
    if found is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from stepwell_server.tracing.export import exporter_to
        from stepwell_server.tracing.spans import Tracing
    except ImportError as error:
        if endpoint is not None:
            raise StartError(f"--trace-endpoint: needs OpenTelemetry: {_HOW} ({error})") from error
        _log.warning(f"tracing is off: OpenTelemetry is not installed; {_HOW}", endpoint=found)
        return None
    tracing = Tracing(exporter_to(endpoint), share, SERVICES, clock)
    _log.info("tracing", endpoint=found, sample=share)
    return tracing
