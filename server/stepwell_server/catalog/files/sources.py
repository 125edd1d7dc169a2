"""Which files a server begins with: those of its command line, and those in its folder of models."""

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
    """A version of a model, and the file that it is made from."""

    name: str
    version: int
    path: Path
    display_name: str
    """Its name in messages, with the version where there are others."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredModel:
    """What the store has of a name: the versions that were loaded when the server ended, and the default."""

    versions: Collection[int]
    default: int
    from_elsewhere: Collection[int] = ()
    """Those that calls loaded, from files that neither the command line nor the folder has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """The files of a name, and which of them are served."""

    name: str
    files: Mapping[int, VersionFile]
    policy: VersionPolicy
    default: int = 0
    """The version that is the default before anything new becomes it; 0: the highest."""
    is_default_chosen: bool = False
    """A call made a version the default that is not the highest, or not among the files: new versions do not change that."""

    def choice(self, failed: Collection[int]) -> list[int]:
        """The versions to serve if those cannot be, the highest first."""
        chosen = self.policy.choose([each for each in self.files if each not in failed])
        also = {self.default} & self.files.keys() - set(failed)
        return sorted(chosen | also, reverse=True)

    def source(self, version: int) -> Source:
        """A version as it is loaded."""
        display_name = self.name if len(self.files) == 1 else f"{self.name}@{version}"
        return Source(self.name, version, Path(self.files[version].path), display_name)


def begin_with(
    settings: Settings, folder: ModelFolder | None, kept: Mapping[str, StoredModel] | None = None
) -> list[Candidates]:
    """All that a server is to load when it starts. Looks at the folder twice, which blocks for a moment.

    `kept` is what the store knows of versions, by name.

    Raises:
        StartError: the folder cannot be used, or an option is about a model that is not there, and none can come.
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
    """With the default as it was, so that what is new becomes it as if the server had run meanwhile."""
    if kept is None:
        return found
    if kept.default not in found.files:
        news = [version for version in found.files if version not in kept.versions]
        # else it was taken out of the folder, or off the command line
        is_back = kept.default in kept.from_elsewhere and max(news, default=0) < kept.default
        return dataclasses.replace(found, is_default_chosen=True) if is_back else found
    had = max({*kept.versions, kept.default} & found.files.keys())
    return dataclasses.replace(found, default=kept.default, is_default_chosen=kept.default != had)


def in_folder(settings: Settings, look: Look) -> list[Candidates]:
    """What is in the folder, but for names that the command line has."""
    return [
        Candidates(name, versions, settings.policy_of(name))
        for name, versions in sorted(look.versions.items())
        if name not in settings.versions
    ]


def log_problems(look: Look) -> None:
    """Log what is left out of the folder, once."""
    for path, why in sorted(look.new_problems.items()):
        _log.warning("a part of --models is not served", path=path, reason=why)


def _require_some(settings: Settings, folder: ModelFolder, look: Look, found: Collection[Candidates]) -> None:
    """Refuse models and options that are missing; log them if the folder is watched, as they may come."""
    problems = []
    both = sorted(look.versions.keys() & settings.versions.keys())
    if both:
        _log.warning(
            "models are served from the command line, not from --models, which has them too",
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
