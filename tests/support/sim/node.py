"""A model of one Valkey primary with its replica, which runs the store's own scripts: slots, a log, what survives a fail-over.

It does at once what a request says when the request arrives. What it has done is durable some time later; in `sync` a
client waits for that (WAITAOF). A fail-over takes the last writes back: any of those that are not durable, but nothing of
a slot from before a key of it moved, or it was another node's: MIGRATE and SETSLOT wait for replicas here. Slots move to
other nodes key by key, as Valkey's documentation of Clusters says: what is not there any more is asked for at the other
node (ASK), requests for several keys some of which have gone are to be sent again (TRYAGAIN), and at the end the slot is
another node's (MOVED).
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

from stepwell_server.errors import StateCorrupt
from stepwell_server.store.base import End
from stepwell_server.store.record import decode_header
from stepwell_server.store.valkey.connection.client import Command, ErrorReply, Reply, slot_of
from stepwell_server.store.valkey.keys import HEAD, RECORD, TOMBSTONE, unpack_tombstone
from support.checks.register import Life, Rollback
from support.sim.keyspace import Kept, Keyspace
from support.sim.lua import Scripts, word_of
from support.sim.world import World

_TAG = re.compile(rb"\{(.*?)\}")
_SESSION = re.compile(rb".*?\}s:(.*)", re.DOTALL)
_EPOCH_MS = 1_700_000_000_000
#: Commands that have no keys.
_KEYLESS = frozenset({b"PUBLISH", b"TIME"})


@dataclasses.dataclass(frozen=True, slots=True)
class Birth:
    """A session came to be, or is not there any more."""

    at_s: float
    session: str
    by: int
    """1 or -1."""
    whose: str
    """The life of the replica that had it done; empty: a fail-over."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Written:
    """That a key was written."""

    at_s: float
    by: int
    """The number of the command, or script."""
    key: bytes
    """Empty: it is another node's now."""
    before: Kept


@dataclasses.dataclass(slots=True)
class _Wait:
    """Somebody waits until all before an offset is durable."""

    offset: int
    tell: Callable[[bool], None]


