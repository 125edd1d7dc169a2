"""What is for the server's user alone: made so whatever the umask, mended or refused, also as another user than root."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepwell_server.clock import SystemClock
from stepwell_server.compile import cache
from stepwell_server.files import private_files
from stepwell_server.files.private_files import NotPrivateError, make_folder, require_secret
from stepwell_server.store.base import StoreError
from stepwell_server.store.disk.store import DiskStore
from support.run_folder import run_folder

HOLDS = ("kept*",)
SOMEBODY = 54_321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="files of another user are made by root")


def mode(path: Path) -> str:
    return f"{path.stat().st_mode & 0o7777:04o}"


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.parametrize("umask", [0o000, 0o777], indirect=True)
@pytest.mark.usefixtures("umask")
def test_created_files_are_private_whatever_the_umask(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", HOLDS)
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == ["0700", "0700"]
    file = tmp_path / "a" / "secret"
    private_files.replace(file, b"1")
    private_files.replace(file, b"2")
    assert (file.read_bytes(), mode(file)) == (b"2", "0600")
    assert sorted(os.listdir(file.parent)) == ["b", "secret"]
    with pytest.raises(FileExistsError):
        private_files.create(file)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        private_files.create(tmp_path / "link")  # not through a link that was put there first


def test_a_wide_folder_is_closed_to_others_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    (folder / "kept").mkdir(parents=True)
    (folder / "kept" / "file").touch(0o644)
    for path in (folder, folder / "kept"):
        path.chmod(0o755)
    make_folder(folder, HOLDS)
    assert mode(folder) == "0700"  # which nobody else passes, whatever is in it
    assert [str(folder) in record.getMessage() for record in caplog.records] == [True]
    make_folder(folder, HOLDS)
    assert len(caplog.records) == 1


def test_a_wide_folder_that_is_not_the_servers_alone_is_not_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "thesis.tex").touch()
    with pytest.raises(NotPrivateError, match=r"it contains thesis.tex: give a new folder, or chmod 700 "):
        make_folder(folder, HOLDS)
    assert mode(folder) == "0755"
    folder.chmod(0o700)
    make_folder(folder, HOLDS)


def test_a_folder_that_others_can_write_or_replace_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "up" / "data"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(NotPrivateError, match=r"mode is 0777, every user can write it"):
        make_folder(folder, HOLDS)
    folder.chmod(0o1777)  # others cannot remove what is there, and can put there what is not
    with pytest.raises(NotPrivateError, match="every user can write it"):
        make_folder(folder, HOLDS)
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    for path in (folder, folder / "new", folder.parent / "new"):
        with pytest.raises(NotPrivateError, match=rf"the folder {folder.parent}: its mode is 0777"):
            make_folder(path, HOLDS)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(NotPrivateError, match=f"the folder {folder.parent}"):
        make_folder(tmp_path / "link", HOLDS)
    folder.parent.chmod(0o1777)
    make_folder(folder, HOLDS)


def test_what_others_could_have_written_in_a_folder_that_was_open_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    make_folder(folder, ["x"])
    (folder / "x").touch()
    (folder / "x").chmod(0o666)
    make_folder(folder, ["x"])  # nobody got there
    folder.chmod(0o755)
    with pytest.raises(
        NotPrivateError, match=r"no other user may have been able to write .*data/x; its mode is 0666"
    ):
        make_folder(folder, ["x"])


@needs_root
def test_what_belongs_to_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "kept").mkdir(parents=True, mode=0o700)
    os.chown(folder / "kept", SOMEBODY, -1)
    with pytest.raises(NotPrivateError, match=f"its owner is user {SOMEBODY}, and the server runs as"):
        make_folder(folder, HOLDS)
    os.chown(folder / "kept", 0, -1)
    (tmp_path / "link").symlink_to(folder)
    os.chown(tmp_path / "link", SOMEBODY, -1, follow_symlinks=False)
    with pytest.raises(NotPrivateError, match=f"the link {tmp_path / 'link'}: its owner"):
        make_folder(tmp_path / "link", HOLDS)
    os.chown(folder, SOMEBODY, -1)
    for path in (folder, folder / "kept"):
        with pytest.raises(NotPrivateError, match="its owner is user"):
            make_folder(path, HOLDS)


@needs_root
def test_a_group_counts_as_others_only_if_it_has_others(tmp_path: Path) -> None:
    folder, file = tmp_path / "data", tmp_path / "secret"
    folder.mkdir()
    file.touch()
    os.chown(folder, 0, SOMEBODY)  # nobody is in it: the group that a container gives to its volume
    folder.chmod(0o2775)
    make_folder(folder, HOLDS)
    assert mode(folder) == "2700"
    os.chown(folder, 0, 65_534)  # nobody's group has the user nobody
    folder.chmod(0o770)
    with pytest.raises(NotPrivateError, match=r"mode is 0770, other users can write it \(group "):
        make_folder(folder, HOLDS)
    for group, problem in ((SOMEBODY, ""), (65_534, "readable by its owner only")):
        os.chown(file, 0, group)
        file.chmod(0o640)
        if problem:
            with pytest.raises(NotPrivateError, match=problem):
                require_secret(file)
        else:
            require_secret(file)
        require_secret(file, may_be_read=True)


@needs_root
def test_a_secret_that_kubernetes_mounts_is_taken(tmp_path: Path) -> None:
    """Links into a folder of root, all of it readable by the group of `fsGroup` (here nobody is in it)."""
    kept = tmp_path / "..2026"
    kept.mkdir()
    (kept / "tokens").touch()
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "tokens").symlink_to("..data/tokens")
    for path, bits in ((kept / "tokens", 0o440), (kept, 0o2755), (tmp_path, 0o3777)):
        os.chown(path, 0, SOMEBODY)
        path.chmod(bits)
    require_secret(tmp_path / "tokens")


def _list_access(path: Path, user: int) -> None:
    """Let a user read a file by an access list, which leaves the mode 0440. Skip where the file system has none."""
    nobody = 0xFFFFFFFF
    entries = [(1, 4, nobody), (2, 4, user), (4, 0, nobody), (16, 4, nobody), (32, 0, nobody)]
    raw = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", raw)
    except OSError:
        pytest.skip("the file system has no access lists")


@needs_root
def test_a_credential_of_systemd_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LoadCredential= makes it: root's, 0440, with an access list for the service's user; here of a group with others."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    credential, other = folder / "tokens", tmp_path / "tokens"
    for file in (credential, other):
        file.touch(0o400)
        os.chown(file, 0, 65_534)
        _list_access(file, SOMEBODY)
        assert mode(file) == "0440"
    for file in (credential, other):
        with pytest.raises(NotPrivateError, match="owner only; its mode is 0440: chmod 600"):
            require_secret(file)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    require_secret(credential)
    private_files.require_trusted(credential)
    for path in (other, folder / ".." / "tokens"):
        with pytest.raises(NotPrivateError, match="owner only"):
            require_secret(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    with pytest.raises(NotPrivateError, match="owner only"):
        require_secret(credential)


@needs_root
def test_access_lists_are_the_operators_affair(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.touch(0o400)
    _list_access(file, SOMEBODY)
    require_secret(file)  # the group's bits are of root's group


def test_a_secret_that_others_can_read_or_change_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tokens"
    require_secret(file)
    file.touch()
    file.chmod(0o644)
    with pytest.raises(NotPrivateError, match=rf"its mode is 0644: chmod 600 {file}$"):
        require_secret(file)
    assert not caplog.records
    require_secret(file, may_be_read=True)
    assert "must be readable by its owner only" in caplog.text
    file.chmod(0o602)
    with pytest.raises(NotPrivateError, match="every user can write it"):
        require_secret(file, may_be_read=True)
    file.chmod(0o600)
    require_secret(file)
    tmp_path.chmod(0o777)
    with pytest.raises(NotPrivateError, match="can replace it"):
        require_secret(file)


@needs_root
def test_another_user_than_root_gets_the_same() -> None:
    # It drops its rights after it has started: another user need not be able to run this Python.
    code = f"""
