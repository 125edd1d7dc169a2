"""PromQL expressions: what they name, and whether a scrape has it, with the type that it is used as."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import promql_parser

#: Of counters only: of anything else they say nothing.
_RATES = frozenset(["rate", "irate", "increase"])
#: In place of a function: a counter that is compared says whether something has happened at all.
_OPERAND = "operand"
#: Labels that Prometheus adds to each series by itself.
_OF_A_SCRAPE = frozenset(["job", "instance"])
#: Metrics that Prometheus makes.
_OF_PROMETHEUS = frozenset(["up"])
_PARTS = re.compile(r"_(bucket|sum|count)$")


class Series(Protocol):
    """A scrape."""

    def series(self, name: str) -> Sequence[Mapping[str, str]]:
        """The labels of each series of a name."""

    def kind(self, name: str) -> str:
        """counter, gauge, histogram or info; "" of a name that is not there."""


def missing(expression: str, scrape: Series, recorded: Mapping[str, str] | None = None) -> list[str]:
    """What an expression names or does that a scrape does not allow; `recorded` are rules it may name, by what they ask.

    Raises:
        ValueError: it is no PromQL.
    """
    recorded = recorded or {}
    tree = promql_parser.parse(expression)
    found = [fault for node, function in _nodes(tree) for fault in _faults(node, function, scrape, recorded)]
    if not _names(tree):
        found.append("no metric is named")
    known = labels(expression, scrape, recorded)
    return found + [f"no label {label}" for label in sorted(_grouped(tree) - known)]


def labels(expression: str, scrape: Series, recorded: Mapping[str, str] | None = None) -> set[str]:
    """Labels that what an expression names has."""
    names = _names(promql_parser.parse(expression))
    return {label for name in names for label in _labels_of(name, scrape, recorded or {})} | _OF_A_SCRAPE


def _names(tree: Any) -> list[str]:
    return [str(node.name) for node, _ in _nodes(tree) if isinstance(node, promql_parser.VectorSelector)]


def _nodes(tree: Any) -> Iterator[tuple[Any, str]]:
    """Each node, and the function that takes it, if one does so at once."""
    stack = [(tree, "")]
    while stack:
        node, function = stack.pop()
        yield node, function
        if isinstance(node, promql_parser.Call):
            stack += [(each, node.func.name) for each in node.args]
        elif isinstance(node, promql_parser.MatrixSelector):
            stack.append((node.vector_selector, function))
        else:
            stack += [(getattr(node, name), _OPERAND) for name in ("lhs", "rhs") if hasattr(node, name)]
            if hasattr(node, "expr"):
                stack.append((node.expr, ""))


def _faults(node: Any, function: str, scrape: Series, recorded: Mapping[str, str]) -> Iterator[str]:
    if isinstance(node, promql_parser.Call) and node.func.name == "histogram_quantile":
        yield from _quantile(node)
    if not isinstance(node, promql_parser.VectorSelector):
        return
    name = str(node.name)
    if name in recorded or name in _OF_PROMETHEUS:
        wrong = function in _RATES
    else:
        series = scrape.series(name)
        if not series:
            yield f"no series {name}"
        grows = scrape.kind(_PARTS.sub("", name)) in {"counter", "histogram"}
        wrong = not grows if function in _RATES else grows and function != _OPERAND
        for matcher in node.matchers.matchers:
            yield from _unmatched(name, matcher, series)
    if wrong:
        yield f"{name} is used as another type by {function or 'no function'}"


def _quantile(node: Any) -> Iterator[str]:
    names = _names(node.args[1])
    if any(not name.endswith("_bucket") for name in names):
        yield f"histogram_quantile of {names}, which are no buckets"
    if "le" not in _grouped(node.args[1]):
        yield "histogram_quantile without le"


def _unmatched(name: str, matcher: Any, series: Sequence[Mapping[str, str]]) -> Iterator[str]:
    if matcher.name in _OF_A_SCRAPE:
        return
    values = {labels[matcher.name] for labels in series if matcher.name in labels}
    if not values:
        yield f"{name} has no label {matcher.name}"
    elif matcher.op == promql_parser.MatchOp.Equal and matcher.value not in values:
        yield f"{name} has no {matcher.name}={matcher.value}"
    elif matcher.op == promql_parser.MatchOp.Re and matcher.value != ".*":
        unknown = set(matcher.value.split("|")) - values
        yield from (f"{name} has no {matcher.name}={value}" for value in sorted(unknown))


def _grouped(tree: Any) -> set[str]:
    """Labels to group by, or to match on."""
    found: set[str] = set()
    for node, _ in _nodes(tree):
        modifier = getattr(node, "modifier", None)
        if modifier is None:
            continue
        if isinstance(node, promql_parser.AggregateExpr):
            found.update(modifier.labels)
        else:
            found.update(modifier.group_labels or ())
            found.update(modifier.matching.labels if modifier.matching is not None else ())
    return found


def _labels_of(name: str, scrape: Series, recorded: Mapping[str, str]) -> set[str]:
    if name in recorded:
        return _grouped(promql_parser.parse(recorded[name]))
    return {label for labels in scrape.series(name) for label in labels}
