"""Traces by OpenTelemetry: `spans` makes them, `export` sends them. Imported only where the server is told to trace."""
