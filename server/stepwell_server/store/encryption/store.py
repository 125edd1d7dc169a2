"""A wrapper around a local store that encrypts records when writing and decrypts them when reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from typing_extensions import override

from stepwell_server.store.base import (
    Batch,
    LocalStore,
    LogWrite,
    LogWriter,
    Parts,
    StoreHealth,
    Tombstone,
)
from stepwell_server.store.encryption.sealer import Sealer
from stepwell_server.store.heads import Heads
from stepwell_server.store.record import RecordBytes


class EncryptedStore(LocalStore):
    """The inner store never sees a plain state. Lists need no key: they use the unencrypted parts of records (`sealer`).

    Documents contain no states and are not encrypted.
    """

    def __init__(self, local: LocalStore, sealer: Sealer) -> None:
        self._local = local
        self._sealer = sealer
        self.for_one_thread = local.for_one_thread
        self.waits_for_disk = local.waits_for_disk
        self.secret = local.secret
        self.incarnation = local.incarnation
        self.first_revision = local.first_revision

    @property
    @override
    def damage(self) -> str:
        return self._local.damage

    @override
    def commit(self, batch: Batch) -> None:
        sealed = dataclasses.replace(batch, puts=self._sealer.seal(batch.puts)) if batch.puts else batch
        self._local.commit(sealed)

    @override
    @property
    def has_log(self) -> bool:  # type: ignore[override]
        return self._local.has_log

    @override
    @property
    def behind(self) -> int:  # type: ignore[override]
        return self._local.behind

    @override
    def append(self, puts: Sequence[tuple[str, RecordBytes]]) -> bool:
        return self._local.has_log and self._local.append(self._sealer.seal(puts))

    @override
    def sealed(self, puts: Sequence[tuple[str, RecordBytes]]) -> Sequence[tuple[str, RecordBytes]]:
        return self._sealer.seal(puts)

    @override
    def begin_append(self, parts: Parts, after: LogWrite | None = None) -> LogWrite | None:
        return self._local.begin_append(parts, after)

    @override
    def withdraw_append(self, write: LogWrite) -> None:
        self._local.withdraw_append(write)

    @override
    def end_append(self, write: LogWrite, error: Exception | None, seconds: float) -> bool:
        return self._local.end_append(write, error, seconds)

    @override
    def new_writer(self, on_end: Callable[[], None]) -> LogWriter:
        return self._local.new_writer(on_end)

    @property
    @override
    def needs_checkpoint(self) -> bool:
        return self._local.needs_checkpoint

    @override
    def checkpoint(self, *, briefly: bool = False) -> None:
        self._local.checkpoint(briefly=briefly)

    @override
    def get(self, session_id: str) -> RecordBytes | None:
        record = self._local.get(session_id)
        return None if record is None else self._sealer.open(session_id, record)

    @override
    def get_many(self, session_ids: Sequence[str]) -> list[RecordBytes | None]:
        opened = self._sealer.opened_or_as_is
        found = zip(session_ids, self._local.get_many(session_ids), strict=True)
        return [None if record is None else opened(session_id, record) for session_id, record in found]

    @override
    def heads(self, *, after: str = "", prefix: str = "", limit: int) -> Heads:
        return self._local.heads(after=after, prefix=prefix, limit=limit)

    @override
    def count(self) -> int:
        return self._local.count()

    @override
    def count_of(self, model: str) -> int:
        return self._local.count_of(model)

    @override
    def tombstones(self, session_ids: Sequence[str]) -> list[Tombstone | None]:
        return self._local.tombstones(session_ids)

    @override
    def documents(self, prefix: str = "") -> dict[str, bytes]:
        return self._local.documents(prefix)

    @override
    def announce(self, listen: str) -> None:
        self._local.announce(listen)

    @override
    def check(self) -> StoreHealth:
        return self._local.check()

    @override
    def close(self) -> None:
        self._local.close()
