"""The description of a shared store: its layout, the random values from its creation, and its encryption keys."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping

from stepwell_server.store.base import StoreError
from stepwell_server.store.valkey import scripts
from stepwell_server.store.valkey.connection.client import Reply
from stepwell_server.store.valkey.connection.requests import Request, Requests
from stepwell_server.store.valkey.connection.url import DEFAULT_PARTITIONS, MAX_PARTITIONS
from stepwell_server.store.valkey.documents import pairs_of
from stepwell_server.store.valkey.keys import META, store_key

LAYOUT, OLDEST_LAYOUT = 6, 5
"""Version of everything under the prefix: keys, values, counts, records. Raise it whenever one of them changes.

A store of the second one, or of a later one up to the first, gets the first when a server opens it. 5 had no changes
(`store.changes`): servers of that release that still run answer sessions with changes with STATE_CORRUPT.
"""
_LAYOUT, _PARTITIONS, _SECRET, _INCARNATION = b"layout", b"partitions", b"secret", b"incarnation"
_FIRST_REVISION, _KEY, _MARKED = b"first_revision", b"key:", b"marked"
_RESTORING = b"restoring"
"""A restore is in progress, and no server may use the store."""
_SECRET_BYTES = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Meta:
    """The description of a store."""

    partitions: int
    secret: bytes
    incarnation: str
    first_revision: int
    key_checks: Mapping[str, bytes]
    """`Keyring.checks` of the keys that encrypt it."""
    is_marked: bool = False
    """All its partitions have had their marks."""


async def read(requests: Requests, prefix: str, partitions: int | None) -> Meta:
    """Read the description of the store with this prefix; create the store if it does not exist.

    Raises:
        StoreError: it belongs to another release, is corrupt, or has another number of partitions than requested.
        ServerError: it does not answer.
    """
    new = Meta(
        partitions or DEFAULT_PARTITIONS, secrets.token_bytes(_SECRET_BYTES), secrets.token_hex(4), 0, {}
    )
    fields = (await _made(requests, prefix, new, once=True))[1]
    found = _meta_of(prefix, fields, partitions)
    if fields.get(_LAYOUT) != b"%d" % LAYOUT:
        await _set(requests, prefix, _LAYOUT, b"%d" % LAYOUT)
    return found


async def ensure(requests: Requests, prefix: str, known: Meta) -> tuple[bool, str, list[str]]:
    """Create the store with this prefix again, with its known description, if it has disappeared.

    Returns:
        Whether it was created, the incarnation of the current store, and the ids of the keys that encrypt it.

    Raises:
        ServerError: it does not answer.
    """
    was_made, fields = await _made(requests, prefix, known, once=False)
    return was_made, fields.get(_INCARNATION, b"").decode("ascii", "replace"), list(_key_checks(fields))


async def make_unfinished(requests: Requests, prefix: str, new: Meta) -> bool:
    """Create a store that servers refuse to use until `finishing` was sent; return False if a store exists.

    Raises:
        ServerError: it does not answer.
    """
    return (await _made(requests, prefix, new, once=True, is_finished=False))[0]


def finishing(prefix: str) -> Request:
    """Return the request that lets servers use the store from `make_unfinished`."""
    return Request(META, (b"HDEL", store_key(prefix), _RESTORING))


async def _made(
    requests: Requests, prefix: str, new: Meta, *, once: bool, is_finished: bool = True
) -> tuple[bool, Mapping[bytes, bytes]]:
    """Create the store unless it exists; return whether it was created, and its description."""
    words: list[bytes | str | int] = [_LAYOUT, LAYOUT, _PARTITIONS, new.partitions, _SECRET, new.secret]
    words += [_INCARNATION, new.incarnation, _FIRST_REVISION, new.first_revision]
    if new.is_marked:
        words += [_MARKED, 1]
    for key_id, check in new.key_checks.items():
        words += [_KEY + key_id.encode(), check]
    if not is_finished:
        words += [_RESTORING, 1]
    request = Request.of(META, scripts.MAKE, [store_key(prefix)], *words)
    await requests.send([request], waits=True, once=once)
    if request.problem is not None:
        raise request.problem
    was_made, fields = request.reply
    return bool(was_made), pairs_of(fields)


async def add_key_check(requests: Requests, prefix: str, key_id: str, check: bytes) -> None:
    """Store the check of a key that encrypts the store.

    Raises:
        ServerError: it does not answer.
    """
    await _set(requests, prefix, _KEY + key_id.encode(), check)


async def set_marked(requests: Requests, prefix: str) -> None:
    """Store that all partitions have their marks.

    Raises:
        ServerError: it does not answer.
    """
    await _set(requests, prefix, _MARKED, b"1")


async def _set(requests: Requests, prefix: str, name: bytes, value: bytes) -> None:
    request = Request(META, (b"HSET", store_key(prefix), name, value))
    await requests.send([request], waits=True)
    if request.problem is not None:
        raise request.problem


def meta_of(prefix: str, reply: Reply, asked: int | None) -> Meta:
    """Decode the description of a store; `asked` is the required number of partitions, if any.

    Raises:
        StoreError: as `read`.
    """
    return _meta_of(prefix, pairs_of(reply), asked)


def _meta_of(prefix: str, fields: Mapping[bytes, bytes], asked: int | None) -> Meta:
    if _RESTORING in fields:
        raise StoreError(
            f"the store with prefix {prefix!r} must be completely restored; the restore is running, or was interrupted: wait for"
            f" it, or delete all keys that begin with {prefix!r} and restore again"
        )
    layout = _number(prefix, fields, _LAYOUT)
    if not OLDEST_LAYOUT <= layout <= LAYOUT:
        raise StoreError(
            f"the layout of the store with prefix {prefix!r} must be {LAYOUT}; it is {layout}: another release created it."
            " It was not changed"
        )
    partitions = _number(prefix, fields, _PARTITIONS)
    if not 1 <= partitions <= MAX_PARTITIONS:
        raise _damaged(prefix, _PARTITIONS)
    if asked not in {None, partitions}:
        raise StoreError(
            f"partitions must be {partitions}, as in the store with prefix {prefix!r}; got {asked}"
        )
    secret, incarnation = fields.get(_SECRET, b""), fields.get(_INCARNATION, b"")
    if len(secret) != _SECRET_BYTES:
        raise _damaged(prefix, _SECRET)
    if len(incarnation) != 8:
        raise _damaged(prefix, _INCARNATION)
    return Meta(
        partitions,
        secret,
        incarnation.decode("ascii", "replace"),
        _number(prefix, fields, _FIRST_REVISION),
        _key_checks(fields),
        _MARKED in fields,
    )


def _key_checks(fields: Mapping[bytes, bytes]) -> dict[str, bytes]:
    """Return `Keyring.checks` of the keys that encrypt the store."""
    return {
        name.removeprefix(_KEY).decode("utf-8", "replace"): check
        for name, check in fields.items()
        if name.startswith(_KEY)
    }


def _number(prefix: str, fields: Mapping[bytes, bytes], name: bytes) -> int:
    value = fields.get(name, b"")
    if not value.isdigit():
        raise _damaged(prefix, name)
    return int(value)


def _damaged(prefix: str, name: bytes) -> StoreError:
    key = store_key(prefix).decode()
    return StoreError(f"{name.decode()} in key {key!r} must be intact; it is corrupt")
