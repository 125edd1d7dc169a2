"""Which files a server begins with: those of its command line, and those in its folder of models."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.file_stamp import stamp
from stepwell_server.logs import Log
from stepwell_server.model_folder import LAYOUT, Look, ModelFolder, VersionFile

if TYPE_CHECKING:
    from stepwell_server.settings import Settings

_SETTLE_S = 0.2
"""Between the two looks at the folder: what is being written is another file by then."""
_ALL = VersionPolicy()
_log = Log("app")


class LoadError(Exception):
    """A model, or a folder, cannot be used. The message is one line for people."""


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A version of a model, and the file that it is made from."""

    name: str
    version: int
    path: Path
    told: str
    """What people are told that it is: the name, with the version where there are others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Candidates:
    """The files of a name, and which of them are served."""

    name: str
    files: Mapping[int, VersionFile]
    policy: VersionPolicy

    def choice(self, failed: Collection[int]) -> list[int]:
        """The versions to serve if those cannot be, the highest first."""
        return sorted(self.policy.choose([each for each in self.files if each not in failed]), reverse=True)

    def source(self, version: int) -> Source:
        """A version as it is loaded."""
        told = self.name if len(self.files) == 1 else f"{self.name}@{version}"
        return Source(self.name, version, Path(self.files[version].path), told)


def begin_with(settings: Settings, folder: ModelFolder | None) -> list[Candidates]:
    """All that a server is to load when it starts. Looks at the folder twice, which blocks for a moment.

    Raises:
        LoadError: the folder cannot be used, or an option is about a model that is not there, and none can come.
    """
    found = [
        Candidates(name, {version: _file(path) for version, path in versions.items()}, _ALL)
        for name, versions in settings.versions.items()
    ]
    if folder is None:
        return found
    folder.look()
    time.sleep(_SETTLE_S)
    look = folder.look()
    if str(folder.root) in look.problems:
        raise LoadError(f"--models: {folder.root} {look.problems[str(folder.root)]}")
    tell_problems(look)
    found += in_folder(settings, look)
    _require_some(settings, folder, look, found)
    return found


def in_folder(settings: Settings, look: Look) -> list[Candidates]:
    """What is in the folder, but for names that the command line has."""
    return [
        Candidates(name, versions, settings.policy_of(name))
        for name, versions in sorted(look.versions.items())
        if name not in settings.versions
    ]


def tell_problems(look: Look) -> None:
    """Log what is left out of the folder, once."""
    for path, why in sorted(look.new_problems.items()):
        _log.warning("a part of --models is not served", path=path, reason=why)


def _require_some(settings: Settings, folder: ModelFolder, look: Look, found: Collection[Candidates]) -> None:
    """Refuse, or tell if it may change, that there is less than the operator thinks."""
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
        raise LoadError(problems[0])
    for problem in problems:
        _log.warning(problem)


def _file(path: Path) -> VersionFile:
    return VersionFile(str(path), stamp(path))
