"""Whether the server can answer calls, and the reason if not. gRPC health, HTTP probes and systemd report it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The state of the server at one moment."""

    problems: Mapping[str, str]
    """Reasons why it is not ready, by subject: `models`, `store`, `stopping`. Empty: it is ready."""
    warnings: Mapping[str, str]
    """Problems that leave it ready, by subject: `disk`, `store`, ..."""
    versions: Mapping[str, Mapping[int, str]]
    """Progress of each model's versions: waiting, loading (with the stage), loaded, failed (with the reason)."""
    elsewhere: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Default versions that are not loaded here, but perhaps on other servers that share the store, by model."""

    @property
    def is_ready(self) -> bool:
        """Whether calls can be answered."""
        return not self.problems

    @property
    def models(self) -> dict[str, str]:
        """Progress of each model: that of its most advanced version."""
        return {
            name: min(versions.values(), key=lambda progress: _ORDER.index(progress.partition(":")[0]))
            for name, versions in self.versions.items()
        }

    def is_loaded(self, name: str, version: int | None = None) -> bool:
        """Whether a version of a model is loaded. Without a version: whether the model's name can be used."""
        if version is None and name in self.elsewhere:
            return False
        versions = self.versions.get(name, {})
        return LOADED in versions.values() if version is None else versions.get(version) == LOADED


LOADED = "loaded"
_ORDER = (LOADED, "loading", "waiting", "failed")


class Readiness:
    """The current state of the server. Change it on the event loop; any thread may read `report`."""

    def __init__(self) -> None:
        self.report = Report({"models": "the models are being loaded"}, {}, {})
        self._listeners: list[Callable[[Report], None]] = []

    def listen(self, listener: Callable[[Report], None]) -> None:
        """Call a listener on the event loop, now and after each change."""
        self._listeners.append(listener)
        listener(self.report)

    def problem(self, about: str, reason: str) -> None:
        """Set the reason why the server is not ready, by subject. An empty reason clears it."""
        self._change(problems=_with(self.report.problems, about, reason))

    def warning(self, about: str, reason: str) -> None:
        """Set a warning, by subject. An empty reason clears it."""
        self._change(warnings=_with(self.report.warnings, about, reason))

    def defaults_elsewhere(self, defaults: Mapping[str, int]) -> None:
        """Set the default versions that are not loaded here: see `Report.elsewhere`."""
        if defaults == self.report.elsewhere:
            return
        which = ", ".join(f"version {version} of {name}" for name, version in sorted(defaults.items()))
        missing = f"{which} is the default of the servers that share the store, but is not loaded here"
        warnings = _with(self.report.warnings, "default versions", missing if defaults else "")
        self._change(elsewhere=dict(defaults), warnings=warnings)

    def version(self, name: str, version: int, progress: str) -> None:
        """Set the progress of a version: see `Report.versions`. An empty text removes the version."""
        before = self.report.versions
        changed = {**before.get(name, {}), version: progress}
        kept = {number: changed[number] for number in sorted(changed) if changed[number]}
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
