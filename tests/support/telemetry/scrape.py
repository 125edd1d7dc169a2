"""A scrape of metrics: its values, whether its names keep to Prometheus's rules. `promql` asks it what is there."""

from __future__ import annotations

import functools
import re
import urllib.request
from collections.abc import Iterator, Mapping

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

_TIMEOUT_S = 100.0
_TYPE = re.compile(r"^# TYPE (\S+) (\S+)$", re.MULTILINE)
_HELP = re.compile(r"^# HELP (\S+) (\S.*)$", re.MULTILINE)
#: Units that Prometheus's own linter (`promtool check metrics`) wants written out, or another base unit for.
_BAD_UNITS = {"s", "ms", "us", "ns", "milliseconds", "microseconds", "minutes", "hours", "days", "percent"}
_BAD_UNITS |= {"kb", "mb", "gb", "kilobytes", "megabytes", "gigabytes", "bits"}
_TYPES = {"counter", "gauge", "histogram", "summary"}


def parsed(text: str) -> list[Sample]:
    """The samples in an answer to a scrape, or in some lines of one."""
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def samples_of(text: str, name: str) -> list[Sample]:
    """The samples of one name. An answer has hundreds of others: to parse all of them takes thirty milliseconds."""
    lines = re.findall(rf"^{re.escape(name)}[{{ ].*$", text, re.MULTILINE)
    return parsed("\n".join([*lines, ""]))


class Scrape:
    """The answer of a server to a scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._kinds = dict(_TYPE.findall(text))

    @functools.cached_property
    def _samples(self) -> list[Sample]:
        return parsed(self.text)

    @functools.cached_property
    def _values(self) -> dict[tuple[str, frozenset[str]], float]:
        return {(each.name, frozenset(each.labels.values())): each.value for each in self._samples}

    @classmethod
    def of(cls, address: str) -> Scrape:
        """Scrape a server."""
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as response:
            return cls(response.read().decode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scrape) and self._values == pytest.approx(other._values)

    __hash__ = None  # type: ignore[assignment]

    def value(self, name: str, *labels: str) -> float:
        """A value by name and label values, in any order."""
        for sample in samples_of(self.text, name):
            if frozenset(sample.labels.values()) == frozenset(labels):
                return sample.value
        raise KeyError((name, labels))

    def series(self, name: str) -> list[Mapping[str, str]]:
        """The labels of each series of a name."""
        return [sample.labels for sample in samples_of(self.text, name)]

    @property
    def size(self) -> int:
        """How many series there are."""
        return len(self._samples)

    def faults(self) -> list[str]:
        """Names that break Prometheus's rules, as `promtool check metrics` checks them."""
        texts = dict(_HELP.findall(self.text))
        return [
            f"{name}: {fault}"
            for name, kind in _TYPE.findall(self.text)
            for fault in _faults(name, kind, texts)
        ]

    def kind(self, name: str) -> str:
        """counter, gauge or histogram; "" of a name that is not there. A counter's is with `_total`, a histogram's bare."""
        kind: str = self._kinds.get(name, "")
        return kind


def _faults(name: str, kind: str, texts: Mapping[str, str]) -> Iterator[str]:
    words = name.split("_")
    if not texts.get(name):
        yield "there must be a help text"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        yield "the name must be in snake_case"
    if name.endswith("_total") is not (kind == "counter"):
        yield "counters, and nothing else, end in _total"
    if kind == "gauge" and words[-1] in {"count", "sum", "bucket"}:
        yield "only parts of histograms end in _count, _sum and _bucket"
    if _BAD_UNITS.intersection(words):
        yield "units must be base units, written out"
    if _TYPES.intersection(words):
        yield "the name must not say the type"
