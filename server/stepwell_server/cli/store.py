"""`stepwell store`: checks, backs up, restores, encrypts and repairs stores on disk, and backs up shared ones."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from stepwell.cli.toolkit import render
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Command, Group
from stepwell.cli.toolkit.target import json_option
from stepwell_server.cli.options import Written
from stepwell_server.clock import SystemClock
from stepwell_server.settings.formats import FILE, FOLDER, parse_path, size
from stepwell_server.store.valkey.connection.url import StoreUrl, UrlError, is_store_url
from stepwell_server.store.valkey.connection.url import parse as parse_store_url

if TYPE_CHECKING:
    from stepwell_server.store.encryption.keyring import Keyring
    from stepwell_server.store.verification import Verification

#: Maximum number of sessions to name.
_NAMED = 5
_DONE = (
    ("0", "done"),
    ("2", "not possible, and nothing is changed: a wrong argument or file, or a running server"),
)


def _parse_place(text: str) -> Path | StoreUrl:
    """Read a path, or the URL of a store that several servers share."""
    return parse_store_url(text) if is_store_url(text) else parse_path(text)


def _parse_folder(text: str) -> Path:
    """Read the folder of one server's store. The message does not repeat a URL, which may have a password."""
    if is_store_url(text):
        raise UrlError(
            "must be the data directory of one server; got the URL of a shared store, for which docs/operate/scale-out.md "
            "explains what to do"
        )
    return parse_path(text)


_PLACE = Written(dataclasses.replace(FOLDER, parse=_parse_place))
key_file_option = click.option(
    "--encryption-key-file",
    "key_file",
    metavar="FILE",
    type=Written(FILE),
    envvar="STEPWELL_ENCRYPTION_KEY_FILE",
    show_envvar=True,
    help="Keys of an encrypted store, as for stepwell serve.",
)
data_dir_argument = click.argument(
    "data_dir", metavar="DATA_DIR", type=Written(dataclasses.replace(FOLDER, parse=_parse_folder))
)
place_argument = click.argument("place", metavar="DATA_DIR|URL", type=_PLACE)


@click.group(
    cls=Group,
    short_help="Check, back up, restore, encrypt and repair stores.",
    examples=(
        "stepwell store backup data /backup/monday",
        "stepwell store verify data",
        "stepwell store restore /backup/monday data-2",
        "stepwell store backup valkey://db.example/0 /backup/monday",
        "stepwell store new-key --file keys",
    ),
)
def store() -> None:
    """Check, back up, restore, encrypt and repair stores on disk; check, back up and restore shared stores.

    DATA_DIR is the --data-dir of a server; URL is the --store of servers that share one. These commands access the files
    or the Valkey directly, not through a server, and need the rights of the server's user.
    """


@store.command(
    "verify",
    cls=Command,
    short_help="Check every record, key and count.",
    examples=(
        "stepwell store verify data",
        "stepwell store verify /backup/monday --encryption-key-file keys",
        "stepwell store verify valkey://db.example/0",
    ),
    json_keys=(
        ("problems", "list of problems; empty: none"),
        ("sessions, tombstones", "number of sessions, and of ended sessions that are remembered"),
        ("logged", "sessions whose last change is in the write-ahead log"),
        ("encrypted", "records by the id of the key that encrypts them"),
        ("opened", "records that were decrypted to check them"),
        (
            "damaged",
            "ids of sessions with a corrupt record; at most 1000, as in the next two",
        ),
        ("sealed", "ids of sessions whose record no given key decrypts"),
        ("unreachable", "ids of sessions that exist but are not found by their id"),
        ("models", "sessions by model"),
        ("documents", "number of documents of the server itself"),
        ("damaged_documents", "names of corrupt documents"),
    ),
    exit_codes=(
        ("0", "nothing is wrong"),
        ("1", "something is wrong"),
        ("2", "the store cannot be read at all, or a key is missing"),
    ),
)
@click.argument("path", metavar="PATH|URL", type=_PLACE)
@key_file_option
@json_option
@click.pass_context
def verify(ctx: click.Context, path: Path | StoreUrl, key_file: Path | None, as_json: bool) -> None:
    """Check a store: the checksum of every record, that every session can be found, and all counts.

    PATH is a data directory or a backup; URL is the --store of servers that share one. Servers may use the store meanwhile.
    With the keys, records are decrypted too; everything else is checked without them. In a shared store, tombstones and
    logs are not checked.
    """
    with _failures():
        keyring = _keyring(key_file)
        if isinstance(path, Path):
            from stepwell_server.store import verification

            found = (
                verification.verify(path, keyring)
                if path.is_dir()
                else verification.verify_backup(path, keyring)
            )
        else:
            found = _shared().verify(path, keyring, SystemClock())
    if as_json:
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        render.print_json(fields)
    else:
        _show(found)
    ctx.exit(1 if found.problems else 0)