class ModelNode:
    """See the module."""

    def __init__(
        self,
        world: World,
        number: int,
        *,
        must_sync: bool,
        flush_s: float,
        scripts: Scripts,
        waits: bool = True,
    ) -> None:
        """`waits` False is a bug to be found: it reports everything as written to disk."""
        self.world = world
        self.number = number
        self.name = f"shard-{number}"
        self.address = (self.name, 6379)
        self.must_sync = must_sync
        self.flush_s = flush_s
        self.is_down = False
        self.generation = 0
        """Of primaries: requests to an earlier one are never answered."""
        self.owners: dict[bytes, ModelNode] = {}
        """The owner of each tag, as this node knows it."""
        self.epochs: dict[bytes, int] = collections.defaultdict(int)
        """Of what it knows: the highest is right."""
        self.migrating: dict[bytes, ModelNode] = {}
        """Tags whose keys are on their way to another node."""
        self.importing: set[bytes] = set()
        self.rollbacks: list[Rollback] = []
        self.births: list[Birth] = []
        self._scripts = scripts
        self._waits = waits
        self._keys = Keyspace(self._now_ms, self._wrote)
        self._log: list[_Written] = []
        self._commands = 0
        self._durable = 0
        self._is_flushing = False
        self._waiting: list[_Wait] = []
        self._whose = ""

    def has_from_the_beginning(self, key: bytes, value: bytes) -> None:
        """A value that no fail-over takes back."""
        self._keys.put_back(key, (value, float("inf")))

    @property
    def offset(self) -> int:
        """How much was written so far."""
        return len(self._log)

    def session(self, session_id: str) -> bytes | None:
        """What is under the key of a session, for who looks from outside."""
        for key in self._keys.all():
            found = _SESSION.fullmatch(key)
            if found is not None and found[1].decode() == session_id:
                kept = self._keys.kept(key)
                assert kept is not None
                assert isinstance(kept[0], bytes)
                return kept[0]
        return None

    def live(self) -> dict[str, int]:
        """Sessions that are there, with their rows."""
        found = {}
        for key in self._keys.all():
            name, kept = _SESSION.fullmatch(key), self._keys.kept(key)
            if name is not None and kept is not None and _life(name[1].decode(), kept) == "live":
                value = kept[0]
                assert isinstance(value, bytes)
                found[name[1].decode()] = decode_header(name[1].decode(), value[HEAD.size :]).batch_size
        return found

    def _now_ms(self) -> int:
        return _EPOCH_MS + int(self.world.now * 1000)

    # ------------------------------------------------------------------------------------------------------- requests

    def do(self, commands: Sequence[Command], whose: str, tell: Callable[[list[Reply]], None]) -> None:
        """Do commands of one exchange, one after the other, and tell the answers, if at the end is WAITAOF when it says so."""
        words = [[word_of(word) for word in command] for command in commands]
        waits = words[-1][0] == b"WAITAOF"
        before, replies, is_asking = self.offset, [], False
        self._whose = whose
        for command in words[:-1] if waits else words:
            if command[0] == b"ASKING":
                replies.append(b"OK")
                is_asking = True
                continue
            replies.append(self._do(command, is_asking=is_asking))
            is_asking = False
        if not waits:
            tell(replies)
            return
        here, replicas, limit_ms = map(int, words[-1][1:])
        if self.offset == before or not self._waits:  # of a connection that wrote nothing: at once
            tell([*replies, [here, replicas]])
            return

        def told(is_durable: bool) -> None:
            if wait in self._waiting:
                self._waiting.remove(wait)
                tell([*replies, [here, replicas] if is_durable else [0, 0]])

        wait = _Wait(self.offset, told)
        self._waiting.append(wait)
        self.world.after(limit_ms / 1000, told, False)
        if self.offset <= self._durable:
            told(True)

    def _do(self, words: Sequence[bytes], *, is_asking: bool) -> Reply:
        self._commands += 1
        command = words[0]
        if command == b"CLUSTER":
            return [
                [slot_of(tag), slot_of(tag), [node.name.encode(), node.address[1]]]
                for tag, node in sorted(self.owners.items())
            ]
        if command == b"EVALSHA":
            count = int(words[2])
            keys, arguments = words[3 : 3 + count], words[3 + count :]
            refused = self._refusal(keys, is_asking=is_asking)
            if refused is not None:
                return refused
            return self._scripts.run(words[1], self._keys.call, keys, arguments)
        refused = None if command in _KEYLESS else self._refusal([words[1]], is_asking=is_asking)
        return self._keys.call(*words) if refused is None else refused

    def _refusal(self, keys: Sequence[bytes], *, is_asking: bool) -> ErrorReply | None:
        """As `getNodeByQuery` of Valkey decides."""
        tags = {_tag(key) for key in keys}
        assert len(tags) == 1 or len(self.owners) == 0, "keys of a request must be of one slot"
        if not self.owners:
            return None
        (tag,) = tags
        missing = sum(self._keys.kept(key) is None for key in keys)
        owner = self.owners[tag]
        if owner is not self:
            if tag in self.importing and is_asking:
                return (
                    ErrorReply.of("TRYAGAIN some keys are on their way")
                    if len(keys) > 1 and missing
                    else None
                )
            return ErrorReply.of(f"MOVED {slot_of(tag)} {owner.name}:{owner.address[1]}")
        target = self.migrating.get(tag)
        if target is None or not missing:
            return None
        if missing < len(keys):
            return ErrorReply.of("TRYAGAIN some keys are on their way")
        return ErrorReply.of(f"ASK {slot_of(tag)} {target.name}:{target.address[1]}")

    def _wrote(self, key: bytes, before: Kept) -> None:
        self._log.append(_Written(self.world.now, self._commands, key, before))
        self._note_birth(key, before, self._whose)
        if self.must_sync and not self._is_flushing:
            self._is_flushing = True
            self._flush_soon()

    def _note_birth(self, key: bytes, before: Kept, whose: str) -> None:
        found = _SESSION.fullmatch(key)
        if found is None:
            return
        was, is_there = _is_record(before), _is_record(self._keys.kept(key))
        if was != is_there:
            self.births.append(Birth(self.world.now, found[1].decode(), is_there - was, whose))

    # ---------------------------------------------------------------------------------------------------------- moves

    def begin_move(self, tag: bytes, target: ModelNode) -> None:
        """From now on keys of a tag may go to another node."""
        self.migrating[tag] = target
        target.importing.add(tag)

    def move_some(self, tag: bytes) -> bool:
        """Move one key, as MIGRATE does; False if there is none left."""
        target = self.migrating[tag]
        keys = [key for key in self._keys.all() if _tag(key) == tag]
        if not keys:
            return False
        key = self.world.random.choice(keys)
        target._keys.put_back(key, self._keys.kept(key))
        self._keys.put_back(key, None)
        self._keep_all_of(tag)
        return True

    def end_move(self, tag: bytes) -> None:
        """The slot is the other node's: both know it, and their replicas."""
        target = self.migrating.pop(tag)
        self._keep_all_of(tag)
        target.importing.discard(tag)
        target.owners[tag] = self.owners[tag] = target
        self.epochs[tag] = target.epochs[tag] = max(self.epochs[tag], target.epochs[tag]) + 1

    def _keep_all_of(self, tag: bytes) -> None:
        """No fail-over takes back what was written of a tag so far: deletions neither, nor some keys of a script alone."""
        self._log = [
            dataclasses.replace(each, key=b"") if each.key and _tag(each.key) == tag else each
            for each in self._log
        ]

    def hear_of(self, tag: bytes, other: ModelNode) -> None:
        """Another node says what it knows of a tag."""
        if other.epochs[tag] > self.epochs[tag]:
            self.owners[tag], self.epochs[tag] = other.owners[tag], other.epochs[tag]

    # ----------------------------------------------------------------------------------------------------- durability

    def _flush_soon(self) -> None:
        after_s = self.world.random.expovariate(1 / self.flush_s)
        self.world.after(after_s, self._flush, self.offset, self.generation)

    def _flush(self, offset: int, generation: int) -> None:
        if generation != self.generation:
            return
        self._durable = max(self._durable, offset)
        for wait in [wait for wait in self._waiting if wait.offset <= self._durable]:
            wait.tell(True)
        self._is_flushing = self._durable < self.offset
        if self._is_flushing:
            self._flush_soon()

    def fail_over(self, most_s: float) -> None:
        """The replica takes over, without some of the last writes: none that are durable, none older than `most_s`."""
        oldest = self.world.now - most_s
        recent = next((n for n, each in enumerate(self._log) if each.at_s >= oldest), self.offset)
        cut = self.world.random.randint(max(self._durable, recent), self.offset)
        while 0 < cut < self.offset and self._log[cut - 1].by == self._log[cut].by:
            cut += 1  # all of a script, or nothing of it
        self._take_back(cut)
        self.generation += 1
        self._durable = min(self._durable, cut)
        self._waiting = []
        self._is_flushing = self.must_sync and self._durable < self.offset
        if self._is_flushing:
            self._flush_soon()

    def _take_back(self, cut: int) -> None:
        writes: dict[str, set[int]] = {}
        for each in reversed(self._log[cut:]):
            key, before = each.key, each.before
            if not key:
                continue
            now = self._keys.kept(key)
            self._keys.put_back(key, before)
            self._note_birth(key, now, "")
            found = _SESSION.fullmatch(key)
            if found is not None and _content(now) != _content(before):
                writes.setdefault(found[1].decode(), set()).add(each.by)
        lost = {session: self.session(session) for session in writes}
        del self._log[cut:]
        for session, value in lost.items():
            life = _life(session, None if value is None else (value, 0.0))
            revision = 0 if value is None or life != "live" else _revision(session, value)
            count = len(writes[session])
            self.rollbacks.append(Rollback(self.world.moment(), session, count, life, revision))
            self.world.note("lost", session, count, life, revision)


