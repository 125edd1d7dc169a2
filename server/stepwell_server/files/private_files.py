"""Private folders and files of the server's user: created as such, closed to others, or refused.

There are three rules. First, nothing that another user could have *written* is used: whoever can write the cache
decides what runs, and whoever can write the token file decides who may call. Second, the server's own folders (data,
cache) that another user can *read* are closed to others; a secret of the user is refused, or logged as a warning.
Third, root is trusted, because it can do all of that anyway.

The owners and modes of the path and of all folders and links above it decide, because whoever can rename a folder
above a file can replace the file. Access lists (setfacl) are not checked. Blocking; for any thread.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import grp
import logging
import os
import pwd
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from stepwell_server.files.flush import flush_folders, flush_open

FOLDER_MODE, FILE_MODE = 0o700, 0o600
OF_DATA = ("sessions", "sessions.new", "wal", "server.lock", "readers.lock", "models", "uploads")
"""Names of entries in a data folder."""
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH
_READ, _WRITE = 4, 2
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MAX_LINKS = 40
_log = logging.getLogger(__name__)


_as_user: ContextVar[int | None] = ContextVar("as_user", default=None)


class NotPrivateError(PermissionError):
    """A path is not private and cannot be used. The message is one line: the path, the rule, the finding, and the fix."""


class _Place(NamedTuple):
    """A folder, link or file on the way to a path, including the path."""

    path: Path
    found: os.stat_result

    @property
    def mode(self) -> int:
        return stat.S_IMODE(self.found.st_mode)


@contextlib.contextmanager
def as_user(number: int) -> Iterator[None]:
    """Check files as the given user: for root, who manages another user's server."""
    before = _as_user.set(number)
    try:
        yield
    finally:
        _as_user.reset(before)


def server_user() -> int:
    """Return the id of the server's user: the current user, unless `as_user` set another."""
    number = _as_user.get()
    return os.geteuid() if number is None else number


# ------------------------------------------------------------------------------------------------- the server's own


def make_folder(path: Path, holds: Sequence[str]) -> None:
    """Create a private folder, with its parents. An existing folder is closed to others, with a warning.

    Args:
        path: the folder.
        holds: patterns of the names that the server uses in it. A folder that is open to others and contains anything
            else is refused instead of closed.

    Raises:
        NotPrivateError: another user can write the folder, or owns it or a parent.
        OSError: it cannot be created.
    """
    if problem := folder_problem(path, holds):
        raise NotPrivateError(problem)
    _make(path.absolute())
    folder = path.resolve()
    place = _Place(folder, os.lstat(folder))
    if not _is_wide(place):
        return
    try:
        folder.chmod(place.mode & ~_OTHERS)
        _log.warning("other users could read %s; now only the user of the server can", folder)
    except OSError as error:
        _log.warning("other users can read %s, and its mode cannot be changed: %s", folder, error.strerror)


def folder_problem(path: Path, holds: Sequence[str]) -> str:
    """Return why a folder of the server cannot be used; empty: it can be used or created. Changes nothing.

    Raises:
        OSError: it cannot be checked.
    """
    places = list(_places(path))
    last = places[-1]
    is_there = last.path == path.resolve()
    for place in places[:-1] if is_there else places:
        if problem := _way_problem(place, path):
            return problem
    if not is_there or not stat.S_ISDIR(last.found.st_mode):
        return ""
    if problem := _owner_problem(last) or _write_problem(last):
        return f"{path} must be a folder that no other user can write; {problem}"
    for entry in _entries(last.path, holds):
        if problem := _owner_problem(entry):
            return f"{entry.path} must belong to the user of the server; {problem}"
        # In a folder that is closed to others, nobody else can have written anything.
        could_be = last.mode & _OTHERS_ENTER and not stat.S_ISLNK(entry.found.st_mode)
        if could_be and (problem := _write_problem(entry)):
            return f"no other user may have been able to write {entry.path}; {problem}: if nobody did, run chmod go-w on it"
    others = _others(last.path, holds) if _is_wide(last) else ""
    if others:
        return (
            f"{path} must be a folder for this purpose only, or not readable by other users; its mode is {last.mode:04o}, and"
            f" it contains {others}: give a new folder, or chmod 700 {path}"
        )
    return ""


