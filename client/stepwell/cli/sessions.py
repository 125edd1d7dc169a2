"""`stepwell sessions`: list, show, close, export and import."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from stepwell.cli.toolkit import complete, render
from stepwell.cli.toolkit.errors import Failure, one_line
from stepwell.cli.toolkit.help import Group
from stepwell.cli.toolkit.target import Target, json_option, server_options
from stepwell.cli.toolkit.types import Duration

if TYPE_CHECKING:
    from stepwell import SessionInfo, StepwellError

Function = TypeVar("Function", bound=Callable[..., Any])
Filter = dict[str, Any]
"""Filters as arguments of the SDK."""

PAGE = 1000
"""Sessions read before the first is printed: the first page of a server."""
SHOWN = 100
"""Sessions that a terminal shows by default."""
SAMPLE = 5
"""Sessions named in a message that may concern many."""
SESSION_KEYS = (
    ("session_id", "the session"),
    ("tenant", "its tenant, if the sessions of all tenants are listed; otherwise null"),
    ("model", "the name of its model"),
    ("model_fingerprint", "fingerprint of the model that its state belongs to"),
    ("batch_size", "number of rows"),
    ("revision", "number of changes so far"),
    ("position", "time steps since its last reset"),
    ("created_time", "when it was opened (RFC 3339, UTC)"),
    ("last_used_time", "when it was last changed, read or resumed"),
    ("age_s, idle_s", "seconds since created_time and last_used_time"),
    ("resident", "whether its state is in memory; false: only in the store"),
    ("model_version", "version of the model that runs its next change"),
    (
        "model_version_pinned",
        "whether it stays on that version, because it was opened with a version or a label",
    ),
    ("max_idle_s", "idle seconds after which it expires; null: never"),
)


@click.group(
    cls=Group,
    short_help="List, show, close, export and import sessions.",
    examples=("stepwell sessions list --model forecast", "stepwell sessions close user-42"),
)
def sessions() -> None:
    """List, show, close, export and import the sessions of a server.

    A session is one user's conversation with one model. It has one state, which steps advance.
    """


def filter_options(function: Function) -> Function:
    """Add --model, --prefix and --idle-longer to a command; its function gets them as `wanted`."""

    @functools.wraps(function)
    def with_filter(
        *args: Any, model: str | None, prefix: str | None, idle_longer: float | None, **options: Any
    ) -> Any:
        wanted = {"model": model, "prefix": prefix, "idle_longer_s": idle_longer}
        return function(*args, wanted=wanted, **options)

    for option in (
        click.option(
            "--idle-longer",
            metavar="TIME",
            type=Duration(),
            help="Only sessions that have been idle for longer than this: 90s, 1h30m, 2d.",
        ),
        click.option("--prefix", metavar="TEXT", help="Only sessions whose id starts with this."),
        click.option(
            "--model",
            metavar="MODEL",
            shell_complete=complete.models,
            help="Only sessions of this model: NAME, NAME@VERSION or NAME:LABEL.",
        ),
    ):
        option(with_filter)
    return with_filter  # type: ignore[return-value]


@sessions.command(
    "list",
    short_help="List sessions.",
    examples=(
        "stepwell sessions list",
        "stepwell sessions list --model forecast --limit 20",
        "stepwell sessions list --prefix user- --idle-longer 1h --json",
    ),
    json_keys=(("(one line each)", "a JSON document per session:"), *SESSION_KEYS),
)
@filter_options
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=1),
    help=f"At most N sessions. Default: all; {SHOWN} on a terminal.",
)
@click.option("--all", "every", is_flag=True, help="All sessions, also on a terminal.")
@json_option
@server_options
def list_sessions(target: Target, wanted: Filter, limit: int | None, every: bool, as_json: bool) -> None:
    """List the live sessions of a server, sorted by id, page by page, even a million of them.

    A terminal shows the first 100 and the number of the others, unless --all or --limit is given. A pipe and --json
    get all of them.

    AGE is the time since a session was opened, IDLE the time since it was last changed, read or resumed. Listing a
    session does not count as use. TENANT is shown if an admin lists the sessions of all tenants.

    A terminal shows ... instead of the middle of a long id; a pipe and --json get the whole id.
    """
    if every and limit is not None:
        raise click.UsageError("--all must be given without --limit")
    is_cut = shows_on_terminal() and not (as_json or every or limit is not None)
    if is_cut:
        limit = SHOWN
    with target.connect("Listing the sessions", prints=True) as client:
        found = client.sessions(**wanted, limit=limit)
        if as_json:
            for session in found:
                render.print_json(session_json(session))
            return
        coming = iter(found)
        first = list(itertools.islice(coming, PAGE))
        everybodys = any(session.tenant for session in first)
        headings = (
            "SESSION",
            "MODEL",
            "VERSION",
            "BATCH",
            "REVISION",
            "POSITION",
            "AGE",
            "IDLE",
            "MAX-IDLE",
        )
        numbers = ("VERSION", "BATCH", "REVISION", "POSITION", "AGE", "IDLE", "MAX-IDLE")
        rows = (session_cells(session, everybodys=everybodys) for session in itertools.chain(first, coming))
        if not render.print_rows(("TENANT",) * everybodys + headings, rows, right=numbers):
            click.echo("no sessions", err=True)
        elif is_cut and len(first) == SHOWN and (more := client.count_sessions(**wanted) - SHOWN) > 0:
            click.echo(f"{more:,} more; use --all to list them, or --limit N", err=True)


@sessions.command(
    "show",
    short_help="Show one session.",
    examples=("stepwell sessions show user-42",),
    json_keys=SESSION_KEYS,
)
@click.argument("session_id", metavar="SESSION", shell_complete=complete.sessions)
@json_option
@server_options
def show(target: Target, session_id: str, as_json: bool) -> None:
    """Show one session as of its last completed change. This does not count as use of the session."""
    with target.connect("Reading the session") as client:
        session = client.session_info(session_id)
    if as_json:
        render.print_json(session_json(session))
    else:
        render.print_facts(session_facts(session))


@sessions.command(
    "close",
    short_help="Close sessions and delete their states.",
    examples=(
        "stepwell sessions close user-42",
        "stepwell sessions close --prefix experiment-7- --dry-run",
        "stepwell sessions close --idle-longer 7d --yes",
    ),
    json_keys=(
        ("closed", "ids of the closed sessions, even if a later one did not exist"),
        ("closed", "with a filter: number of closed sessions"),
        ("would_close, sample", "with --dry-run: number of sessions, and the ids of some of them"),
    ),
)
@click.argument("session_ids", metavar="[SESSION...]", nargs=-1, shell_complete=complete.sessions)
@filter_options
@click.option("--all", "everything", is_flag=True, help="All sessions of the server.")
@click.option("--dry-run", is_flag=True, help="Only show what would be closed.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@json_option
@server_options
def close(
    target: Target,
    session_ids: tuple[str, ...],
    wanted: Filter,
    everything: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Close sessions and delete their states. This cannot be undone.

    On a terminal the command asks for confirmation; elsewhere --yes is required. It stops at the first SESSION that
    does not exist; those before it are closed.

    With a filter or --all, it shows the number of sessions before it asks, then closes those that match, some
    thousand at a time. A session that is opened or used in the meantime stays.
    """
    is_filtered = any(value is not None for value in wanted.values())
    if wanted["prefix"] == "":
        raise click.UsageError("--prefix must not be empty; use --all to close all sessions")
    if bool(session_ids) + is_filtered + everything != 1:
        raise click.UsageError("give either sessions, a filter (--model, --prefix, --idle-longer), or --all")
    if not (yes or dry_run):
        require_terminal()
    if session_ids:
        close_named(target, session_ids, dry_run, yes, as_json)
        return
    with target.connect("Looking for sessions") as client:
        count = client.count_sessions(**wanted)
        sample = [session.session_id for session in client.sessions(**wanted, limit=SAMPLE)]
    if dry_run and as_json:
        render.print_json({"would_close": count, "sample": sample})
    elif dry_run or not (yes or as_json):
        click.echo(preview(count, sample), err=not dry_run)
    if dry_run:
        return
    if not yes and count:
        confirm(count, sample)
    closed = 0
    if count:
        with (
            target.connect("Closing sessions", prints=True) as client,
            render.counting(f"Closing sessions at {target.address}") as progress,
        ):
            closed = client.close_sessions(**wanted, everything=everything, progress=progress)
    if as_json:
        render.print_json({"closed": closed})
    else:
        click.echo(f"closed {closed} sessions")