@store.command(
    "backup",
    cls=Command,
    short_help="Write all sessions to one file.",
    examples=(
        "stepwell store backup data /backup/monday",
        "stepwell store backup data monday --max-rate 50MB",
        "stepwell store backup valkey://db.example/0 monday",
    ),
    json_keys=(
        ("file", "the backup"),
        ("bytes", "its size"),
        ("sessions, tombstones", "number of its sessions, and of ended sessions that are remembered"),
        (
            "damaged",
            "number of sessions with corrupt records in the store; the backup contains them unchanged",
        ),
        ("keys", "ids of the keys needed to restore it"),
        ("documents", "number of its documents of the server itself"),
        (
            "damaged_documents",
            "number of corrupt documents in the store; the backup contains them unchanged",
        ),
    ),
    exit_codes=_DONE,
)
@place_argument
@click.argument("file", metavar="FILE", type=Written(FILE))
@click.option(
    "--max-rate",
    metavar="SIZE",
    type=Written(size()),
    help="Maximum bytes to write per second. Default: no limit.",
)
@json_option
def backup(place: Path | StoreUrl, file: Path, max_rate: int | None, as_json: bool) -> None:
    """Back up the store in DATA_DIR, or the shared store at URL, to FILE, which must not exist.

    Servers may use the store meanwhile. The backup contains at least all changes that were acknowledged before it began.
    Encrypted records stay encrypted, and no key is needed. FILE appears when it is complete and on the disk. The backup of
    a shared store has no tombstones of ended sessions.
    """
    rate = math.inf if max_rate is None else max_rate
    with _failures():
        if isinstance(place, Path):
            from stepwell_server.store.backup import back_up

            done = back_up(place, file, SystemClock(), bytes_per_s=rate)
        else:
            done = _shared().back_up(place, file, SystemClock(), bytes_per_s=rate)
    if as_json:
        render.print_json({**dataclasses.asdict(done), "file": str(done.file)})
        return
    click.echo(f"{done.file}: {done.sessions} sessions, {render.rounded_size(done.bytes)}{_needs(done.keys)}")
    if done.damaged:
        click.echo(f"{done.damaged} of them have corrupt records; stepwell store verify lists them", err=True)
    _say_damaged_documents(done.damaged_documents)


