"""Facts about a store as a whole: the database `meta` of LMDB."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.store.base import StoreError

SCHEMA_VERSION, OLDEST_VERSION = 12, 11
"""Version of everything in the folder: database, write-ahead logs, records. Raise it whenever one of them changes.

A folder of an earlier version than the second is refused and not changed; so is one of a later version. Others get this
version when a server opens them. 11 had no changes (`store.changes`).
"""

SCHEMA, INCARNATION, SECRET = b"schema", b"incarnation", b"secret"
MARK = b"log"
"""Which write-ahead log belongs to the store."""
KEYS = b"keys"
"""Keys of encryption: their checks in hex by id, as JSON."""
FIRST_REVISION = b"first revision"
"""Initial revision of sessions; 0 if missing."""
COUNT, COUNT_OF_TENANTS = b"sessions of ", b"sessions in "
"""Prefixes of the counts of sessions: per model, and per tenant."""
_AHEAD, _REVISIONS_PER_S = 10**12, 10**6


def begin(transaction: Any, meta: Any, folder: Path) -> None:
    """Write the facts about a new store.

    Raises:
        StoreError: the store exists and has another version.
    """
    schema = transaction.get(SCHEMA, b"", db=meta)
    require_schema(schema, folder)
    if not schema:
        transaction.put(INCARNATION, secrets.token_hex(4).encode(), db=meta)
        transaction.put(SECRET, secrets.token_bytes(32), db=meta)
    if schema != (own := str(SCHEMA_VERSION).encode()):
        transaction.put(SCHEMA, own, db=meta)


def require_schema(schema: bytes, folder: Path) -> None:
    """Refuse a store with another schema version. A store without a version is new.

    Raises:
        StoreError: the version differs.
    """
    known = {str(version).encode() for version in range(OLDEST_VERSION, SCHEMA_VERSION + 1)}
    if schema and schema not in known:
        raise StoreError(
            f"the store in {folder} must have schema version {SCHEMA_VERSION}; it has"
            f" {str(schema, 'utf-8', 'replace'):.20}, which the release that wrote it can read. It was not changed"
        )


def later_first_revision(first_revision: int, now: float) -> int:
    """Return the initial revision for a restored store, higher than any that a client has seen.

    It is derived from the time, so that a second restore of the same backup gets a higher one: no session changes a
    million times per second. Whatever the clock says, it is far above the previous initial revision.
    """
    return max(first_revision + _AHEAD, int(now * _REVISIONS_PER_S))


def count(transaction: Any, meta: Any, changes: Iterable[tuple[str, int]]) -> None:
    """Change the counts with these names."""
    for name, change in changes:
        key = count_key(name)
        transaction.put(key, str(int(transaction.get(key, b"0", db=meta)) + change).encode(), db=meta)


def count_key(name: str) -> bytes:
    """Return the key of a count, of a model or of tenants: see `store.counts`."""
    return (COUNT_OF_TENANTS if SEPARATOR in name else COUNT) + name.encode()


def counts(stored: Mapping[bytes, bytes]) -> dict[str, int]:
    """Return all counts except zeros, by name."""
    found = {
        str(key[len(start) :], "utf-8", "replace"): int(value)
        for start in (COUNT, COUNT_OF_TENANTS)
        for key, value in stored.items()
        if key.startswith(start)
    }
    return {name: count for name, count in found.items() if count}


def pack_keys(checks: Mapping[str, bytes]) -> bytes:
    """Encode the checks of keys as in `KEYS`."""
    return json.dumps({key_id: check.hex() for key_id, check in checks.items()}).encode()


def unpack_keys(stored: bytes) -> dict[str, bytes]:
    """Decode the result of `pack_keys`."""
    return {key_id: bytes.fromhex(check) for key_id, check in json.loads(stored).items()}