def create(path: Path) -> int:
    """Create a file with mode 0600, whatever the umask, and return its descriptor for writing.

    Raises:
        OSError: the name exists already, or the file cannot be created.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    os.fchmod(file, FILE_MODE)
    return file


def ensure_file(path: Path) -> None:
    """Create an empty file with mode 0600 if there is none. It belongs to the folder's owner, even if root creates it.

    Raises:
        OSError: it cannot be created.
    """
    try:
        file = create(path)
    except FileExistsError:
        return
    try:
        owner = os.stat(path.parent)
        if os.geteuid() == 0:  # the file is new and not a link, so this changes no other file
            os.fchown(file, owner.st_uid, owner.st_gid)
    finally:
        os.close(file)


def replace(path: Path, content: bytes) -> None:
    """Write a file with mode 0600 atomically, replacing an existing one.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(create(unfinished), "wb") as file:
            file.write(content)
            file.flush()
            flush_open(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    flush_folders(path.parent)


# ------------------------------------------------------------------------------------------------ the user's secrets


def require_secret(path: Path, *, may_be_read: bool = False, group_may_read: bool = False) -> None:
    """Check a file with a secret of the user. Changes nothing, because the file is the user's.

    Args:
        path: the file; links are followed. A missing file is not an error.
        may_be_read: only log a warning if other users can read it, and nothing if only its group can (keys of
            certificates are often shared that way).
        group_may_read: accept a file that its group, but not everybody, can read.

    Raises:
        NotPrivateError: another user can change, replace or read it.
    """
    file = _trusted(path)
    if file is None:
        return
    by_others, by_group = file.mode & stat.S_IROTH, _group_may(file, _READ)
    if not by_others and (not by_group or group_may_read):
        return
    problem = f"{path} must be readable by its owner only; its mode is {file.mode:04o}: chmod 600 {path}"
    if not may_be_read:
        raise NotPrivateError(problem)
    if by_others:
        _log.warning("%s", problem)


def require_trusted(path: Path) -> None:
    """As `require_secret`, for a trusted file that anybody may read, such as public keys.

    Raises:
        NotPrivateError: another user can change it or put another in its place.
    """
    _trusted(path)


def _trusted(path: Path) -> _Place | None:
    """Return a file that no other user can change; None: it is missing, a folder, or a credential of systemd.

    Raises:
        NotPrivateError: another user can change it or put another in its place.
    """
    if _is_credential(path):
        return None
    try:
        places = list(_places(path))
        file = _Place(path, os.stat(path))
    except OSError:
        return None
    if stat.S_ISDIR(file.found.st_mode):  # "chmod 600" would be bad advice
        return None
    for place in places[:-1]:
        if problem := _way_problem(place, path):
            raise NotPrivateError(problem)
    if problem := _owner_problem(file) or _write_problem(file):
        raise NotPrivateError(
            f"{path} must be a file that no other user can write; {problem}: chmod 600 {path}"
        )
    return file


# ------------------------------------------------------------------------------------------------------------- rules


def _way_problem(place: _Place, path: Path) -> str:
    """Return why a parent of a path, or a link on the way, allows other users to replace the content of the path."""
    what = "link" if stat.S_ISLNK(place.found.st_mode) else "folder"
    problem = _owner_problem(place, is_above=True)
    # With the sticky bit, as on /tmp, users cannot rename or remove files of others.
    if not problem and what == "folder" and not place.found.st_mode & stat.S_ISVTX:
        problem = _write_problem(place)
    return (
        problem
        and f"{path} must be in a place where no other user can replace it; the {what} {place.path}: {problem}"
    )


def _owner_problem(place: _Place, *, is_above: bool = False) -> str:
    owner = place.found.st_uid
    if owner in (0, server_user()) or (is_above and _is_unmapped(owner)):
        return ""
    return f"its owner is {user_text(owner)}, and the server runs as {user_text(server_user())}"


def _write_problem(place: _Place) -> str:
    if place.mode & stat.S_IWOTH:
        return f"its mode is {place.mode:04o}, every user can write it"
    if _group_may(place, _WRITE):
        return f"its mode is {place.mode:04o}, other users can write it ({_group(place.found.st_gid)})"
    return ""


def _group_may(place: _Place, right: int) -> bool:
    """Whether another user has this right as a member of the group."""
    return bool(place.mode & right << 3) and not _is_own_group(place.found.st_gid)


def _is_credential(path: Path) -> bool:
    """Whether systemd created a file for this service (LoadCredential=): owned by root, 0440, with an access list."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return folder != "" and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _is_own_group(number: int) -> bool:
    """Whether a group has no other user, as far as this system knows. Root's group is trusted.

    This accepts the groups of single users, which many systems create, and the groups of container volumes.
    """
    if number == 0:
        return True
    try:
        members = set(grp.getgrgid(number).gr_mem)
    except KeyError:
        members = set()
    members |= {user.pw_name for user in pwd.getpwall() if user.pw_gid == number}
    return members <= {"root", _name(server_user())}


def _is_unmapped(user: int) -> bool:
    """Whether a user is unmapped: in a user namespace, the system's folders belong to an unknown user."""
    try:
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        mapped = Path("/proc/self/uid_map").read_text().split()
    except (OSError, ValueError):
        return False
    return user == overflow and mapped != ["0", "0", "4294967295"]


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return ""


def user_text(user: int) -> str:
    """Describe a user: the name, if known, and the id."""
    name = _name(user)
    return f"user {name} ({user})" if name else f"user {user}"


def _group(group: int) -> str:
    try:
        return f"group {grp.getgrgid(group).gr_name}"
    except KeyError:
        return f"group {group}"


# ------------------------------------------------------------------------------------------------------------- files


def _places(path: Path) -> Iterator[_Place]:
    """Yield the existing folders and links on the way to a path, from the root on, and the path itself.

    Raises:
        OSError: a folder cannot be searched, or links lead nowhere.
    """
    at, links = Path("/"), 0
    todo = list(reversed(path.absolute().parts[1:]))
    yield _Place(at, os.lstat(at))
    while todo:
        part = todo.pop()
        if part == "..":
            at = at.parent
            continue
        try:
            found = os.lstat(at / part)
        except FileNotFoundError:
            return
        yield _Place(at / part, found)
        if not stat.S_ISLNK(found.st_mode):
            at = at / part
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = Path(os.readlink(at / part))
        if target.is_absolute():
            at = Path("/")
        todo.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))


