"""A session that a damaged key hides is known to be missing, and is not restarted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from stepwell_server.errors import SessionNotFound, StateCorrupt
from stepwell_server.store.base import Batch, End, Tombstone
from stepwell_server.store.disk import lmdb as module
from stepwell_server.store.disk.key_sums import PUT_SIZE, Change, KeyCheck
from support.engine.harness import x
from support.samples import examples
from support.stores.disk_store import begin, end, opened_base, put, record
from support.stores.durable import Disk, Troubled

IDS = [f"session-{n:04d}" for n in range(300)]


def change_key(path: Path, session_id: str, places: slice = slice(None)) -> None:
    """Change a bit of a session's key in the data file of a store that is closed, wherever it stands there."""
    file = path / "sessions" / "data.mdb"
    data, key = bytearray(file.read_bytes()), session_id.encode()
    found = [at for at in range(len(data)) if data.startswith(key, at)]
    for at in found[places]:
        data[at + len(key) - 1] ^= 64
    file.write_bytes(data)


def test_what_a_damaged_key_hides_is_missed(tmp_path: Path) -> None:
    store = opened_base(tmp_path)
    begin(store, *IDS)
    end(store, IDS[7])
    assert store.damage == ""
    store.close()
    opened_base(tmp_path).close()
    change_key(tmp_path, IDS[151])
    store = opened_base(tmp_path)
    assert store.get(IDS[151]) is None, "as if it had never been"
    assert store.damage == "keys or pages are corrupt, and 1 of 299 sessions are missing"
    put(store, IDS[151])  # a checkpoint of it makes it no better
    store.close()
    store = opened_base(tmp_path)
    assert "corrupt" in store.damage


def test_a_page_above_the_records_that_leads_elsewhere_is_noticed(tmp_path: Path) -> None:
    """Whoever goes through all keys one after the other meets all of them, and only searching goes wrong."""
    store = opened_base(tmp_path)
    begin(store, *IDS)
    store.close()
    file = tmp_path / "sessions" / "data.mdb"
    data = bytearray(file.read_bytes())
    above = [at for at in range(0, len(data), 4096) if data[at + 10] & 1]  # P_BRANCH of LMDB's mp_flags
    changed = [data.find(IDS[0][:8].encode(), at, at + 4096) for at in above]
    for at in filter(lambda at: at >= 0, changed):
        data[at] = ord("!")  # all that is behind this key is looked for before it
    file.write_bytes(data)
    store = opened_base(tmp_path)
    assert store.count() == len(store.heads(limit=1000)) == len(IDS)
    lost = [i for i in IDS if store.get(i) is None]
    assert lost
    assert store.damage == f"keys or pages are corrupt, and {len(lost)} of {len(IDS)} sessions are missing"


@pytest.mark.parametrize("seed", range(examples(20)))
def test_changes_while_it_looks_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(KeyCheck, "start", lambda _self, _check_keys: None)
    monkeypatch.setattr(module, "BATCH_SIZE", 3)
    store, chance = opened_base(tmp_path), random.Random(seed)
    begin(store, *IDS[:60:2])
    store.close()
    store = opened_base(tmp_path)
    there = set(IDS[:60:2])
    while not store._check_keys():
        for session_id in chance.sample(IDS[:60], 4):
            match chance.randrange(4):
                case 0 if session_id in there:
                    end(store, session_id)
                    there.discard(session_id)
                case 1 | 2:
                    # those that are there and new ones together, one of them twice
                    puts = [(i, record(i)) for i in (session_id, *sorted(there)[:2], session_id)]
                    store.commit(Batch(puts=puts, counts=[("m", session_id not in there)]))
                    there.add(session_id)
                case _:
                    store.commit(
                        Batch(deletes=[session_id], tombstones=[Tombstone(session_id, End.CLOSED, 1.0)])
                    )
                    there.discard(session_id)
    assert store.damage == ""
    assert store.count() == len(there)
    store.close()
    store = opened_base(tmp_path)
    while not store._check_keys():
        pass
    assert store.damage == ""


@pytest.mark.stores("async")
@pytest.mark.parametrize("begin", [0, 300])
def test_no_call_of_lmdb_puts_many_records(begin: int) -> None:
    stored: dict[bytes, bytes] = {} if begin else dict.fromkeys(map(str.encode, IDS), b"")
    sizes: list[int] = []

    def putmulti(items: Sequence[tuple[bytes, bytes]], *, overwrite: bool) -> None:
        assert overwrite is not bool(begin)
        sizes.append(len(items))
        stored.update(items)

    cursor = SimpleNamespace(putmulti=putmulti)
    transaction = SimpleNamespace(cursor=lambda _: cursor, stat=lambda _: {"entries": len(stored)})
    change = Change()
    change.put(transaction, None, [(name.encode(), b"1") for name in IDS], begin)
    assert set(stored.values()) == {b"1"}
    assert len(change.added) == begin
    assert max(sizes) == PUT_SIZE, "each call holds Python's lock"


async def test_while_sessions_are_missing_none_is_begun_in_their_place(disk: Disk) -> None:
    async with disk.engine() as at:
        await at.open("here", "hidden", "closed")
        for session_id in ("here", "hidden"):
            await at.step(session_id, x(1))
        await at.engine.close_session("closed")
    path = disk.store.store.path
    disk.close()
    change_key(path, "hidden")
    disk.store = Troubled(disk._opened(path))
    async with disk.engine() as at:
        assert (await at.step("here", x(1))).revision == 2
        # before: NOT_FOUND, and a session at revision 0
        for call in (
            at.engine.session_info("hidden"),
            at.open("hidden"),
            at.open("new"),
            at.step("hidden", x(1)),
        ):
            with pytest.raises(
                StateCorrupt, match=r"is not in the store, which has lost sessions: keys are corrupt"
            ):
                await call
        with pytest.raises(StateCorrupt):
            await at.engine.open_sessions("plain", session_ids=["n1", "n2"])
        with pytest.raises(StateCorrupt):
            await at.engine.fork("here", new_session_id="n1")
        with pytest.raises(SessionNotFound, match="was closed"):
            await at.engine.session_info("closed")
        await at.open("closed")
        assert (await at.engine.open_session("plain")).session.revision == 0
        assert len((await at.engine.open_sessions("plain", count=3)).session_ids) == 3
