"""`stepwell store`: check, back up, restore, encrypt and mend stores on disk; check, back up and restore shared ones."""

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

#: Sessions that are named where there may be many.
_NAMED = 5
_DONE = (
    ("0", "done"),
    ("2", "it cannot be done, and nothing is changed: what is given, a file, or a server that runs"),
)


def _parse_place(text: str) -> Path | StoreUrl:
    """Read a path, or the URL of a store that several servers share."""
    return parse_store_url(text) if is_store_url(text) else parse_path(text)


def _parse_folder(text: str) -> Path:
    """Read the folder of one server's store. The message does not repeat a URL, which may have a password."""
    if is_store_url(text):
        raise UrlError(
            "must be the data directory of one server; got the URL of a store that servers share: docs/operate/scale-out.md says "
            "what is done with those"
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
    help="Keys of an encrypted store, as stepwell serve has them.",
)
data_dir_argument = click.argument(
    "data_dir", metavar="DATA_DIR", type=Written(dataclasses.replace(FOLDER, parse=_parse_folder))
)
place_argument = click.argument("place", metavar="DATA_DIR|URL", type=_PLACE)


@click.group(
    cls=Group,
    short_help="Check, back up, restore, encrypt and mend stores.",
    examples=(
        "stepwell store backup data /backup/monday",
        "stepwell store verify data",
        "stepwell store restore /backup/monday data-2",
        "stepwell store backup valkey://db.example/0 /backup/monday",
        "stepwell store new-key --file keys",
    ),
)
def store() -> None:
    """Check, back up, restore, encrypt and mend stores on disk; check, back up and restore those that servers share.

    DATA_DIR is the --data-dir of a server, URL the --store of servers that share one. These commands read and write files on the machine they run on, and ask no
    server; they need the rights of the server's account.
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
        ("problems", "list of what is wrong; empty: nothing"),
        ("sessions, tombstones", "how many sessions there are, and ended ones that are remembered"),
        ("logged", "sessions whose last change is in the write-ahead log"),
        ("encrypted", "records by the id of the key that encrypts them"),
        ("opened", "records that were decrypted to check them"),
        (
            "damaged",
            "ids of sessions whose record is not as it was written; 1000 at most of this and of the next two",
        ),
        ("sealed", "ids of sessions whose record no given key opens"),
        ("unreachable", "ids of sessions that are there and are not found by their id"),
        ("models", "sessions by model"),
        ("documents", "how many documents of the server itself there are"),
        ("damaged_documents", "names of documents that are not as they were written"),
    ),
    exit_codes=(
        ("0", "all is well"),
        ("1", "something is wrong"),
        ("2", "it cannot be read at all, or a key is missing"),
    ),
)
@click.argument("path", metavar="PATH|URL", type=_PLACE)
@key_file_option
@json_option
@click.pass_context
def verify(ctx: click.Context, path: Path | StoreUrl, key_file: Path | None, as_json: bool) -> None:
    """Check a store: every record's checksum, that every session is found, and all counts.

    PATH is a data directory or a backup, URL the --store of servers that share one. Servers may use the store meanwhile. With its keys, records are decrypted too; all else is checked without. Of a shared
    store neither tombstones nor a log are looked at.
    """
    with _failures():
        keyring = _keyring(key_file)
        if isinstance(path, Path):
            from stepwell_server.store import verification

            found = (
                verification.examine(path, keyring)
                if path.is_dir()
                else verification.examine_backup(path, keyring)
            )
        else:
            found = _shared().examine(path, keyring, SystemClock())
    if as_json:
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        render.print_json(fields)
    else:
        _show(found)
    ctx.exit(1 if found.problems else 0)


@store.command(
    "backup",
    cls=Command,
    short_help="Write all sessions into one file.",
    examples=(
        "stepwell store backup data /backup/monday",
        "stepwell store backup data monday --max-rate 50MB",
        "stepwell store backup valkey://db.example/0 monday",
    ),
    json_keys=(
        ("file", "the backup"),
        ("bytes", "its size"),
        ("sessions, tombstones", "how many sessions it has, and ended ones that are remembered"),
        ("damaged", "sessions whose records are damaged in the store; they are in the backup as they are"),
        ("keys", "ids of the keys that are needed to restore it"),
        ("documents", "how many documents of the server itself it has"),
        (
            "damaged_documents",
            "how many of them are damaged in the store; they are in the backup as they are",
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
    help="Bytes to write in a second at most. Default: no limit.",
)
@json_option
def backup(place: Path | StoreUrl, file: Path, max_rate: int | None, as_json: bool) -> None:
    """Back up the store in DATA_DIR, or the shared one at URL, into FILE, which must not be there yet.

    Servers may use it meanwhile. Each session is in the backup with all that was acknowledged before it began, or later. What is encrypted stays so, and
    no key is needed. FILE appears when it is whole and on the disk. What is remembered of ended sessions is not in the
    backup of a shared store.
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
        click.echo(f"{done.damaged} of them have damaged records; stepwell store verify names them", err=True)
    _say_damaged_documents(done.damaged_documents)