def _make(path: Path) -> None:
    if path.is_dir():
        return
    _make(path.parent)
    try:
        path.mkdir(FOLDER_MODE)
        path.chmod(FOLDER_MODE)  # the umask may have removed rights that the owner needs
        flush_folders(path.parent)
    except FileExistsError:
        if not path.is_dir():
            raise


def _is_wide(place: _Place) -> bool:
    """Whether others can access a path of ours. For paths of root, root decides."""
    return bool(place.mode & _OTHERS) and place.found.st_uid == server_user()


def _is_known(name: str, holds: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in holds)


def _others(folder: Path, holds: Sequence[str]) -> str:
    """Return the first entry of a folder that the server did not create."""
    names = (name for name in sorted(os.listdir(folder)) if not _is_known(name, holds))
    return next((name for name in names if name != "lost+found"), "")


def _entries(folder: Path, holds: Sequence[str]) -> Iterator[_Place]:
    """Yield all entries of a folder that the server created; links are not followed."""
    for root, folders, files in os.walk(folder):
        names = [*folders, *files]
        if Path(root) == folder:
            names = [name for name in names if _is_known(name, holds)]
            folders[:] = [name for name in folders if name in names]
        for name in names:
            try:
                yield _Place(Path(root, name), os.lstat(Path(root, name)))
            except FileNotFoundError:  # another process of ours has removed it
                continue
