"""Prometheus metrics: `observer` counts, `gauges` says how things are at the moment of a scrape, `server` answers it.

There is no global registry, and prometheus_client is imported only if metrics are served.
"""