@store.command(
    "restore",
    cls=Command,
    short_help="Make a store of a backup.",
    examples=(
        "stepwell store restore /backup/monday data-2",
        "stepwell store restore handover data-2 --moved",
        "stepwell store restore handover valkey://db.example/0 --moved",
    ),
    json_keys=(
        ("data_dir", "the new data directory, or the URL"),
        ("sessions, tombstones", "how many sessions it has, and ended ones that are remembered"),
        ("damaged", "sessions whose records are damaged; they answer STATE_CORRUPT"),
        ("backed_up_time", "when the backup was begun (RFC 3339, UTC)"),
        ("first_revision", "revisions of the store are at least this"),
        ("documents", "how many documents of the server itself it has"),
        ("damaged_documents", "how many of them are damaged, as they were in the store that was backed up"),
    ),
    exit_codes=_DONE,
)
@click.argument("file", metavar="FILE", type=Written(FILE))
@place_argument
@key_file_option
@click.option(
    "--moved",
    is_flag=True,
    help="Nothing was acknowledged since the backup: sessions keep their revisions, and clients go on as if nothing had been.",
)
@json_option
def restore(file: Path, place: Path | StoreUrl, key_file: Path | None, moved: bool, as_json: bool) -> None:
    """Make a store of the backup FILE, of whatever kind of store that is.

    DATA_DIR must not be there yet, or be empty; at URL, the --store of servers that share one, there must be no store.
    All of FILE is checked before. Sessions go on with the states that they had, at revisions that are higher by the
    microseconds since 1970: above any that a client was told since, so that what it sends is refused
    (REVISION_CONFLICT), not taken for a change of what it knows. With --moved they keep their revisions: for the backup
    of a server that was stopped, and stays so.
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
        click.echo(f"{done.damaged} of them have damaged records, and answer STATE_CORRUPT", err=True)
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
    help="The key file; it is made if it is not there.",
)
@click.option("--id", "key_id", metavar="ID", help="What the key is called, for ever. Default: the date.")
@click.option(
    "--last",
    "is_last",
    is_flag=True,
    help="Put it behind the others: it decrypts, and encrypts nothing before its line is moved to the top. For servers that "
    "share a store: docs/operate/scale-out.md says why.",
)
def new_key(file: Path, key_id: str | None, is_last: bool) -> None:
    """Put a new key before those of a key file: a server that is started with it encrypts with that one from then on.

    The others stay, as what they encrypted needs them. Keep a copy elsewhere: without its keys a store is lost.
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
        ("sessions", "how many there are"),
        ("damaged", "sessions whose record could not be opened, and is as it was"),
        ("left", "ids of keys that those need"),
    ),
    exit_codes=_DONE,
)
@data_dir_argument
@key_file_option
@click.option("--decrypt", is_flag=True, help="Decrypt all of them instead.")
@json_option
def rekey(data_dir: Path, key_file: Path | None, decrypt: bool, as_json: bool) -> None:
    """Encrypt all sessions of the store in DATA_DIR with the first key of a file; no server may use it meanwhile.

    Afterwards the other keys can go, and no file of the store has anything that was not encrypted. A server encrypts what
    it writes, so without this command sessions that nobody uses stay as they were.
    """
    if key_file is None:
        raise Failure("--encryption-key-file: give the keys")
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
        click.echo(f"{done.damaged} of them could not be opened{left}", err=True)


@store.command(
    "repair",
    cls=Command,
    short_help="Make a damaged store whole again, without what is lost.",
    examples=("stepwell store repair data",),
    json_keys=(
        ("sessions", "how many there are now"),
        ("recovered", "ids of sessions whose key was damaged and could be told from their record"),
        ("damaged", "ids of sessions whose record is damaged: they answer STATE_CORRUPT"),
        ("lost", "how many sessions are not there any more; nobody can tell which"),
        ("documents", "how many documents of the server itself there are now"),
        ("lost_documents", "names of documents that were damaged and are not there any more"),
        ("missing_documents", "how many others are not there any more; nobody can tell which"),
    ),
    exit_codes=_DONE,
)
@data_dir_argument
@json_option
def repair(data_dir: Path, as_json: bool) -> None:
    """Make the store in DATA_DIR of what is left of it, when keys or pages of it were damaged; no server may use it.

    Keep a copy of the folder: this takes what is lost for lost. A server begins no session anew while some are missing;
    after this, what is not found is not there.
    """
    with _failures():
        from stepwell_server.store import repair

        done = repair.repair(data_dir, SystemClock())
    if as_json:
        render.print_json(dataclasses.asdict(done))
        return
    click.echo(
        f"{data_dir}: {done.sessions} sessions; {len(done.recovered)} found again, {len(done.damaged)} with damaged records,"
        f" {done.lost} lost"
    )
    if done.lost_documents or done.missing_documents:
        lost = [*map(repr, done.lost_documents)]
        lost += [f"{done.missing_documents} others"] if done.missing_documents else []
        click.echo(f"documents of the server that are lost: {', '.join(lost)}", err=True)


def _say_damaged_documents(count: int) -> None:
    if count:
        click.echo(f"{count} documents of the server are damaged; stepwell store verify names them", err=True)


def _shared() -> ModuleType:
    """What looks after stores that servers share.

    Raises:
        StoreError: the client of Valkey is not installed.
    """
    from stepwell_server.store.factory import shared_stores

    return shared_stores()


def _keyring(file: Path | None) -> Keyring | None:
    from stepwell_server.store.factory import read_keyring

    return None if file is None else read_keyring(file)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Report what a store cannot do as one line."""
    from stepwell_server.errors import ServerError
    from stepwell_server.store.base import StoreError

    try:
        yield
    except StoreError as error:
        raise Failure(str(error)) from None
    except ServerError as error:
        raise Failure(error.message) from None


def _show(found: Verification) -> None:
    """Print what was found for people."""
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
