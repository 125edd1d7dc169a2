"""Backups of a real Valkey beside its servers, stores made of them, and what is found in one that lost something."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stepwell
from stepwell.cli import main
from stepwell_server.store import shared_backup as upkeep
from stepwell_server.store.base import Batch, End, KeyFileError, StoreError, Tombstone
from stepwell_server.store.encryption.keyring import Keyring, add_key
from stepwell_server.store.valkey.bulk import BulkStore
from stepwell_server.store.valkey.connection import url as urls
from stepwell_server.store.valkey.connection.url import StoreUrl
from support.clock import ManualClock
from support.secured import Server
from support.servers.replica_processes import Replicas
from support.servers.server_process import FEATURES, forecast
from support.servers.valkey_servers import Cluster, Valkey
from support.stores.disk_store import record
from support.stores.records import scan
from support.stores.valkey_store import end, fresh_prefix, opened, put

X = np.random.default_rng(5).standard_normal((1, FEATURES)).astype(np.float32)
CLOCK = ManualClock(now=1.8e9)
RING = Keyring({"new": b"n" * 32, "old": b"o" * 32})
IDS = ["a", "acme\x1fa", "acme\x1fb", *(f"s{n}" for n in range(40))]


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


def place(valkey: Valkey, rest: str = "") -> StoreUrl:
    return urls.parse(valkey.url(f"?prefix={fresh_prefix()}{rest}"), {})


async def filled(url: StoreUrl, keyring: Keyring | None = None) -> None:
    """A store of some sessions at revision 2, a document, and one session that has ended."""
    store = await opened(str(url), keyring=keyring)
    _, stamp = await put(
        store, [(i, record(i, 1, batch_size=2)) for i in [*IDS, "gone"]], [0] * (len(IDS) + 1)
    )
    await put(store, [(i, record(i, 2, batch_size=2)) for i in IDS], [stamp] * len(IDS))
    await end(store, [Tombstone("gone", End.CLOSED, 5.0)], [stamp])
    await store.apply(Batch(documents=[("models/m", b"{}")]))
    await store.close()


async def content(url: StoreUrl, keyring: Keyring | None = None) -> dict[str, int]:
    """The revisions of a store's sessions."""
    store = await opened(str(url), keyring=keyring)
    try:
        found = await scan(store, limit=1000)
        (document,) = (await store.documents()).values()
        assert document == b"{}"
        assert await store.count_of("m") == len(IDS)
        return {name: header.revision for name, header in found if header is not None}
    finally:
        await store.close()


