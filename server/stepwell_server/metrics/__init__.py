"""Prometheus metrics: `observer` counts events, `gauges` reads current values, `server` answers scrapes.

There is no global registry, and prometheus_client is imported only if metrics are scraped.
"""
