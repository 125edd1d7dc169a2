"""Where two builds answer differently, and which of these differences are wanted: those that `wanted.toml` lists."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from against.answers import Answer

WANTED = Path(__file__).with_name("wanted.toml")
MAX_SHOWN = 40
"""Differences that a report shows in full: the first ones of different kinds. The others are counted."""
MAX_LINE = 300
"""Characters of a kind's values that a report shows."""
_DETAILS = re.compile(r"""'[^']*'|"[^"]*"|\b[0-9a-f]{8,}\b|\d+""")
"""The details of a value: quoted words, bytes and numbers. Values that only differ in them are of one kind."""
_KEYS = {"call", "what", "base", "tree", "reason", "ends_program"}
ABSENT = "<absent>"


class WantedError(Exception):
    """The list of wanted differences breaks its rules."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A call, or a member of a frame, and its answer."""

    call: str
    request: str
    answer: Answer


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field of an answer that is not the same in both builds."""

    call: str
    what: str
    """The path of the field; `end` for status and reason together."""
    base: str
    tree: str


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A listed difference: each pattern must match the whole of what it is about."""

    call: re.Pattern[str]
    what: re.Pattern[str]
    base: re.Pattern[str]
    tree: re.Pattern[str]
    reason: str
    ends_program: bool = False
    """The sessions of the two servers are not the same afterwards: the rest of a program is not compared."""

    def covers(self, difference: Difference) -> bool:
        pairs = (
            (self.call, difference.call),
            (self.what, difference.what),
            (self.base, difference.base),
            (self.tree, difference.tree),
        )
        return all(pattern.fullmatch(text) for pattern, text in pairs)


def wanted(path: Path = WANTED) -> list[Wanted]:
    """The list.

    Raises:
        WantedError: an entry has other keys, or no reason, or what is no pattern.
    """
    entries = tomllib.loads(path.read_text()).get("difference", [])
    found = []
    for number, entry in enumerate(entries, 1):
        if not set(entry) <= _KEYS or not str(entry.get("reason", "")).strip():
            raise WantedError(
                f"{path.name}, difference {number}: has the keys {', '.join(sorted(_KEYS))}, and a reason;"
                f" got {sorted(entry)}"
            )
        try:
            call, what, base, tree = (
                re.compile(entry.get(key, ".*"), re.DOTALL) for key in ("call", "what", "base", "tree")
            )
        except re.error as error:
            raise WantedError(f"{path.name}, difference {number}: {error}") from error
        found.append(Wanted(call, what, base, tree, entry["reason"], entry.get("ends_program", False)))
    return found


def between(call: str, base: Answer, tree: Answer) -> list[Difference]:
    """Each field that differs.

    Status and reason are one. Where they differ, the text and the facts of the error do as well, and say nothing more.
    """
    if base.fields == tree.fields:
        return []
    if base.end != tree.end:
        return [Difference(call, "end", base.end, tree.end)]
    found = []
    for path in dict.fromkeys([*base.fields, *tree.fields]):
        one, two = base.fields.get(path, ABSENT), tree.fields.get(path, ABSENT)
        if one != two:
            found.append(Difference(call, path, one, two))
    return found


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a difference was found: enough to find it again."""

    server: str
    """Front and store."""
    program: str
    step: int


@dataclasses.dataclass
class Report:
    """What a comparison has found; its lines are the same for the same seed."""

    listed: Sequence[Wanted]
    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    """Answers that were compared, by server."""
    ends: Counter[str] = dataclasses.field(default_factory=Counter)
    """Of the base, by call and end."""
    found: Counter[int] = dataclasses.field(default_factory=Counter)
    """Wanted differences, by their place in the list."""
    ended: int = 0
    """Programs that were not compared to their ends because of a wanted difference."""
    unwanted: int = 0
    kinds: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    """Unwanted differences by their kinds: how often each call has it."""
    shown: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    """What went wrong beside answers: a server that ended, or logged a defect."""

    @property
    def is_good(self) -> bool:
        return not self.unwanted and not self.notes

    def compare(self, place: Place, base: Exchange, tree: Exchange) -> bool:
        """Take note of the differences between two exchanges.

        Returns whether the program may go on: all of them are wanted, and the sessions are the same afterwards.
        """
        self.calls[place.server] += 1
        self.ends[f"{base.call} {base.answer.end}"] += 1
        if base.call != tree.call or base.request != tree.request:
            differences = [Difference(base.call, "request", base.request, tree.request)]
        else:
            differences = between(base.call, base.answer, tree.answer)
        entries = [self._entry(one) for one in differences]
        left = [one for one, entry in zip(differences, entries, strict=True) if entry is None]
        if left:
            self.unwanted += 1
            kinds = dict.fromkeys(map(_kind, left))
            if len(self.shown) < MAX_SHOWN and not self.kinds.keys() >= kinds.keys():
                self.shown.append("\n".join(_shown(place, base, tree, left)))
            for kind in kinds:
                self.kinds.setdefault(kind, Counter())[base.call] += 1
            return False
        if any(entry is not None and entry.ends_program for entry in entries):
            self.ended += 1
            return False
        return True

    def _entry(self, difference: Difference) -> Wanted | None:
        """The entry of the list that covers a difference."""
        for number, entry in enumerate(self.listed):
            if entry.covers(difference):
                self.found[number] += 1
                return entry
        return None

    def lines(self) -> Iterator[str]:
        """The report."""
        yield f"answers compared: {sum(self.calls.values()):,}"
        yield from (f"  {server}: {count:,}" for server, count in sorted(self.calls.items()))
        yield "how the calls of the base ended:"
        yield from (f"  {end}: {count:,}" for end, count in sorted(self.ends.items()))
        yield f"wanted differences: {sum(self.found.values()):,}"
        for number, entry in enumerate(self.listed):
            yield f"  {self.found[number]:,}: {entry.reason}"
        if self.ended:
            yield f"programs that such a difference has ended: {self.ended:,}"
        yield from (f"WRONG: {note}" for note in self.notes)
        yield f"unwanted differences: {self.unwanted:,} calls"
        for kind, calls in sorted(self.kinds.items(), key=lambda item: (-item[1].total(), item[0])):
            yield f"  {calls.total():,}: {kind}"
            yield "    " + ", ".join(f"{call}: {count:,}" for call, count in calls.most_common())
        yield from self.shown
        if self.unwanted > len(self.shown):
            yield f"... and {self.unwanted - len(self.shown):,} calls more"


def _kind(difference: Difference) -> str:
    """What the field is and how it differs, without details: enough to write an entry of the list."""
    base, tree = (_DETAILS.sub("#", value)[:MAX_LINE] for value in (difference.base, difference.tree))
    return f"{_DETAILS.sub('#', difference.what)}: {base} in the base, {tree} in the tree"


def _shown(place: Place, base: Exchange, tree: Exchange, differences: Sequence[Difference]) -> Iterator[str]:
    yield ""
    yield f"DIFFERENCE {place.server}, {place.program}, step {place.step}: {base.call}"
    yield f"  request: {base.request}"
    if tree.request != base.request:
        yield f"  request to the tree: {tree.request}"
    for one in differences:
        yield f"  {one.what}: base {one.base}"
        yield f"  {' ' * len(one.what)}  tree {one.tree}"
    for name, exchange in (("base", base), ("tree", tree)):
        yield f"  the answer of the {name}:"
        yield from (f"    {line}" for line in exchange.answer.lines())