@store.command(
    "restore",
    cls=Command,
    short_help="Create a store from a backup.",
    examples=(
        "stepwell store restore /backup/monday data-2",
        "stepwell store restore handover data-2 --moved",
        "stepwell store restore handover valkey://db.example/0 --moved",
    ),
    json_keys=(
        ("data_dir", "the new data directory, or the URL"),
        ("sessions, tombstones", "number of its sessions, and of ended sessions that are remembered"),
        ("damaged", "number of sessions with corrupt records; their calls fail with STATE_CORRUPT"),
        ("backed_up_time", "start of the backup (RFC 3339, UTC)"),
        ("first_revision", "lowest possible revision in the store"),
        ("documents", "number of its documents of the server itself"),
        ("damaged_documents", "number of corrupt documents, as in the store that was backed up"),
    ),
    exit_codes=_DONE,
)
@click.argument("file", metavar="FILE", type=Written(FILE))
@place_argument
@key_file_option
@click.option(
    "--moved",
    is_flag=True,
    help="Keep the revisions, so that clients continue without a conflict. Only if no change was acknowledged since the "
    "backup.",
)
@json_option
def restore(file: Path, place: Path | StoreUrl, key_file: Path | None, moved: bool, as_json: bool) -> None:
    """Create a store from the backup FILE. The kind of the store may differ from the one that was backed up.

    DATA_DIR must not exist or must be empty. At URL, the --store of servers that share one, there must be no store yet. The
    whole FILE is checked first. Sessions continue with their states from the backup. Their revisions are increased by the
    microseconds since 1970, above every revision that a client may have seen since. So a client's next change fails with
    REVISION_CONFLICT instead of being applied to a state that the client does not know. With --moved, revisions stay the
    same: use it for the backup of a server that was stopped and stays stopped.
    """
    with _failures():
        if isinstance(place, Path):
            from stepwell_server.store import backup as backups

            done = backups.restore(file, place, SystemClock(), _keyring(key_file), moved=moved)
        else:
            done = _shared().restore(file, place, SystemClock(), _keyring(key_file), moved=moved)
    created = datetime.fromtimestamp(done.created, UTC).isoformat(timespec="seconds")
    if as_json:
        facts = {"data_dir": str(place), "backed_up_time": created, **dataclasses.asdict(done)}
        facts.pop("created")
        render.print_json(facts)
        return
    click.echo(f"{place}: {done.sessions} sessions, as of {created}")
    if done.damaged:
        click.echo(f"{done.damaged} of them have corrupt records, and fail with STATE_CORRUPT", err=True)
    _say_damaged_documents(done.damaged_documents)


@store.command(
    "new-key",
    cls=Command,
    short_help="Add a key to a key file.",
    examples=("stepwell store new-key --file keys", "stepwell store new-key --file keys --id 2027"),
    exit_codes=_DONE,
)
@click.option(
    "--file",
    metavar="FILE",
    type=Written(FILE),
    required=True,
    help="The key file; it is created if it does not exist.",
)
@click.option("--id", "key_id", metavar="ID", help="Permanent name of the key. Default: the date.")
@click.option(
    "--last",
    "is_last",
    is_flag=True,
    help="Put it after the others: it only decrypts until you move its line to the top. For servers that share a store; see "
    "docs/operate/scale-out.md.",
)
def new_key(file: Path, key_id: str | None, is_last: bool) -> None:
    """Put a new key at the top of a key file. A server that starts with the file encrypts with that key.

    The other keys stay, because existing records need them. Keep a copy elsewhere: without its keys, a store is lost.
    """
    with _failures():
        from stepwell_server.store.encryption import keyring

        key_id = key_id or keyring.unused_id(file, datetime.now(UTC).date().isoformat())
        keyring.add_key(file, key_id, is_last=is_last)
    click.echo(f"{file}: key {key_id} {'decrypts' if is_last else 'encrypts'}")


@store.command(
    "rekey",
    cls=Command,
    short_help="Encrypt all sessions with the first key.",
    examples=("stepwell store rekey data --encryption-key-file keys",),
    json_keys=(
        ("sessions", "number of sessions"),
        ("damaged", "number of sessions whose record could not be decrypted and is unchanged"),
        ("left", "ids of the keys that those records need"),
    ),
    exit_codes=_DONE,
)
@data_dir_argument
@key_file_option
@click.option("--decrypt", is_flag=True, help="Decrypt all sessions instead.")
@json_option
def rekey(data_dir: Path, key_file: Path | None, decrypt: bool, as_json: bool) -> None:
    """Encrypt all sessions of the store in DATA_DIR with the first key of a file. No server may use the store meanwhile.

    Afterwards you can remove the other keys, and no file of the store contains unencrypted records. A server encrypts only
    what it writes, so without this command, sessions that nobody uses stay unchanged.
    """
    if key_file is None:
        raise Failure("--encryption-key-file: must be given")
    with _failures():
        from stepwell_server.store import repair

        keyring = _keyring(key_file)
        assert keyring is not None
        done = repair.rekey(data_dir, SystemClock(), keyring, decrypt=decrypt)
    if as_json:
        render.print_json({**dataclasses.asdict(done), "left": sorted(done.left)})
        return
    click.echo(
        f"{data_dir}: {done.sessions} sessions, {'not encrypted' if decrypt else f'encrypted with {keyring.first}'}"
    )
    if done.damaged:
        left = f", and need {', '.join(sorted(done.left))}" if done.left else ""
        click.echo(f"{done.damaged} of them could not be decrypted{left}", err=True)


