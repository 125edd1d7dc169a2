"""Whether the server can answer calls, and if not, why: one truth for gRPC health, HTTP probes and systemd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """How the server is at a moment."""

    problems: Mapping[str, str]
    """Why it is not ready, by what it is about: `models`, `store`, `stopping`. Empty: it is."""
    warnings: Mapping[str, str]
    """What does not keep it from being ready: `disk`, `store`, ..."""
    versions: Mapping[str, Mapping[int, str]]
    """Of each model's versions how far they are: waiting, loading (with the stage), loaded, failed (with the reason)."""
    elsewhere: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Models whose default version is not loaded here, but maybe on others of the servers that share the store: which it is."""

    @property
    def is_ready(self) -> bool:
        """Calls can be answered."""
        return not self.problems

    @property
    def models(self) -> dict[str, str]:
        """How far each model is: as far as that of its versions which is farthest."""
        return {
            name: min(versions.values(), key=lambda how: _ORDER.index(how.partition(":")[0]))
            for name, versions in self.versions.items()
        }

    def is_loaded(self, name: str, version: int | None = None) -> bool:
        """Whether a version of a model is loaded; of the model alone, whether what it stands for is."""
        if version is None and name in self.elsewhere:
            return False
        versions = self.versions.get(name, {})
        return LOADED in versions.values() if version is None else versions.get(version) == LOADED


LOADED = "loaded"
_ORDER = (LOADED, "loading", "waiting", "failed")


class Readiness:
    """How the server is. Changed on the event loop; `report` may be read by any thread at any time."""

    def __init__(self) -> None:
        self.report = Report({"models": "the models are being loaded"}, {}, {})
        self._listeners: list[Callable[[Report], None]] = []

    def listen(self, listener: Callable[[Report], None]) -> None:
        """Have it called on the event loop, now and with each change."""
        self._listeners.append(listener)
        listener(self.report)

    def problem(self, about: str, reason: str) -> None:
        """The server is not ready for this reason; an empty one: not for it any more."""
        self._change(problems=_with(self.report.problems, about, reason))

    def warning(self, about: str, reason: str) -> None:
        """Someone should look at this; an empty reason: it is over."""
        self._change(warnings=_with(self.report.warnings, about, reason))

    def defaults_elsewhere(self, defaults: Mapping[str, int]) -> None:
        """Say which models have a default version that is not loaded here: see `Report.elsewhere`."""
        if defaults == self.report.elsewhere:
            return
        which = ", ".join(f"version {version} of {name}" for name, version in sorted(defaults.items()))
        missing = f"{which} is the default for the servers that share the store, and is not loaded here"
        warnings = _with(self.report.warnings, "default versions", missing if defaults else "")
        self._change(elsewhere=dict(defaults), warnings=warnings)

    def version(self, name: str, version: int, how: str) -> None:
        """How far a version of a model is: see `Report.versions`; nothing: there is no such version any more."""
        before = self.report.versions
        all_of_it = {**before.get(name, {}), version: how}
        kept = {number: all_of_it[number] for number in sorted(all_of_it) if all_of_it[number]}
        versions = {**before, name: kept}
        self._change(versions={each: its for each, its in versions.items() if its})

    def _change(self, **values: Mapping[str, Any]) -> None:
        changed = dataclasses.replace(self.report, **values)
        if changed != self.report:
            self.report = changed
            for listener in self._listeners:
                listener(changed)


def _with(values: Mapping[str, str], key: str, value: str) -> dict[str, str]:
    others = dict(values)
    if value:
        others[key] = value
    else:
        others.pop(key, None)
    return others
