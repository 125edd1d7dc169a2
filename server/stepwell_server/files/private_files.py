"""Folders and files that are for the server's user alone: they are made so, closed to others, or refused.

Three rules. What another user could have *written* is never used: whoever can write the cache decides what runs, and
whoever can write the token file decides who calls. What another user can *read* is closed to others where it is the
server's own (data, cache); a secret of the user's is refused, or logged as a warning. Root may do all of that anyway,
and is trusted.

Owner and mode decide, of the path and of all folders and links on the way to it: whoever can rename a folder above a
file can put another in its place. Access lists (setfacl) are the operator's affair. Blocking, for any thread.
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

FOLDER_MODE, FILE_MODE = 0o700, 0o600
OF_DATA = ("sessions", "sessions.new", "wal", "server.lock", "readers.lock", "models", "uploads")
"""Names of what is in a data folder."""
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH
_READ, _WRITE = 4, 2
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MAX_LINKS = 40
_log = logging.getLogger(__name__)


_as_user: ContextVar[int | None] = ContextVar("as_user", default=None)


class NotPrivateError(PermissionError):
    """A path cannot be used, as it is not private. The message is one line: the path, the rule, what it is, and the fix."""


class _Place(NamedTuple):
    """A folder, link or file on the way to a path, itself included."""

    path: Path
    found: os.stat_result

    @property
    def mode(self) -> int:
        return stat.S_IMODE(self.found.st_mode)


@contextlib.contextmanager
def as_user(number: int) -> Iterator[None]:
    """Judge files as those of a server that another user runs: for root, who looks after it."""
    before = _as_user.set(number)
    try:
        yield
    finally:
        _as_user.reset(before)


def server_user() -> int:
    """The number of the user whose server is meant: who runs this, unless `as_user` says another."""
    number = _as_user.get()
    return os.geteuid() if number is None else number


# ------------------------------------------------------------------------------------------------- the server's own


def make_folder(path: Path, holds: Sequence[str]) -> None:
    """Make a folder that nobody else can use, with those above it. One that is there is closed to others, with a warning.

    Args:
        path: the folder.
        holds: patterns of the names that the server gives to what is in it. A wider folder that holds anything else is
            not the server's alone, and is refused instead of being closed to its other users.

    Raises:
        NotPrivateError: another user can write it, or owns it or a folder above it.
        OSError: it cannot be made.
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
        _log.warning("other users could read %s; only the user of the server can now", folder)
    except OSError as error:
        _log.warning("other users can read %s, and that cannot be changed: %s", folder, error.strerror)


def folder_problem(path: Path, holds: Sequence[str]) -> str:
    """Why the server's own folder cannot be used; empty: it can, or it can be made. Changes nothing.

    Raises:
        OSError: it cannot be looked at.
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
            return f"{entry.path} must be the server's own; {problem}"
        # Nobody else has written what is in a folder that is closed to others.
        could_be = last.mode & _OTHERS_ENTER and not stat.S_ISLNK(entry.found.st_mode)
        if could_be and (problem := _write_problem(entry)):
            return f"{entry.path} must be what no other user can have written; {problem}: if nobody has, chmod go-w it"
    others = _others(last.path, holds) if _is_wide(last) else ""
    if others:
        return (
            f"{path} must be a folder for this alone, or one that no other user can read; its mode is {last.mode:04o}, and"
            f" it holds {others}: give a new folder, or chmod 700 {path}"
        )
    return ""


def create(path: Path) -> int:
    """Make a file of mode 0600, whatever the umask is, and return a descriptor to write it.

    Raises:
        OSError: there is something of that name already, or it cannot be made.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    os.fchmod(file, FILE_MODE)
    return file


def ensure_file(path: Path) -> None:
    """Make an empty file of mode 0600 if there is none. It belongs to the folder's owner, even if root makes it.

    Raises:
        OSError: it cannot be made.
    """
    try:
        file = create(path)
    except FileExistsError:
        return
    try:
        owner = os.stat(path.parent)
        if os.geteuid() == 0:  # the file is new and no link: nobody else's is given away
            os.fchown(file, owner.st_uid, owner.st_gid)
    finally:
        os.close(file)


def replace(path: Path, content: bytes) -> None:
    """Write a file of mode 0600, whole or not at all; what was there is replaced.

    Raises:
        OSError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(create(unfinished), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ------------------------------------------------------------------------------------------------ the user's secrets


def require_secret(path: Path, *, may_be_read: bool = False, group_may_read: bool = False) -> None:
    """Check a file that holds a secret of the user's. Nothing is changed: whoever made it decides.

    Args:
        path: the file; a link is followed. A file that is not there is no business of this function's.
        may_be_read: a file that other users can read is only complained of, with a warning, and not at all if only
            its group can (certificates' keys are often shared so).
        group_may_read: a file that its group can read is taken, but not one that everybody can.

    Raises:
        NotPrivateError: another user can change it or put another in its place, or can read it.
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
    """Check a file that decides something and that anybody may read, such as keys that are public. As `require_secret`.

    Raises:
        NotPrivateError: another user can change it or put another in its place.
    """
    _trusted(path)


def _trusted(path: Path) -> _Place | None:
    """A file that no other user can change; None: there is none, it is a folder, which cannot be read, or a credential.

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
    """Why a place above a path, or a link on the way, lets other users decide what is under that path."""
    what = "link" if stat.S_ISLNK(place.found.st_mode) else "folder"
    problem = _owner_problem(place, is_above=True)
    # Where the sticky bit is set, as on /tmp, nobody can rename or remove what is another's.
    if not problem and what == "folder" and not place.found.st_mode & stat.S_ISVTX:
        problem = _write_problem(place)
    return (
        problem and f"{path} must be where no other user can replace it; the {what} {place.path}: {problem}"
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
    """Whether another user has a right as a member of the group."""
    return bool(place.mode & right << 3) and not _is_own_group(place.found.st_gid)


def _is_credential(path: Path) -> bool:
    """Whether systemd has made a file for this service (LoadCredential=): it is root's, 0440, and has an access list."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return folder != "" and Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _is_own_group(number: int) -> bool:
    """Whether no other user is in a group, as far as this system knows; root's is root.

    So it is with groups of one user, which many systems make, and with the groups that containers give to volumes.
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
    """Whether nobody knows who a user is: in a user namespace, where the system's folders belong to no one known."""
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
    """A user for people: the name, if there is one, and the number."""
    name = _name(user)
    return f"user {name} ({user})" if name else f"user {user}"


def _group(group: int) -> str:
    try:
        return f"group {grp.getgrgid(group).gr_name}"
    except KeyError:
        return f"group {group}"


# ------------------------------------------------------------------------------------------------------------- files


def _places(path: Path) -> Iterator[_Place]:
    """What is met on the way to a path, from the root on: folders, links, and it itself, as far as they are there.

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
        path.chmod(FOLDER_MODE)  # a umask may have taken away what the owner needs
    except FileExistsError:
        if not path.is_dir():
            raise


def _is_wide(place: _Place) -> bool:
    """Whether others can use what is ours. How wide root has made its own is root's decision."""
    return bool(place.mode & _OTHERS) and place.found.st_uid == server_user()


def _is_known(name: str, holds: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in holds)


def _others(folder: Path, holds: Sequence[str]) -> str:
    """The first thing in a folder that the server has not put there."""
    names = (name for name in sorted(os.listdir(folder)) if not _is_known(name, holds))
    return next((name for name in names if name != "lost+found"), "")


def _entries(folder: Path, holds: Sequence[str]) -> Iterator[_Place]:
    """All that the server has put into a folder; links are not followed."""
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