def run(what: Any, *arguments: Any, **options: Any) -> Any:
    """On a thread of its own: a test's event loop runs here."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(what(*arguments, **options))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("is_moved", [True, False])
async def test_a_backup_becomes_the_same_store_or_one_ahead(
    valkey: Valkey, tmp_path: Path, is_moved: bool
) -> None:
    was, new = place(valkey), place(valkey, "&partitions=8")
    await filled(was)
    done = run(upkeep.back_up, was, tmp_path / "backup", CLOCK)
    assert (done.sessions, done.documents, done.damaged, done.keys) == (len(IDS), 1, 0, [])
    made = run(upkeep.restore, tmp_path / "backup", new, CLOCK, None, moved=is_moved)
    ahead = 0 if is_moved else made.first_revision
    assert (made.sessions, made.documents, made.damaged) == (len(IDS), 1, 0)
    assert is_moved or ahead > 10**12
    assert await content(new) == dict.fromkeys(IDS, 2 + ahead)
    assert await content(was) == dict.fromkeys(IDS, 2)
    stores = [await opened(str(each)) for each in (was, new)]
    assert (stores[0].incarnation == stores[1].incarnation) is is_moved
    assert stores[1].first_revision == made.first_revision
    for store in stores:
        await store.close()
    for each in (was, new):
        found = run(upkeep.verify, each, None, CLOCK)
        assert (found.problems, found.sessions, found.models["m"]) == ([], len(IDS), len(IDS))
    with pytest.raises(StoreError, match=r"there must be no store at .* yet; there is one"):
        run(upkeep.restore, tmp_path / "backup", was, CLOCK, None, moved=True)
    with pytest.raises(StoreError, match=r"there is no store at .*: no server has ever used it"):
        run(upkeep.back_up, place(valkey), tmp_path / "none", CLOCK)
    assert not (tmp_path / "none").exists()


async def test_what_is_encrypted_stays_so(valkey: Valkey, tmp_path: Path) -> None:
    was, new = place(valkey), place(valkey)
    old = Keyring({"old": b"o" * 32})
    await filled(was, old)
    done = run(upkeep.back_up, was, tmp_path / "backup", CLOCK)
    assert done.keys == ["old"]
    with pytest.raises(KeyFileError, match="is encrypted with old, and a restore changes its revisions"):
        run(upkeep.restore, tmp_path / "backup", new, CLOCK, None, moved=False)
    run(upkeep.restore, tmp_path / "backup", new, CLOCK, RING, moved=True)
    found = run(upkeep.verify, new, RING, CLOCK)
    assert (found.problems, dict(found.encrypted), found.opened) == ([], {"new": len(IDS)}, len(IDS))
    assert await content(new, RING) == dict.fromkeys(IDS, 2)
    with pytest.raises(KeyFileError, match="it lacks new"):
        run(upkeep.verify, new, old, CLOCK)
    assert not run(upkeep.verify, new, None, CLOCK).opened


async def test_a_store_that_lost_something_is_not_backed_up_as_if_it_had_not(
    valkey: Valkey, tmp_path: Path
) -> None:
    url = place(valkey)
    await filled(url)
    with valkey.connect() as connection:
        keys = {key.rpartition(b"s:")[2]: key for key in connection.ask("KEYS", f"{url.prefix}*s:*")}
        connection.ask("DEL", keys[b"s1"])
        connection.ask("SETRANGE", keys[b"s2"], 60, b"damage")
        connection.ask("HINCRBY", keys[b"s3"].rpartition(b"s:s3")[0] + b"counts", "m", 5)
    found = run(upkeep.verify, url, None, CLOCK)
    assert (found.unreachable, found.damaged) == (["s1"], ["s2"])
    assert len(found.problems) == 3
    assert "1 sessions have corrupt records" in found.problems
    assert "1 sessions have no record: their keys were deleted or evicted" in found.problems
    assert any("the counts of sessions in partition" in problem for problem in found.problems)
    with pytest.raises(StoreError, match="1 are missing, 's1' among them"):
        run(upkeep.back_up, url, tmp_path / "backup", CLOCK)
    assert not (tmp_path / "backup").exists()


async def test_a_restore_that_is_broken_off_leaves_nothing_and_no_server_takes_a_half(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was, new = place(valkey), place(valkey)
    await filled(was)
    run(upkeep.back_up, was, tmp_path / "backup", CLOCK)
    monkeypatch.setattr(upkeep, "_MAX_BATCH_SIZE", 10)
    put_in, seen = BulkStore.put, list[str]()

    async def put(self: BulkStore, part: Any) -> None:
        await put_in(self, part)
        if len(seen) == 2:
            raise KeyboardInterrupt
        with pytest.raises(StoreError, match="must be completely restored") as refused:
            await opened(str(new))
        seen.append(str(refused.value))

    monkeypatch.setattr(BulkStore, "put", put)
    with pytest.raises(KeyboardInterrupt):
        run(upkeep.restore, tmp_path / "backup", new, CLOCK, None, moved=True)
    with valkey.connect() as connection:
        assert connection.ask("KEYS", f"{new.prefix}*") == []
    monkeypatch.setattr(BulkStore, "put", put_in)
    run(upkeep.restore, tmp_path / "backup", new, CLOCK, None, moved=True)
    assert await content(new) == dict.fromkeys(IDS, 2)


@pytest.mark.slow
async def test_a_cluster_is_backed_up_and_made(tmp_path: Path) -> None:
    with Cluster() as cluster:
        was, new = (urls.parse(cluster.url(f"&prefix={fresh_prefix()}"), {}) for _ in range(2))
        await filled(was)
        run(upkeep.back_up, was, tmp_path / "backup", CLOCK)
        run(upkeep.restore, tmp_path / "backup", new, CLOCK, None, moved=True)
        assert await content(new) == dict.fromkeys(IDS, 2)
        assert not run(upkeep.verify, new, None, CLOCK).problems


def stepwell_store(*arguments: object) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("stepwell")), "store", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_sessions_go_from_replicas_to_a_disk_and_back(valkey: Valkey, tmp_path: Path) -> None:
    """By the commands, with servers that are stepped meanwhile; states and versions are the same everywhere."""
    keys = tmp_path / "keys"
    add_key(keys, "k")
    url, later = place(valkey), place(valkey)
    options = ("--durability", "async", "--encryption-key-file", str(keys))
    with Replicas(str(url), 2, *options) as replicas, stepwell.connect(replicas.address) as client:
        group = client.open_sessions("forecast", 30, session_ids=[f"u{n}" for n in range(30)])
        wanted = [group.step(np.repeat(X, 30, axis=0)) for _ in range(4)]
        ended = threading.Event()

        def work() -> None:
            with client.open_session("forecast", session_id="busy") as session:
                while not ended.is_set():
                    session.step(X)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            done = stepwell_store("backup", url, tmp_path / "backup")
            assert not stepwell_store("verify", url, "--encryption-key-file", keys)["problems"]
        finally:
            ended.set()
            thread.join()
        assert done["keys"] == ["k"]
    made = stepwell_store("restore", tmp_path / "backup", tmp_path / "data", "--encryption-key-file", keys)
    assert made["sessions"] in {30, 31}
    model = {"forecast": forecast().path}
    more = ["--encryption-key-file", str(keys)]
    with (
        Server(model, tmp_path / "data", more, cache_dir=forecast().cache_dir) as server,
        stepwell.connect(server.address) as client,
    ):
        sessions = [client.open_session("forecast", session_id=f"u{n}") for n in range(30)]
        found = np.concatenate([session.step(X) for session in sessions])
        assert {session.position for session in sessions} == {5}
    stepwell_store("backup", tmp_path / "data", tmp_path / "back")
    stepwell_store("restore", tmp_path / "back", later, "--moved", "--encryption-key-file", keys)
    with Replicas(str(later), 2, *options) as replicas, stepwell.connect(replicas.address) as client:
        sessions = [client.open_session("forecast", session_id=f"u{n}") for n in range(30)]
        again = np.concatenate([session.step(X) for session in sessions])
        assert {session.position for session in sessions} == {6}
    assert not np.array_equal(wanted[-1], found)
    assert not np.array_equal(found, again)


def test_doctor_looks_at_a_store_that_it_is_told(valkey: Valkey) -> None:
    url = place(valkey)
    doctor = CliRunner().invoke(main, ["doctor", "--store", str(url), "--json"])
    found = json.loads(doctor.stdout)
    assert found["store"]["kind"] == "valkey"
    assert (found["store"]["exists"], found["store"]["servers"]) == (False, valkey.address)
    assert not [one for one in found["wrong"] if "--store" in one["what"]]
    doctor = CliRunner().invoke(
        main, ["doctor", "--store", "valkey://127.0.0.1:1/0?timeout_ms=200", "--json"]
    )
    assert doctor.exit_code == 1
    assert [one for one in json.loads(doctor.stdout)["wrong"] if "127.0.0.1:1" in one["what"]]


@pytest.mark.slow
def test_encryption_begins_in_a_rolling_restart(valkey: Valkey, tmp_path: Path) -> None:
    """As docs/operate/scale-out.md says, while sessions are stepped: no call fails, and nothing is plain of what is written then."""
    keys, url = tmp_path / "keys", place(valkey)
    add_key(keys, "k", is_last=True)
    failed: list[BaseException] = []
    with (
        Replicas(str(url), 2, "--durability", "async", "--encryption-key-file", str(keys)) as replicas,
        stepwell.connect(replicas.address) as client,
    ):
        group = client.open_sessions("forecast", 20)
        ended, stepped = threading.Event(), threading.Semaphore(0)

        def work() -> None:
            try:
                while not ended.is_set():
                    group.step(np.repeat(X, 20, axis=0))
                    stepped.release()
            except BaseException as error:
                failed.append(error)
                stepped.release(2)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert not stepwell_store("verify", url)["encrypted"]
            keys.write_text(keys.read_text().removeprefix("none\n"))
            for replica in replicas:
                replica.stop()
                replica.start()
            while stepped.acquire(blocking=False):
                pass
            for _ in range(2):  # each session has changed since
                assert stepped.acquire(timeout=100)
            assert stepwell_store("verify", url, "--encryption-key-file", keys)["encrypted"] == {"k": 20}
        finally:
            ended.set()
            thread.join()
        assert not failed