@store.command(
    "repair",
    cls=Command,
    short_help="Repair a damaged store, without the lost sessions.",
    examples=("stepwell store repair data",),
    json_keys=(
        ("sessions", "number of sessions after the repair"),
        ("recovered", "ids of sessions whose key was corrupt and was recovered from the record"),
        ("damaged", "ids of sessions with corrupt records: their calls fail with STATE_CORRUPT"),
        ("lost", "number of lost sessions, whose ids are unknown"),
        ("documents", "number of documents of the server itself after the repair"),
        ("lost_documents", "names of documents that were corrupt and are lost"),
        ("missing_documents", "number of other lost documents, whose names are unknown"),
    ),
    exit_codes=_DONE,
)
@data_dir_argument
@json_option
def repair(data_dir: Path, as_json: bool) -> None:
    """Repair the store in DATA_DIR after damage to its keys or pages. No server may use the store meanwhile.

    Keep a copy of the folder first: the repair gives up what it cannot recover. While sessions are missing, a server does
    not reopen an ID that it cannot find. After the repair, such an ID counts as unused.
    """
    with _failures():
        from stepwell_server.store import repair

        done = repair.repair(data_dir, SystemClock())
    if as_json:
        render.print_json(dataclasses.asdict(done))
        return
    click.echo(
        f"{data_dir}: {done.sessions} sessions; {len(done.recovered)} recovered, {len(done.damaged)} with corrupt records,"
        f" {done.lost} lost"
    )
    if done.lost_documents or done.missing_documents:
        lost = [*map(repr, done.lost_documents)]
        lost += [f"{done.missing_documents} others"] if done.missing_documents else []
        click.echo(f"lost documents of the server: {', '.join(lost)}", err=True)


def _say_damaged_documents(count: int) -> None:
    if count:
        click.echo(f"{count} documents of the server are corrupt; stepwell store verify lists them", err=True)


def _shared() -> ModuleType:
    """Return the module for shared stores.

    Raises:
        StoreError: the Valkey client is not installed.
    """
    from stepwell_server.store.factory import shared_stores

    return shared_stores()


def _keyring(file: Path | None) -> Keyring | None:
    from stepwell_server.store.factory import read_keyring

    return None if file is None else read_keyring(file)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Report errors of a store as one line."""
    from stepwell_server.errors import ServerError
    from stepwell_server.store.base import StoreError

    try:
        yield
    except StoreError as error:
        raise Failure(str(error)) from None
    except ServerError as error:
        raise Failure(error.message) from None


def _show(found: Verification) -> None:
    """Print the findings for people."""
    facts: list[tuple[str, Any]] = [
        ("sessions", found.sessions),
        ("of models", ", ".join(f"{count} {model}" for model, count in sorted(found.models.items()))),
        ("in the log", found.logged),
        ("tombstones", found.tombstones),
        (
            "encrypted",
            ", ".join(f"{count} with {key_id}" for key_id, count in sorted(found.encrypted.items())),
        ),
        ("decrypted", found.opened),
        ("documents", found.documents),
    ]
    render.print_facts(
        [(name, str(fact)) for name, fact in facts if fact not in ("", 0) or name == "sessions"]
    )
    for kind, names in (
        ("damaged", found.damaged),
        ("sealed", found.sealed),
        ("unreachable", found.unreachable),
        ("damaged documents", found.damaged_documents),
    ):
        if names:
            more = ", ..." if len(names) > _NAMED else ""
            click.echo(f"{kind}: {', '.join(map(repr, names[:_NAMED]))}{more}")
    for problem in found.problems:
        click.echo(f"wrong: {problem}")
    if not found.problems:
        click.echo("nothing is wrong")


def _needs(keys: list[str]) -> str:
    return f", needs {'key' if len(keys) == 1 else 'keys'} {', '.join(keys)}" if keys else ""
