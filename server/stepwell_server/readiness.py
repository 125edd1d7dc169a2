"""Whether the server can answer calls, and if not, why: one truth for gRPC health, HTTP probes and systemd."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """How the server is at a moment."""

    problems: Mapping[str, str]
    """Why it is not ready, by what it is about: `models`, `store`, `stopping`. Empty: it is."""
    warnings: Mapping[str, str]
    """What does not keep it from being ready: `disk`, ..."""
    models: Mapping[str, str]
    """Of each model how far it is: waiting, loading (with the stage), loaded, failed."""

    @property
    def is_ready(self) -> bool:
        """Calls can be answered."""
        return not self.problems


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

    def model(self, name: str, how: str) -> None:
        """How far a model is."""
        self._change(models=_with(self.report.models, name, how))

    def _change(self, **values: Mapping[str, str]) -> None:
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
