"""Creates Prometheus's metric families. Only this module imports prometheus_client, and only for a scrape."""

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
"""Names of labels, or their values in the same order."""
Values = float | Mapping[Any, float]
"""One number without labels, or numbers by label value (one label) or by tuple of label values."""


def gauge(name: str, text: str, values: Values, labels: Labels = ()) -> GaugeMetricFamily:
    """Return a gauge, whose numbers rise and fall."""
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(name, text, labels=labels), values)


def counter(name: str, text: str, values: Values, labels: Labels = ()) -> CounterMetricFamily:
    """Return a counter, whose numbers only grow. `name` is without `_total`."""
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(name, text, labels=labels), values)


def histogram(name: str, text: str, values: Mapping[Any, Series], labels: Labels) -> HistogramMetricFamily:
    """Return a histogram of values, by label values."""
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text, labels=labels)
    for key, series in values.items():
        family.add_metric(_labels(key), list(series.cumulative()), sum_value=series.total)
    return family


def info(
    name: str, text: str, facts: Mapping[Any, Mapping[str, str]], labels: Labels = ()
) -> InfoMetricFamily:
    """Return texts as the labels of a series that is always 1. `name` is without `_info`."""
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
