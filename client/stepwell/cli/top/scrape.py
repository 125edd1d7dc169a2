"""What a server answers to a scrape, as numbers by name and labels."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_MOST_BYTES = 16 << 20


class Sample(NamedTuple):
    """One value of a metric."""

    labels: Mapping[str, str]
    value: float


class Scrape:
    """What was answered at a moment."""

    def __init__(self, text: str, when: float) -> None:
        self.when = when
        """On this machine's monotonic clock, in seconds."""
        self._samples: dict[str, list[Sample]] = {}
        for found in filter(None, map(_SAMPLE.match, text.splitlines())):
            labels = dict(_LABEL.findall(found[2] or ""))
            self._samples.setdefault(found[1], []).append(Sample(labels, float(found[3])))

    def samples(self, name: str, **labels: str) -> list[Sample]:
        """Values of a metric whose labels have these values, among others."""
        wanted = labels.items()
        return [sample for sample in self._samples.get(name, ()) if wanted <= sample.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        """Their sum; 0 if there is none."""
        return sum(sample.value for sample in self.samples(name, **labels))

    def values(self, name: str, label: str) -> list[str]:
        """The values of a label of a metric, in their order."""
        return sorted({sample.labels[label] for sample in self.samples(name) if label in sample.labels})


def scrape(url: str, token: str | None, timeout_s: float) -> Scrape:
    """Ask a server.

    Raises:
        Failure: it does not answer, or not with metrics.
    """
    request = urllib.request.Request(url)  # noqa: S310 - the option takes http and https only
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            text = answer.read(_MOST_BYTES).decode(errors="replace")
    except urllib.error.HTTPError as error:
        hint = "; --metrics-token-file has the token" if error.code in {401, 403} else ""
        raise Failure(
            f"the metrics at {url} (--metrics) are refused: {error.code} {error.reason}{hint}", SERVER_ERROR
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Failure(f"the metrics at {url} (--metrics) cannot be read: {reason}", SERVER_ERROR) from None
    found = Scrape(text, time.monotonic())
    if not found.samples("stepwell_build_info"):
        raise Failure(
            f"what answers at {url} (--metrics) must be a Stepwell server's metrics; it has no stepwell_build_info",
            SERVER_ERROR,
        )
    return found
