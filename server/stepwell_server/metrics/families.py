"""Prometheus's families from plain numbers: the one module that makes them, so that prometheus_client is imported by a scrape alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )

    from stepwell_server.metrics.series import Series

    _Family = TypeVar("_Family", CounterMetricFamily, GaugeMetricFamily)

Labels = tuple[str, ...]
"""Names of labels, or values of them in the same order."""
Values = float | Mapping[Any, float]
"""One number without labels, or numbers by the value of the only label or the values of several."""


def gauge(name: str, text: str, values: Values, labels: Labels = ()) -> GaugeMetricFamily:
    """Numbers that rise and fall."""
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def counter(name: str, text: str, values: Values, labels: Labels = ()) -> CounterMetricFamily:
    """Numbers that only grow; `name` is without `_total`."""
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def histogram(name: str, text: str, values: Mapping[Any, Series], labels: Labels) -> HistogramMetricFamily:
    """Counts of values up to each of some bounds, and their sums, by the value of the only label or the values of several."""
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text, labels=labels)
    for key, series in values.items():
        family.add_metric(_labels(key), list(series.cumulative()), sum_value=series.total)
    return family


def info(
    name: str, text: str, facts: Mapping[Any, Mapping[str, str]], labels: Labels = ()
) -> InfoMetricFamily:
    """Texts as labels of a series that is always 1; `name` is without `_info`."""
    from prometheus_client.core import InfoMetricFamily

    family = InfoMetricFamily(name, text, labels=labels)
    for key, each in facts.items():
        family.add_metric(_labels(key), dict(each))
    return family


def _filled(family: _Family, values: Values) -> _Family:
    for key, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        family.add_metric(_labels(key), value)
    return family


def _labels(key: str | Labels) -> Labels:
    return (key,) if isinstance(key, str) else key
