"""Traces with OpenTelemetry: `spans` creates them, `export` sends them. Imported only if tracing is configured."""