def close_named(
    target: Target, session_ids: tuple[str, ...], dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Close sessions by id, one after the other."""
    if dry_run:
        with target.connect("Looking for sessions") as client:
            for session_id in session_ids:
                client.session_info(session_id)
        if as_json:
            render.print_json({"would_close": len(session_ids), "sample": list(session_ids[:SAMPLE])})
        else:
            click.echo(preview(len(session_ids), session_ids[:SAMPLE]))
        return
    if not yes:
        confirm(len(session_ids), session_ids)
    closed: list[str] = []
    try:
        with target.connect("Closing sessions") as client:
            for session_id in session_ids:
                client.close_session(session_id)
                closed.append(session_id)
    finally:
        print_closed(closed, as_json)


def print_closed(closed: list[str], as_json: bool) -> None:
    """Print the closed sessions, also if an error stopped the command half-way."""
    if as_json:
        render.print_json({"closed": closed})
    for session_id in () if as_json else closed:
        click.echo(f"closed {session_id}")


def preview(count: int, sample: Sequence[str]) -> str:
    """A description of the sessions that would be closed."""
    if not count:
        return "no sessions match"
    names = ", ".join(map(render.short_text, sample))
    more = f" and {count - len(sample):,} more" if count > len(sample) else ""
    return f"{count:,} session{'s' if count != 1 else ''}: {names}{more}"


@sessions.command(
    "export",
    short_help="Save sessions to a file.",
    examples=(
        "stepwell sessions export -o all.sessions",
        "stepwell sessions export user-42 user-43 -o two.sessions",
        "stepwell sessions export --model forecast -o forecast.sessions",
    ),
    json_keys=(
        ("exported", "number of sessions in the file"),
        ("failed", "sessions that could not be read: messages by id"),
        ("file", "the saved file"),
    ),
)
@click.argument("session_ids", metavar="[SESSION...]", nargs=-1, shell_complete=complete.sessions)
@filter_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write. An old one is replaced once the new one is complete.",
)
@json_option
@server_options
def export_sessions(
    target: Target, session_ids: tuple[str, ...], wanted: Filter, output: Path, as_json: bool
) -> None:
    """Save sessions to a file, to continue them on another server: those named, those that match, or all.

    The file holds each session's state, revision, position and creation time, and the answer to its last change, so
    that a client that repeats this change at the other server gets the same answer. Nothing changes for the sessions.
    Close them here before they continue there.
    """
    if session_ids and any(value is not None for value in wanted.values()):
        raise click.UsageError("give either sessions or a filter (--model, --prefix, --idle-longer)")
    with (
        target.connect("Saving sessions", prints=True) as client,
        render.counting(f"Saving sessions of {target.address}") as progress,
    ):
        try:
            report = client.export_sessions(output, session_ids or None, **wanted, progress=progress)
        except OSError as error:
            raise Failure(f"cannot write -o {output}: {error.strerror}") from None
    if as_json:
        failed = {session_id: error.message for session_id, error in report.failures.items()}
        render.print_json({"exported": report.exported, "failed": failed, "file": str(output)})
    else:
        click.echo(f"exported {report.exported} sessions to {output}")
    end_with("export", report.failures)


@sessions.command(
    "import",
    short_help="Create sessions from a file.",
    examples=(
        "stepwell sessions import all.sessions",
        "stepwell sessions import all.sessions --skip-existing --server 127.0.0.1:50052",
    ),
    json_keys=(
        ("imported", "number of sessions created, or already there exactly as in the file"),
        ("replaced, skipped", "number of existing sessions that were replaced, or kept"),
        ("failed", "sessions that were not imported: messages by id"),
    ),
)
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--skip-existing", is_flag=True, help="Keep existing sessions, and do not count them as failures."
)
@click.option("--replace", is_flag=True, help="Replace existing sessions.")
@json_option
@server_options
def import_sessions(target: Target, file: Path, skip_existing: bool, replace: bool, as_json: bool) -> None:
    """Create sessions from a file of 'stepwell sessions export'. Each session continues where it was.

    The server must have the session's model under the same name and with the same fingerprint. An existing session is
    kept and counts as a failure, unless --skip-existing or --replace is given. A session that already exists exactly
    as in the file counts as imported, so you can repeat an interrupted import.
    """
    if skip_existing and replace:
        raise click.UsageError("give either --skip-existing or --replace")
    existing: Literal["refuse", "skip", "replace"] = (
        "skip" if skip_existing else "replace" if replace else "refuse"
    )
    with (
        target.connect("Importing sessions", prints=True) as client,
        render.counting(f"Importing sessions at {target.address}") as progress,
    ):
        report = client.import_sessions(file, existing=existing, progress=progress)
    if as_json:
        failed = {session_id: error.message for session_id, error in report.failures.items()}
        render.print_json(
            {
                "imported": report.imported,
                "replaced": report.replaced,
                "skipped": report.skipped,
                "failed": failed,
            }
        )
    else:
        click.echo(
            f"imported {report.imported}, replaced {report.replaced}, skipped {report.skipped} sessions"
        )
    end_with("import", report.failures)


def end_with(what: str, failures: Mapping[str, StepwellError]) -> None:
    """Fail if some sessions failed, with the messages of the first ones."""
    if not failures:
        return
    shown = [f"{one_line(error.message)}" for error in list(failures.values())[:SAMPLE]]
    more = f"; and {len(failures) - len(shown):,} more" if len(failures) > len(shown) else ""
    raise Failure(f"{len(failures):,} sessions could not be {what}ed: {'; '.join(shown)}{more}", exit_code=1)


def shows_on_terminal() -> bool:
    """Whether the output goes to a terminal."""
    return sys.stdout.isatty()


def is_terminal() -> bool:
    """Whether there is a terminal to ask for confirmation."""
    return sys.stdin.isatty()


def require_terminal() -> None:
    """Refuse to delete anything without a confirmation."""
    if not is_terminal():
        raise Failure("closing a session deletes its state; without a terminal to confirm it, pass --yes")


def confirm(count: int, session_ids: Sequence[str]) -> None:
    """Ask for confirmation."""
    noun = f"session {session_ids[0]}" if count == 1 else f"{count:,} sessions"
    if not click.confirm(f"Delete the state of {noun}?", err=True):
        raise Failure("nothing was closed", exit_code=1)


def session_cells(session: SessionInfo, *, everybodys: bool) -> tuple[str, ...]:
    """A session as a row of the table; `everybodys` adds its tenant."""
    return (
        *((session.tenant or "-",) if everybodys else ()),
        render.short_text(session.session_id),
        render.short_text(session.model),
        str(session.model_version),
        str(session.batch_size),
        str(session.revision),
        str(session.position),
        render.duration_text(age_s(session.created_time)),
        render.duration_text(age_s(session.last_used_time)),
        idle_limit_text(session),
    )


def session_facts(session: SessionInfo) -> list[tuple[str, str]]:
    """A session as lines of a name and a value."""
    created, used = session.created_time, session.last_used_time
    return [
        ("session", session.session_id),
        ("model", session.model),
        ("version", f"{session.model_version}{' (pinned)' * session.model_version_pinned}"),
        ("fingerprint", session.fingerprint),
        ("batch size", str(session.batch_size)),
        ("revision", str(session.revision)),
        ("position", str(session.position)),
        ("opened", f"{time_text(created)} ({render.duration_text(age_s(created))} ago)"),
        ("last used", f"{time_text(used)} ({render.duration_text(age_s(used))} ago)"),
        ("state is", "in memory" if session.resident else "paged out to the store"),
        ("idle limit", idle_limit_text(session)),
    ]


def session_json(session: SessionInfo) -> dict[str, object]:
    """A session as JSON."""
    return {
        "session_id": session.session_id,
        "tenant": session.tenant or None,
        "model": session.model,
        "model_fingerprint": session.fingerprint,
        "batch_size": session.batch_size,
        "revision": session.revision,
        "position": session.position,
        "created_time": time_text(session.created_time),
        "last_used_time": time_text(session.last_used_time),
        "age_s": age_s(session.created_time),
        "idle_s": age_s(session.last_used_time),
        "resident": session.resident,
        "model_version": session.model_version,
        "model_version_pinned": session.model_version_pinned,
        "max_idle_s": session.max_idle_s,
    }


def idle_limit_text(session: SessionInfo) -> str:
    """The idle limit of a session, for people."""
    return "none" if session.max_idle_s is None else render.duration_text(session.max_idle_s)


def time_text(time: datetime) -> str:
    """A time in RFC 3339, in UTC and whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age_s(time: datetime) -> float:
    """Seconds since then by this machine's clock, never below 0."""
    return max(0.0, round((datetime.now(UTC) - time).total_seconds(), 3))
