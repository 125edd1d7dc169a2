"""A folder of models: `NAME/VERSION.keras`, or `NAME/VERSION/` with one file in it; `.onnx` and `.stepwell` likewise.

It is scanned at intervals while others write into it, so a file counts only when two scans in a row find it
unchanged. What is unclear (a folder that cannot be read, two files for one version) keeps its last known state.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from stepwell_server.compile.onnx import declaration
from stepwell_server.core.model_names import NAME_RULE, VERSION_RULE, is_name, version_of
from stepwell_server.files.stamp import Stamp, stamp, stamp_of

SUFFIXES = (".keras", ".onnx", ".stepwell")
LAYOUT = "NAME/VERSION.keras, NAME/VERSION.onnx, NAME/VERSION.stepwell, or NAME/VERSION/ with one such file"
KINDS = ".keras, .onnx or .stepwell file"

_SETTLE_S = 0.2
"""The time between the two scans of the folder, in seconds: a file that is being written has changed by then."""
_Key = tuple[str, int]


class FolderError(Exception):
    """A path may not be read from the folder. The message states the rule and the actual value."""


@dataclasses.dataclass(frozen=True, slots=True)
class VersionFile:
    """The file of a version, as it was when scanned."""

    path: str
    stamp: Stamp
    """Of the file, and of the declaration beside it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """The content of the folder."""

    versions: Mapping[str, Mapping[int, VersionFile]]
    """The files by name and version."""
    problems: Mapping[str, str]
    """Why paths are left out."""
    new_problems: Mapping[str, str]
    """The problems that the previous scan did not have."""


def require_inside(root: Path, path: Path) -> None:
    """Check that a path is in the folder when all symlinks are resolved.

    Raises:
        FolderError: it is not.
    """
    real_root, real = os.path.realpath(root), os.path.realpath(path)
    if os.path.commonpath((real_root, real)) != real_root:
        raise FolderError(f"must not lead out of {root}; it leads to {real}")


