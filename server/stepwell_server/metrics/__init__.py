"""Prometheus metrics: `observer` counts, `gauges` describes the moment of a scrape, `server` answers it.

There is no global registry, and prometheus_client is imported only if metrics are scraped.
"""
