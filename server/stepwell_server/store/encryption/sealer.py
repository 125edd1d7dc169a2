"""Encrypts the states in records: rows and extra, in place.

    header | fingerprint | model | rows, extra: encrypted | seal | other fields

The seal is the extension field `record.SEAL`: nonce, tag, id of the key. Everything else stays readable, for lists
and for checks without a key: the ids of session and model, revision, position, times, lengths. It is authenticated: the
associated data are the header without its checksum, texts, other fields and the session id. So a state cannot be moved
to another session or revision.

The checksum covers the encrypted record. Records that are not encrypted stay readable.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stepwell_server.errors import StateCorrupt
from stepwell_server.store.encryption.keyring import Keyring
from stepwell_server.store.encryption.xaes import (
    NONCE_BYTES,
    NONCE_REST_BYTES,
    TAG_BYTES,
    random_nonces,
    rest_of,
)
from stepwell_server.store.fields import KEY_ID_AT, SEAL
from stepwell_server.store.record import (
    HEADER,
    U8,
    JoinedPuts,
    Puts,
    RecordBytes,
    checksums_of,
    fields_at,
    head_with,
    is_change,
    is_sound,
    key_id_of,
    records_of,
    seal_end,
    state_at,
    value_of,
    with_checksum,
)

_HEAD = struct.Struct("<HH")
_CHECKSUM_BYTES = 4
assert KEY_ID_AT == NONCE_BYTES + TAG_BYTES


class Sealer:
    """Encrypts records with the first key of a keyring, if it encrypts, and decrypts with all keys. Thread-safe."""

    def __init__(self, keyring: Keyring) -> None:
        self._keys = keyring.keys
        self._key_id = keyring.first.encode()
        self._key = keyring.keys.get(keyring.first)
        value_bytes = KEY_ID_AT + len(self._key_id)
        self._seal_head = _HEAD.pack(SEAL, value_bytes)
        self._seal_bytes = len(self._seal_head) + value_bytes

    def seal(self, puts: Sequence[tuple[str, RecordBytes]]) -> Sequence[tuple[str, RecordBytes]]:
        """Encrypt records, none of which may be encrypted already. Without an encrypting key, return them unchanged."""
        if self._key is None:
            return puts
        nonces = random_nonces(len(puts))
        cipher = self._key.derive(nonces[:1].tobytes())
        if not isinstance(puts, JoinedPuts):
            return self._part(puts, cipher, nonces)
        sealed, at = [], 0
        for part in puts.parts:
            if len(part):
                sealed.append(self._part(part, cipher, nonces[at : at + len(part)]))
                at += len(part)
        return JoinedPuts(sealed)

    def knows(self, key_id: str) -> bool:
        """Whether the keyring has this key."""
        return key_id in self._keys

    def open(self, session_id: str, record: RecordBytes) -> RecordBytes:
        """Decrypt a record; one that is not encrypted is returned unchanged.

        Raises:
            StateCorrupt: the record is corrupt or was modified, or its key is missing.
        """
        found = self.opened_or_as_is(session_id, record)
        for each in records_of(found):
            if key_id_of(each) is not None:
                raise self._refused(session_id, each)
        return found

    def opened_or_as_is(self, session_id: str, record: RecordBytes) -> RecordBytes:
        """As `open`, but return a record that cannot be decrypted unchanged: decoding it raises `StateCorrupt`."""
        if is_change(record):
            return value_of([self._opened_or_as_is(session_id, each) for each in records_of(record)])
        return self._opened_or_as_is(session_id, record)

    def _opened_or_as_is(self, session_id: str, record: RecordBytes) -> RecordBytes:
        key_id = key_id_of(record)
        if key_id is None or not is_sound(session_id, record) or key_id not in self._keys:
            return record
        view = memoryview(record)
        start, seal = state_at(view), fields_at(view)
        value, rest = view[seal + _HEAD.size :], seal_end(view)
        nonce, tag = bytes(value[:NONCE_BYTES]), value[NONCE_BYTES:KEY_ID_AT]
        known = b"".join((view[_CHECKSUM_BYTES:start], view[rest:], session_id.encode()))
        try:
            state = (
                self._keys[key_id]
                .derive(nonce)
                .decrypt(rest_of(nonce), b"".join((view[start:seal], tag)), known)
            )
        except InvalidTag:
            return record
        return with_checksum(
            session_id, b"".join((head_with(view[:start], len(view) - rest), state, view[rest:]))
        )

    def _refused(self, session_id: str, record: RecordBytes) -> StateCorrupt:
        rule = f"the stored record of session {session_id!r} must be intact"
        key_id = key_id_of(record)
        if not is_sound(session_id, record):
            problem = "its checksum does not match"
        elif key_id not in self._keys:
            problem = f"it is encrypted with key {key_id!r}, which the key file lacks"
        else:
            problem = f"key {key_id!r} does not decrypt it: it was changed, or encrypted with another key"
        return StateCorrupt(f"{rule}: {problem}", session_id=session_id)

    def _part(
        self, puts: Sequence[tuple[str, RecordBytes]], cipher: AESGCM, nonces: U8
    ) -> Sequence[tuple[str, RecordBytes]]:
        if isinstance(puts, Puts) and len(puts) > 1 and len(set(puts.sizes)) == 1:
            return self._laid_out(puts, cipher, nonces)
        sealed = zip(puts, _rows(nonces), strict=True)
        return [(i, self._one(i, record, cipher, nonce)) for (i, record), nonce in sealed]

    def _one(self, session_id: str, record: RecordBytes, cipher: AESGCM, nonce: bytes) -> bytes:
        view = memoryview(record)
        start, end = state_at(view), fields_at(view)
        fields = view[end:]
        head = head_with(view[:start], self._seal_bytes + len(fields))
        known = b"".join((head[_CHECKSUM_BYTES:], fields, session_id.encode()))
        both = memoryview(cipher.encrypt(rest_of(nonce), view[start:end], known))
        state, tag = both[:-TAG_BYTES], both[-TAG_BYTES:]
        return with_checksum(
            session_id, b"".join((head, state, self._seal_head, nonce, tag, self._key_id, fields))
        )

    def _laid_out(self, puts: Puts, cipher: AESGCM, nonces: U8) -> Puts:
        """Encrypt records with the same layout. All work except the encryption itself is done for all together."""
        count, size = len(puts), puts.sizes[0]
        start, end = state_at(puts[0][1]), fields_at(puts[0][1])
        seal, rest = end + _HEAD.size, end + self._seal_bytes
        tags, key_ids = seal + NONCE_BYTES, seal + KEY_ID_AT
        plain = np.frombuffer(puts.together, np.uint8).reshape(count, size)
        out = np.empty((count, rest + size - end), np.uint8)
        out[:, :start], out[:, rest:] = plain[:, :start], plain[:, end:]
        out[:, end:seal] = np.frombuffer(self._seal_head, np.uint8)
        out[:, seal:tags] = nonces
        out[:, key_ids:rest] = np.frombuffer(self._key_id, np.uint8)
        heads = out[:, : HEADER.itemsize].view(HEADER)[:, 0]
        heads["fields_bytes"] = self._seal_bytes + size - end
        known = np.concatenate((out[:, _CHECKSUM_BYTES:start], out[:, rest:]), axis=1)
        states = map(
            cipher.encrypt,
            _rows(nonces[:, NONCE_BYTES - NONCE_REST_BYTES :]),
            _rows(plain[:, start:end]),
            map(operator.add, _rows(known), puts.keys),
        )
        both = np.frombuffer(b"".join(states), np.uint8).reshape(count, end - start + TAG_BYTES)
        out[:, start:end], out[:, tags:key_ids] = both[:, :-TAG_BYTES], both[:, -TAG_BYTES:]
        flat, sealed_bytes = memoryview(out.reshape(-1).data), out.shape[1]
        records = [flat[at : at + sealed_bytes] for at in range(0, out.size, sealed_bytes)]
        sums = checksums_of((record[_CHECKSUM_BYTES:] for record in records), puts.seeds)
        heads["checksum"] = sums
        return puts.with_checksums([sealed_bytes] * count, flat, sums.tobytes())


def _rows(array: U8) -> list[bytes]:
    """Return each row as bytes."""
    data, size = array.tobytes(), array.shape[1]
    return [data[at : at + size] for at in range(0, len(data), size)] if size else [b""] * len(array)