class ModelFolder:
    """Scans a folder. For one thread at a time; reads directories but no files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._before = _Scan()
        self._looks = 0
        self._settled: dict[_Key, VersionFile] = {}
        self._problems: dict[str, str] = {}

    @property
    def root(self) -> Path:
        """The path of the folder."""
        return self._root

    def settled(self) -> Look:
        """Scan twice, a moment apart, as a file counts when two scans agree. Blocks for that time."""
        self.look()
        time.sleep(_SETTLE_S)
        return self.look()

    def look(self) -> Look:
        """Return what this scan and the previous one agree on: nothing at the first one."""
        now, before = _Scan(), self._before
        now.read(self._root)
        self._looks += 1
        if self._looks > 1:
            for key in {*before.files, *now.files, *self._settled}:
                found = now.files.get(key)
                if now.is_unclear(key) or found != before.files.get(key):
                    continue
                if found is None:
                    self._settled.pop(key, None)
                else:
                    self._settled[key] = found
                # a file that is being copied may be complete a moment later
        problems = {path: why for path, why in now.problems.items() if path in before.problems}
        new = {path: why for path, why in problems.items() if path not in self._problems}
        self._before, self._problems = now, problems
        versions: dict[str, dict[int, VersionFile]] = {}
        for (name, version), file in self._settled.items():
            versions.setdefault(name, {})[version] = file
        return Look(versions, problems, new)


class _Scan:
    """The result of one scan."""

    def __init__(self) -> None:
        self.files: dict[_Key, VersionFile] = {}
        self.unclear: set[_Key] = set()
        """Versions whose file cannot be determined."""
        self.unreadable: set[str] = set()
        """Names whose versions cannot be determined."""
        self.is_unreadable = False
        """The whole folder cannot be read."""
        self.problems: dict[str, str] = {}
        self._root = Path()

    def is_unclear(self, key: _Key) -> bool:
        """Whether the existence or the file of a version cannot be determined."""
        return self.is_unreadable or key[0] in self.unreadable or key in self.unclear

    def read(self, root: Path) -> None:
        """Scan the folder of all models."""
        self._root = root
        try:
            entries = _entries(root)
        except OSError as error:
            self.problems[str(root)] = f"cannot be read: {error.strerror}"
            self.is_unreadable = True
            return
        for entry in entries:
            if not self._is_inside(entry):
                self.unreadable.add(entry.name)
            elif _is_folder(entry):
                if is_name(entry.name):
                    self._read_name(entry)
                else:
                    self.problems[entry.path] = f"must be named as a model, by {NAME_RULE}"
            elif entry.name.endswith(SUFFIXES):
                self.problems[entry.path] = f"must be in a folder with the model's name: {LAYOUT}"

    def _read_name(self, folder: os.DirEntry[str]) -> None:
        """Scan the folder of one model."""
        try:
            entries = _entries(folder.path)
        except OSError as error:
            self.problems[folder.path] = f"cannot be read: {error.strerror}"
            self.unreadable.add(folder.name)
            return
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            is_folder = suffix not in SUFFIXES
            if is_folder and not _is_folder(entry):
                continue  # README.md, config.pbtxt and the like
            version = version_of(entry.name if is_folder else stem)
            if version is None:
                self.problems[entry.path] = f"must be named by its version, {VERSION_RULE}"
            elif not self._is_inside(entry):
                self.unclear.add((folder.name, version))
            elif is_folder:
                self._read_version((folder.name, version), entry)
            else:
                self._take((folder.name, version), entry)

    def _read_version(self, key: _Key, folder: os.DirEntry[str]) -> None:
        """Scan the folder of one version."""
        try:
            models = [entry for entry in _entries(folder.path) if entry.name.endswith(SUFFIXES)]
        except OSError as error:
            self._leave_out(key, folder.path, f"cannot be read: {error.strerror}")
            return
        if not models:
            self.problems[folder.path] = f"must hold a {KINDS}; it holds none"
        elif len(models) > 1:
            names = ", ".join(entry.name for entry in models)
            self._leave_out(key, folder.path, f"must hold one {KINDS}; it holds {names}")
        elif self._is_inside(models[0]):
            self._take(key, models[0])
        else:
            self.unclear.add(key)

    def _take(self, key: _Key, entry: os.DirEntry[str]) -> None:
        try:
            found = entry.stat()
        except OSError as error:
            self._leave_out(key, entry.path, f"cannot be read: {error.strerror}")
            return
        if not stat.S_ISREG(found.st_mode):
            self._leave_out(key, entry.path, "must be a file")
        elif (other := self.files.pop(key, None)) is not None:
            self._leave_out(
                key,
                entry.path,
                f"must be the only file of its version; {os.path.basename(other.path)} is there too",
            )
        elif key not in self.unclear:
            self.files[key] = VersionFile(entry.path, (*stamp_of(found), *_declared(entry)))

    def _leave_out(self, key: _Key, path: str, why: str) -> None:
        self.unclear.add(key)
        self.problems[path] = why

    def _is_inside(self, entry: os.DirEntry[str]) -> bool:
        """Whether an entry is in the folder of models, as everything but a symlink is."""
        if not entry.is_symlink():
            return True
        try:
            require_inside(self._root, Path(entry.path))
        except FolderError as error:
            self.problems[entry.path] = str(error)
            return False
        return True


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder by name, without hidden and temporary ones."""
    with os.scandir(folder) as entries:
        found = [each for each in entries if not each.name.startswith(".") and not each.name.endswith(".tmp")]
    return sorted(found, key=lambda entry: entry.name)


def _declared(entry: os.DirEntry[str]) -> Stamp:
    """The stamp of the declaration beside a model: what it says decides what is served."""
    beside = declaration.file_beside(Path(entry.path))
    return () if beside is None else stamp(beside)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # it is gone
        return False
