"""Creates the store that the settings describe: the only module that knows all kinds of stores."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from stepwell import _install
from stepwell_server.clock import Clock
from stepwell_server.store.base import LocalStore, Store, StoreError, WriteObserver, require_no_keys
from stepwell_server.store.disk.store import DiskStore
from stepwell_server.store.in_process import InProcessStore
from stepwell_server.store.memory import MemoryStore

if TYPE_CHECKING:
    from stepwell_server.store.encryption.keyring import Keyring
    from stepwell_server.store.valkey.connection.url import StoreUrl
    from stepwell_server.store.valkey.inspection import Inspection

Kind = Literal["disk", "memory"]


def open_store(
    kind: Kind,
    *,
    data_dir: Path | None,
    durability: Literal["sync", "async"],
    clock: Clock,
    observer: WriteObserver | None = None,
    key_file: Path | None = None,
) -> Store:
    """Open the store of one server, or create it. `observer` receives the durations of writes to disk.

    On disk an acknowledged change survives a loss of power (`sync`) or the end of the process (`async`). With a
    `key_file` states are encrypted on disk.

    Raises:
        StoreBusy: another server uses it.
        StoreError: it cannot be opened.
    """
    if kind == "memory" or data_dir is None:
        return InProcessStore(MemoryStore(), clock)
    keyring = None if key_file is None else read_keyring(key_file)
    disk = DiskStore(data_dir, durability=durability, clock=clock, observer=observer)
    try:
        return InProcessStore(encrypted(disk, keyring), clock)
    except BaseException:
        disk.close()
        raise


async def open_shared_store(
    url: StoreUrl,
    *,
    durability: Literal["sync", "async"],
    clock: Clock,
    key_file: Path | None = None,
) -> Store:
    """Open a shared store, or create it.

    An acknowledged change is on the disk of the store's server (`sync`), or was received there (`async`).

    Raises:
        StoreError: it cannot be used.
        ServerError: it does not answer.
    """
    try:
        from stepwell_server.store.valkey.factory import open_valkey
    except ImportError as error:
        raise _without_client(error) from error
    keyring = None if key_file is None else read_keyring(key_file)
    return await open_valkey(url, durability=durability, clock=clock, keyring=keyring)


async def inspect_shared_store(url: StoreUrl, durability: Literal["sync", "async"]) -> Inspection:
    """Inspect a shared store without using it.

    Raises:
        StoreError: it cannot be inspected, or the client is not installed.
    """
    try:
        from stepwell_server.store.valkey.inspection import inspect
    except ImportError as error:
        raise _without_client(error) from error
    return await inspect(url, durability)


def shared_stores() -> ModuleType:
    """Import `store.shared_backup`, for backups and verification of shared stores.

    Raises:
        StoreError: the client is not installed.
    """
    try:
        from stepwell_server.store import shared_backup
    except ImportError as error:
        raise _without_client(error) from error
    return shared_backup


def _without_client(error: ImportError) -> StoreError:
    return StoreError(
        f"a store at a URL needs the extra valkey ({error}): {_install.advice(_install.VALKEY)}"
    )


def encrypted(disk: DiskStore, keyring: Keyring | None) -> LocalStore:
    """Wrap a store for encryption if there is a keyring, and store the check of a new key.

    Raises:
        KeyFileError: a key that encrypts the store is missing.
        Unavailable: the store cannot be written.
    """
    known = disk.key_checks
    if keyring is None:
        require_no_keys(f"in {disk.path}", known)
        return disk
    from stepwell_server.store.encryption.sealer import Sealer
    from stepwell_server.store.encryption.store import EncryptedStore

    keyring.require(known)
    if keyring.first and keyring.first not in known:
        disk.set_key_checks({**known, keyring.first: keyring.checks[keyring.first]})
    return EncryptedStore(disk, Sealer(keyring))


def read_keyring(path: Path) -> Keyring:
    """Read a key file. Imports the modules for encryption only when called.

    Raises:
        KeyFileError: it cannot be used.
    """
    from stepwell_server.store.encryption.keyring import read_keys

    return read_keys(path)
