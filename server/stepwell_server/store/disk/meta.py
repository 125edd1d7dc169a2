"""Facts about a store as a whole: the database `meta` of LMDB."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stepwell_server.core.namespaces import SEPARATOR
from stepwell_server.store.base import StoreError

SCHEMA_VERSION = 11
"""Of everything in the folder: database, write-ahead logs, records. Raise it whenever one of them changes.

A folder of another version is refused, and stays as it is.
"""

SCHEMA, INCARNATION, SECRET = b"schema", b"incarnation", b"secret"
MARK = b"log"
"""Which write-ahead log belongs to the store."""
KEYS = b"keys"
"""Keys of encryption: their checks in hex by id, as JSON."""
FIRST_REVISION = b"first revision"
"""With which revision sessions begin; missing: with 0."""
COUNT, COUNT_OF_TENANTS = b"sessions of ", b"sessions in "
"""Before the name of a model, and what is counted of tenants: how many sessions it has."""
_AHEAD, _REVISIONS_PER_S = 10**12, 10**6


def begin(transaction: Any, meta: Any, folder: Path) -> None:
    """Write the facts about a new store.

    Raises:
        StoreError: it is there, and of another version.
    """
    schema = transaction.get(SCHEMA, b"", db=meta)
    require_schema(schema, folder)
    if not schema:
        transaction.put(INCARNATION, secrets.token_hex(4).encode(), db=meta)
        transaction.put(SECRET, secrets.token_bytes(32), db=meta)
        transaction.put(SCHEMA, str(SCHEMA_VERSION).encode(), db=meta)


def require_schema(schema: bytes, folder: Path) -> None:
    """Refuse a store of another version; one without a version is new.

    Raises:
        StoreError: it is of another one.
    """
    if schema and schema != str(SCHEMA_VERSION).encode():
        raise StoreError(
            f"the store in {folder} must be of schema version {SCHEMA_VERSION};"
            f" it is of {str(schema, 'utf-8', 'replace'):.20}, which the release that wrote it reads, and stays as it is"
        )


def later_first_revision(first_revision: int, now: float) -> int:
    """The first revision of sessions in a store that went back to a backup: no client has seen one as high.

    It goes by the time, so that a store that goes back to the same backup twice is ahead of itself, too: no session changes
    a million times a second. However the clock was set, it is far ahead of what was the first one.
    """
    return max(first_revision + _AHEAD, int(now * _REVISIONS_PER_S))


def count(transaction: Any, meta: Any, changes: Iterable[tuple[str, int]]) -> None:
    """Change the numbers of sessions that have a name."""
    for name, change in changes:
        key = count_key(name)
        transaction.put(key, str(int(transaction.get(key, b"0", db=meta)) + change).encode(), db=meta)


def count_key(name: str) -> bytes:
    """Where a number of sessions is: of a model's, or of tenants', which are among those (`store.counts`)."""
    return (COUNT_OF_TENANTS if SEPARATOR in name else COUNT) + name.encode()


def counts(stored: Mapping[bytes, bytes]) -> dict[str, int]:
    """All such numbers but 0, by name."""
    found = {
        str(key[len(start) :], "utf-8", "replace"): int(value)
        for start in (COUNT, COUNT_OF_TENANTS)
        for key, value in stored.items()
        if key.startswith(start)
    }
    return {name: count for name, count in found.items() if count}


def pack_keys(checks: Mapping[str, bytes]) -> bytes:
    """As `KEYS` has them."""
    return json.dumps({key_id: check.hex() for key_id, check in checks.items()}).encode()


def unpack_keys(stored: bytes) -> dict[str, bytes]:
    """What `pack_keys` was given."""
    return {key_id: bytes.fromhex(check) for key_id, check in json.loads(stored).items()}
