"""A backup of a server under load has all that was acknowledged before it began, and a store made of it goes on.

The store is encrypted, and its segments are so small that changes are checkpointed all the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import stepwell
from stepwell.testing import ServerStartError
from stepwell_server.clock import SystemClock
from stepwell_server.core.namespaces import own
from stepwell_server.store import backup, verification
from stepwell_server.store.disk.backup.file import Reader
from stepwell_server.store.encryption.keyring import add_key, read_keys
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.record import decode_header
from support.checks import history
from support.checks.checker import check
from support.checks.history import Call, End, Op
from support.load.driver import MODEL
from support.load.driver_process import DriverProcess
from support.secured import host_and_port
from support.servers.fault_servers import SMALL_BYTES, local, replayed

_NEVER = 10**12
_LIMITED = "import sys; from stepwell.cli import main; main(sys.argv[1:])"


def acknowledged(file: Path) -> dict[str, int]:
    """The last revision that was acknowledged of each session that nobody has tried to close so far."""
    ops = history.load([file])
    found = dict.fromkeys(history.live(ops), 0)
    for op in ops:
        end = op.acknowledged
        if end is not None and end.revision is not None and op.call.session in found:
            found[op.call.session] = max(found[op.call.session], end.revision)
    return found


def in_backup(file: Path, sealer: Sealer) -> dict[str, int]:
    """The revisions of all sessions of a backup."""
    pairs = (entry for entry in Reader(file).entries() if isinstance(entry, tuple))
    return {own(i): decode_header(i, sealer.open(i, record)).revision for i, record in pairs}


@pytest.mark.slow
def test_nothing_that_was_acknowledged_is_missing(tmp_path: Path) -> None:
    keys, data, file = tmp_path / "keys", tmp_path / "data", tmp_path / "history"
    add_key(keys, "k")
    ring, clock = read_keys(keys), SystemClock()
    encrypt = ("--encryption-key-file", str(keys))
    with (
        local(data, *encrypt, segment_bytes=SMALL_BYTES) as server,
        DriverProcess(server.address, file, seed=31) as driver,
    ):
        backups = []
        for number in range(4):
            driver.wait_acknowledged(60)
            before = acknowledged(file)
            done = backup.back_up(data, tmp_path / f"backup{number}", clock)
            backups.append((done.file, before))
            assert done.keys == ["k"]
            assert not verification.verify(data, ring).problems, "beside the server, too"
            if number == 1:
                # one that is killed leaves no backup, and the server does not wait for it
                driver.wait_acknowledged(10)
                arguments = ["store", "backup", str(data), str(tmp_path / "killed"), "--max-rate", "1KB"]
                slow = subprocess.Popen([sys.executable, "-c", _LIMITED, *arguments])
                while not (tmp_path / ".killed.unfinished").exists():
                    assert slow.poll() is None
                driver.wait_acknowledged(20)
                slow.kill()
                slow.wait()
                assert not (tmp_path / "killed").exists()
                server.kill()
                server.restart()
        driver.stop()
    backups.append((backup.back_up(data, tmp_path / "killed", clock).file, acknowledged(file)))
    with pytest.raises(
        ServerStartError,
        match=r"--encryption-key-file: the store in .* is encrypted with key k: give the key file",
    ):
        local(data).start()
    ops = history.load([file])
    closed = {op.call.session for op in ops if op.call.kind == "close"}
    for made, before in backups:
        assert made.stat().st_mode & 0o777 == 0o600
        assert not verification.verify_backup(made, ring).problems
        found = in_backup(made, Sealer(ring))
        missing = {
            i: (r, found.get(i)) for i, r in before.items() if i not in closed and found.get(i, -1) < r
        }
        assert not missing
    # what was restored is what the sessions were at their revisions: each is held against the changes that led there
    for made, _ in backups[2:3]:
        to = tmp_path / f"{made.name}-restored"
        backup.restore(made, to, clock, ring, moved=True)
        with local(to, *encrypt) as server, stepwell.connect(server.address) as client:
            for info in client.sessions():
                state = client.open_session(
                    MODEL, session_id=info.session_id, batch_size=info.batch_size
                ).get_state()
                told = End(
                    outcome="acknowledged",
                    revision=state.revision,
                    position=state.position,
                    states=dict(state),
                )
                ops.append(Op("restored", 0, Call(kind="read", session=info.session_id), [(_NEVER, told)]))
    report = check(ops, replayed()).require_clean()
    assert report.reads > 15


def test_a_store_that_goes_back_takes_nothing_of_what_clients_held(tmp_path: Path) -> None:
    data, to = tmp_path / "data", tmp_path / "restored"
    x = [[0.1, 0.2, 0.3]]
    with local(data) as server, stepwell.connect(server.address) as client:
        session = client.open_session(MODEL, session_id="kept")
        session.step(x)
        state = session.get_state()
        backup.back_up(data, tmp_path / "backup", SystemClock())
        session.step(x)
        later, unnamed = client.open_session(MODEL, session_id="later"), client.open_session(MODEL)
        later.step(x)
        address = server.address
        held = (session, later, unnamed)
        server.kill()
        made = backup.restore(tmp_path / "backup", to, SystemClock(), None, moved=False)
        with local(to, "--listen", host_and_port(address)) as again:
            assert again.address == address
            with pytest.raises(stepwell.RevisionConflictError) as conflict:
                held[0].step(x)
            assert conflict.value.actual == made.first_revision + 1
            with pytest.raises(stepwell.SessionNotFoundError):
                held[1].step(x)
            with pytest.raises(stepwell.SessionLostError):
                held[2].step(x)
            with stepwell.connect(address) as other:
                found = other.open_session(MODEL, session_id="kept").get_state()
                assert (found.revision, found.position) == (made.first_revision + 1, 1)
                assert all((found[name] == array).all() for name, array in state.items())
                # whoever holds the session of before of that name cannot step this one
                assert other.open_session(MODEL, session_id="later").revision == made.first_revision
                with pytest.raises(stepwell.RevisionConflictError):
                    held[1].step(x)
    assert os.listdir(to)