def said(command: Command) -> str:
    """A command for people who read a trace: what is drawn at random is left out."""
    words = [word_of(word) for word in command]
    if words[0] != b"EVALSHA":
        return words[0].decode()
    keys = words[3 : 3 + int(words[2])]
    sessions = [found[1].decode() for found in map(_SESSION.fullmatch, keys) if found is not None]
    name = Scripts.name(words[1])
    letters = words[3 + len(keys)].decode() if name == "COMMIT" else ""
    return " ".join([name + letters, *sessions])


def _tag(key: bytes) -> bytes:
    found = _TAG.search(key)
    assert found is not None, key
    return found[1]


def _head(kept: Kept) -> bytes:
    return kept[0][: HEAD.size] if kept is not None and isinstance(kept[0], bytes) else b""


def _is_record(kept: Kept) -> bool:
    return _head(kept)[:1] == bytes([RECORD])


def _content(kept: Kept) -> bytes:
    """What tells two changes of a session apart: another stamp alone is none."""
    return b"" if kept is None or not isinstance(kept[0], bytes) else kept[0][:1] + kept[0][HEAD.size :]


def _life(session: str, kept: Kept) -> Life:
    if kept is None:
        return "absent"
    assert isinstance(kept[0], bytes)
    kind, _, _ = HEAD.unpack_from(kept[0])
    if kind == TOMBSTONE:
        stone = unpack_tombstone(session, kept[0][HEAD.size :])
        return "closed" if stone.end is End.CLOSED else "expired"
    return "live"


def _revision(session: str, value: bytes) -> int:
    try:
        return decode_header(session, value[HEAD.size :]).revision
    except StateCorrupt:
        return 0