import os, pwd
from pathlib import Path
from stepwell_server.files.private_files import *
os.setgroups([])
os.setgid({SOMEBODY})
os.setuid({SOMEBODY})
home = Path.cwd()
make_folder(home / "data", ["*"])
replace(home / "data" / "secret", b"x")
require_secret(home / "data" / "secret")
(home / "data").chmod(0o755)
make_folder(home / "data", ["*"])
require_secret(home / "data" / "secret")
require_secret(home / "of_root")
for path in (home / "of_nobody", home / "of_nobody" / "x"):
    try:
        make_folder(path, [])
    except OSError as error:
        print(type(error).__name__, error)
"""
    # Other users may not enter the folder of the run.
    with tempfile.TemporaryDirectory(dir=run_folder().parent) as folder:
        home = Path(folder)
        for name, owner in (("of_nobody", 65_534), ("of_root", 0)):
            (home / name).mkdir(mode=0o700) if owner else (home / name).touch(0o640)
            os.chown(home / name, owner, 0)
        os.chown(home, SOMEBODY, SOMEBODY)
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
            timeout=250,
        )
        assert run.stderr.splitlines() == [
            f"other users could read {home}/data; now only the user of the server can"
        ]
    of_nobody, below = run.stdout.splitlines()
    assert of_nobody.startswith("NotPrivateError")
    assert "and the server runs as user 54321" in of_nobody
    assert below.startswith("PermissionError [Errno 13]")


def test_store_and_cache_refuse_what_others_can_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StoreError, match="must be in a place where no other user can replace it"):
        DiskStore(tmp_path / "data", durability="sync", clock=SystemClock())
    with pytest.raises(OSError, match="must be in a place where no other user can replace it"):
        cache.make(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    tmp_path.chmod(0o700)
    before = os.umask(0)
    try:
        DiskStore(tmp_path / "data", durability="sync", clock=SystemClock()).close()
    finally:
        os.umask(before)
    modes = {mode(path) for path in (tmp_path / "data").rglob("*") if path.is_file()}
    folders = {mode(path) for path in (tmp_path / "data", *(tmp_path / "data").rglob("*")) if path.is_dir()}
    assert (modes, folders) == ({"0600"}, {"0700"})
