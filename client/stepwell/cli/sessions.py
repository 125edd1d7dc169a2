"""`stepwell sessions`: list, show and close."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from stepwell.cli import _complete, _render
from stepwell.cli._errors import Failure
from stepwell.cli._help import Group
from stepwell.cli._target import Target, json_option, server_options

if TYPE_CHECKING:
    from stepwell import SessionInfo

SESSION_KEYS = (
    ("session_id", "the session"),
    ("model", "the name of its model"),
    ("model_fingerprint", "the model that its state belongs to"),
    ("batch_size", "its rows"),
    ("revision", "its changes so far"),
    ("position", "time steps since its last reset"),
    ("created_time", "when it was opened (RFC 3339, UTC)"),
    ("last_used_time", "when it was last changed, read or resumed"),
    ("age_s, idle_s", "seconds since then"),
    ("resident", "false: its state is only in the store"),
)


@click.group(
    cls=Group,
    short_help="List, show and close sessions.",
    examples=("stepwell sessions list --model forecast", "stepwell sessions close user-42"),
)
def sessions() -> None:
    """List, show and close the sessions of a server.

    A session is one user's conversation with one model. It owns one state, which steps advance.
    """


@sessions.command(
    "list",
    short_help="List sessions.",
    examples=("stepwell sessions list", "stepwell sessions list --prefix user- --json"),
    json_keys=(("sessions", "list, by id; of each:"), *SESSION_KEYS),
)
@click.option("--model", metavar="NAME", shell_complete=_complete.models, help="Only sessions of this model.")
@click.option("--prefix", metavar="TEXT", help="Only sessions whose id begins with this.")
@json_option
@server_options
def list_sessions(target: Target, model: str | None, prefix: str | None, as_json: bool) -> None:
    """List the live sessions of a server, in the order of their ids.

    AGE is the time since a session was opened, IDLE the time since it was last changed, read or resumed. Being
    listed does not count as use.

    On a terminal the middle of a long id is left out, and ... stands for it; a pipe and --json get it whole.
    """
    with target.connect("Listing the sessions") as client:
        found = client.sessions(model=model, prefix=prefix)
    if as_json:
        _render.print_json({"sessions": [session_json(session) for session in found]})
    elif not found:
        click.echo("no sessions", err=True)
    else:
        headings = ("SESSION", "MODEL", "BATCH", "REVISION", "POSITION", "AGE", "IDLE")
        numbers = ("BATCH", "REVISION", "POSITION", "AGE", "IDLE")
        _render.print_table(headings, [session_cells(session) for session in found], right=numbers)


@sessions.command(
    "show",
    short_help="Show one session.",
    examples=("stepwell sessions show user-42",),
    json_keys=SESSION_KEYS,
)
@click.argument("session_id", metavar="SESSION", shell_complete=_complete.sessions)
@json_option
@server_options
def show(target: Target, session_id: str, as_json: bool) -> None:
    """Show one session as of its last completed change. Being shown does not count as use."""
    with target.connect("Reading the session") as client:
        session = client.session_info(session_id)
    if as_json:
        _render.print_json(session_json(session))
    else:
        _render.print_facts(session_facts(session))


@sessions.command(
    "close",
    short_help="Close sessions and delete their states.",
    examples=("stepwell sessions close user-42", "stepwell sessions close user-1 user-2 --yes"),
    json_keys=(("closed", "ids of the sessions that were closed, also when a later one was not there"),),
)
@click.argument(
    "session_ids", metavar="SESSION...", nargs=-1, required=True, shell_complete=_complete.sessions
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@server_options
def close(target: Target, session_ids: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Close sessions and delete their states; there is no way back.

    Asks first on a terminal; elsewhere --yes is needed. Stops at the first session that is not there; those
    before it are closed.
    """
    if not yes:
        confirm(session_ids)
    closed: list[str] = []
    try:
        with target.connect("Closing sessions") as client:
            for session_id in session_ids:
                client.close_session(session_id)
                closed.append(session_id)
    finally:
        print_closed(closed, as_json)


def print_closed(closed: list[str], as_json: bool) -> None:
    """Say what was closed, also when an error stopped it half-way."""
    if as_json:
        _render.print_json({"closed": closed})
    for session_id in () if as_json else closed:
        click.echo(f"closed {session_id}")


def is_terminal() -> bool:
    """Whether there is someone to ask."""
    return sys.stdin.isatty()


def confirm(session_ids: tuple[str, ...]) -> None:
    """Ask whether to delete, if there is someone to ask."""
    if not is_terminal():
        raise Failure("closing a session deletes its state; without a terminal to ask on, --yes is needed")
    noun = f"session {session_ids[0]}" if len(session_ids) == 1 else f"{len(session_ids)} sessions"
    if not click.confirm(f"Delete the state of {noun}?", err=True):
        raise Failure("nothing was closed", exit_code=1)


def session_cells(session: SessionInfo) -> tuple[str, ...]:
    """A session as a row of the table."""
    return (
        _render.short_text(session.session_id),
        _render.short_text(session.model),
        str(session.batch_size),
        str(session.revision),
        str(session.position),
        _render.duration_text(age_s(session.created_time)),
        _render.duration_text(age_s(session.last_used_time)),
    )


def session_facts(session: SessionInfo) -> list[tuple[str, str]]:
    """A session as lines of a name and a value."""
    created, used = session.created_time, session.last_used_time
    return [
        ("session", session.session_id),
        ("model", session.model),
        ("fingerprint", session.fingerprint),
        ("batch size", str(session.batch_size)),
        ("revision", str(session.revision)),
        ("position", str(session.position)),
        ("opened", f"{time_text(created)} ({_render.duration_text(age_s(created))} ago)"),
        ("last used", f"{time_text(used)} ({_render.duration_text(age_s(used))} ago)"),
        ("state is", "in memory" if session.resident else "paged out to the store"),
    ]


def session_json(session: SessionInfo) -> dict[str, object]:
    """A session as programs read it."""
    return {
        "session_id": session.session_id,
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
    }


def time_text(time: datetime) -> str:
    """A time in RFC 3339, in UTC and whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age_s(time: datetime) -> float:
    """Seconds since then by this machine's clock, never below 0."""
    return max(0.0, round((datetime.now(UTC) - time).total_seconds(), 3))
