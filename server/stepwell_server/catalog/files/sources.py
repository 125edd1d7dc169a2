"""The files that a server loads at its start: those of the command line and of the folder of models."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell_server.catalog.files.folder import LAYOUT, Look, ModelFolder, VersionFile
from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.errors import StartError
from stepwell_server.files.stamp import stamp
from stepwell_server.logs import Log

if TYPE_CHECKING:
    from stepwell_server.settings import Settings

_ALL = VersionPolicy()
_log = Log("app")


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A version of a model, and its file."""

    name: str
    version: int
    path: Path
    display_name: str
    """The name for messages, with the version if there are several."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredModel:
    """What the store has about a name: the versions that were loaded when the server stopped, and the default."""

    versions: Collection[int]
    default: int
    from_elsewhere: Collection[int] = ()
    """The versions that calls loaded from files that are neither on the command line nor in the folder."""


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """The files of a name, and which of them to serve."""

    name: str
    files: Mapping[int, VersionFile]
    policy: VersionPolicy
    default: int = 0
    """The default until a new version becomes it; 0: the highest."""
    is_default_chosen: bool = False
    """A call chose a default that is not the highest or not among the files: new versions do not change it."""

    def choice(self, failed: Collection[int]) -> list[int]:
        """Return the versions to serve without the failed ones, the highest first."""
        chosen = self.policy.choose([each for each in self.files if each not in failed])
        also = {self.default} & self.files.keys() - set(failed)
        return sorted(chosen | also, reverse=True)

    def source(self, version: int) -> Source:
        """Return the source of a version."""
        display_name = self.name if len(self.files) == 1 else f"{self.name}@{version}"
        return Source(self.name, version, Path(self.files[version].path), display_name)


def begin_with(
    settings: Settings, folder: ModelFolder | None, kept: Mapping[str, StoredModel] | None = None
) -> list[Candidates]:
    """Return everything that a server should load at its start. Scans the folder twice, which blocks for a moment.

    `kept` is what the store has about versions, by name.

    Raises:
        StartError: the folder cannot be used, or an option names a model that does not exist and cannot appear
            later.
    """
    found = [
        Candidates(name, {version: _file(path) for version, path in versions.items()}, _ALL)
        for name, versions in settings.versions.items()
    ]
    if folder is not None:
        look = folder.settled()
        if str(folder.root) in look.problems:
            raise StartError(f"--models: {folder.root} {look.problems[str(folder.root)]}")
        log_problems(look)
        found += in_folder(settings, look)
        _require_some(settings, folder, look, found)
    return [_as_before(each, (kept or {}).get(each.name)) for each in found]


def _as_before(found: Candidates, kept: StoredModel | None) -> Candidates:
    """Restore the default, so that new versions become it as if the server had been running."""
    if kept is None:
        return found
    if kept.default not in found.files:
        news = [version for version in found.files if version not in kept.versions]
        # else it was removed from the folder or the command line
        is_back = kept.default in kept.from_elsewhere and max(news, default=0) < kept.default
        return dataclasses.replace(found, is_default_chosen=True) if is_back else found
    had = max({*kept.versions, kept.default} & found.files.keys())
    return dataclasses.replace(found, default=kept.default, is_default_chosen=kept.default != had)


def in_folder(settings: Settings, look: Look) -> list[Candidates]:
    """Return the models in the folder, without the names on the command line."""
    return [
        Candidates(name, versions, settings.policy_of(name))
        for name, versions in sorted(look.versions.items())
        if name not in settings.versions
    ]


def log_problems(look: Look) -> None:
    """Log new problems of the folder, each once."""
    for path, why in sorted(look.new_problems.items()):
        _log.warning("a part of --models is not served", path=path, reason=why)


def _require_some(settings: Settings, folder: ModelFolder, look: Look, found: Collection[Candidates]) -> None:
    """Refuse missing models and options for them; only log if the folder is watched, as models may appear."""
    problems = []
    both = sorted(look.versions.keys() & settings.versions.keys())
    if both:
        _log.warning(
            "models of the command line replace those of the same name in --models",
            models=", ".join(both),
        )
    if not found:
        wrong = "".join(f"; {path} {why}" for path, why in sorted(look.problems.items()))
        problems.append(f"--models: must hold {LAYOUT}; {folder.root} holds no model{wrong}")
    names = {each.name for each in found}
    for option, about in (
        ("--version-policy", settings.version_policy),
        ("--probe-steps", settings.probe_steps),
        ("--trust-causality", settings.trust_causality),
        ("--trust-rows", settings.trust_rows),
        ("--check-with", settings.check_with),
    ):
        problems += [
            f"{option}: there is no model {name!r}; the models are {', '.join(sorted(names))}"
            for name in about
            if name and name not in names
        ]
    if problems and not settings.watch_models:
        raise StartError(problems[0])
    for problem in problems:
        _log.warning(problem)


def _file(path: Path) -> VersionFile:
    return VersionFile(str(path), stamp(path))
