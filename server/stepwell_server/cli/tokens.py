"""`stepwell tokens`: adds, lists and revokes the tokens in a file for `stepwell serve --auth-tokens`."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import click

from stepwell.cli.toolkit import render
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Group
from stepwell.cli.toolkit.target import json_option
from stepwell_server.auth import token_file
from stepwell_server.auth.tokens import NO_TENANT, Token, caller_of, digest_of, new_token, time_text
from stepwell_server.cli.options import Written
from stepwell_server.core.callers import Role
from stepwell_server.settings.formats import FILE, seconds

TOKEN_KEYS = (
    ("id", "first characters of the token's hash, to revoke a single token"),
    ("name, tenant, role", 'of the caller; tenant is "" for no tenant'),
    ("created, expires", "times (RFC 3339, UTC); null: not known, or never"),
)
LONGEST_S = 100 * 365 * 86_400.0


@click.group(
    cls=Group,
    short_help="Add, list and revoke the tokens of callers.",
    examples=(
        "stepwell tokens add trainer --tenant acme --role user --file callers.tokens",
        "stepwell serve forecast=model.keras --auth-tokens callers.tokens",
        "stepwell tokens list --file callers.tokens",
        "stepwell tokens revoke trainer --file callers.tokens",
    ),
)
def tokens() -> None:
    """Add, list and revoke the tokens in a file for 'stepwell serve --auth-tokens'.

    The file contains only hashes of tokens. A running server applies a change within a second. A caller may have several
    tokens: to replace one, add a new token, hand it out, then revoke the old one by its id.
    """


file_option = click.option(
    "--file",
    metavar="FILE",
    type=Written(FILE),
    envvar="STEPWELL_AUTH_TOKENS",
    show_envvar=True,
    required=True,
    help="File of tokens.",
)
name_argument = click.argument("name", metavar="NAME")


@tokens.command(
    "add",
    short_help="Create a token and print it.",
    examples=(
        "stepwell tokens add trainer --tenant acme --file callers.tokens",
        "stepwell tokens add ops --tenant - --role admin --file callers.tokens --expires-in 90d",
        "stepwell tokens add ci --tenant acme --file callers.tokens --json | jq -r .token",
    ),
    json_keys=(("token", "the token, which cannot be shown again"), *TOKEN_KEYS),
)
@name_argument
@click.option(
    "--tenant",
    metavar="NAME",
    required=True,
    help=f"Tenant of the caller, whose sessions it sees; {NO_TENANT} for no tenant.",
)
@click.option(
    "--role",
    type=click.Choice([role.value for role in (Role.VIEWER, Role.USER, Role.ADMIN)]),
    default=Role.USER.value,
    show_default=True,
    help="viewer: reads sessions of its tenant; user: also uses them; admin: all tenants, and the models.",
)
@click.option(
    "--expires-in",
    metavar="TIME",
    type=Written(seconds(1.0, LONGEST_S)),
    help="Lifetime of the token, such as 90d or 12h. Default: no limit.",
)
@file_option
@json_option
def add(name: str, tenant: str, role: str, expires_in: float | None, file: Path, as_json: bool) -> None:
    """Create a token for the caller NAME, and print it, last on its line. It cannot be shown again.

    The file is created if it does not exist. NAME and the tenant are 1 to 64 letters, digits or any of '._@-'.
    """
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    expires = None if expires_in is None else now + dt.timedelta(seconds=expires_in)
    try:
        caller = caller_of(name, "" if tenant == NO_TENANT else tenant, role)
    except ValueError as error:
        raise Failure(str(error)) from None
    secret = new_token()
    token = Token(caller, digest_of(secret), now, expires)
    try:
        token_file.add(file, token)
    except ValueError as error:
        raise Failure(f"--file: {file}: {error}") from None
    if as_json:
        render.print_json({"token": secret} | facts(token))
        return
    until = "" if expires is None else f", until {time_text(expires)}"
    click.echo(f"token {token.id} of {caller}, {role}{until}: {secret}")


@tokens.command(
    "list",
    short_help="List the tokens of a file.",
    examples=("stepwell tokens list --file callers.tokens",),
    json_keys=(
        ("tokens", "list, in the order of the file; each has:"),
        *TOKEN_KEYS,
        ("expired", "true: the server refuses it"),
    ),
)
@file_option
@json_option
def list_tokens(file: Path, as_json: bool) -> None:
    """List the tokens of a file, with their callers and expiry. The file does not contain the tokens themselves."""
    try:
        known = token_file.read(file)
    except ValueError as error:
        raise Failure(f"--file: {file}: {error}") from None
    now = dt.datetime.now(dt.UTC).timestamp()
    if as_json:
        render.print_json({"tokens": [facts(token) | {"expired": token.has_expired(now)} for token in known]})
        return
    rows = []
    for token in known:
        expires = "never" if token.expires is None else time_text(token.expires)
        if token.has_expired(now):
            expires += " (expired)"
        created = "-" if token.created is None else time_text(token.created)
        caller = token.caller
        rows.append([token.id, caller.name, caller.tenant or NO_TENANT, caller.role.value, created, expires])
    render.print_table(["ID", "NAME", "TENANT", "ROLE", "CREATED", "EXPIRES"], rows)


@tokens.command(
    "revoke",
    short_help="Remove tokens from a file.",
    examples=(
        "stepwell tokens revoke trainer --file callers.tokens",
        "stepwell tokens revoke trainer --id 60303ae22b99 --file callers.tokens",
    ),
    json_keys=(("revoked", "list of the removed tokens; each has:"), *TOKEN_KEYS),
)
@name_argument
@click.option(
    "--tenant", metavar="NAME", help="Tenant of the caller, if several tenants have a caller of that name."
)
@click.option(
    "--id", "token_id", metavar="ID", help="Remove only the token with this id, from 'stepwell tokens list'."
)
@file_option
@json_option
def revoke(name: str, tenant: str | None, token_id: str | None, file: Path, as_json: bool) -> None:
    """Remove all tokens of the caller NAME from the file. A running server ends the caller's streams within a second."""

    def is_meant(token: Token) -> bool:
        caller = token.caller
        of_tenant = tenant is None or caller.tenant == ("" if tenant == NO_TENANT else tenant)
        return caller.name == name and of_tenant and token_id in {None, token.id}

    try:
        meant = [token for token in token_file.read(file) if is_meant(token)]
        tenants = sorted({token.caller.tenant or NO_TENANT for token in meant})
        if len(tenants) > 1:
            raise Failure(f"--tenant: must be given, as {name!r} is a caller of {', '.join(tenants)}")
        revoked = token_file.remove(file, is_meant) if meant else []
    except ValueError as error:
        raise Failure(f"--file: {file}: {error}") from None
    if not revoked:
        which = "" if token_id is None else f" with the id {token_id!r}"
        raise Failure(f"NAME: must be a caller of {file}; it has no token of {name!r}{which}")
    if as_json:
        render.print_json({"revoked": [facts(token) for token in revoked]})
        return
    for token in revoked:
        click.echo(f"revoked token {token.id} of {token.caller}")


def facts(token: Token) -> dict[str, object]:
    """A token for programs."""
    times = {"created": token.created, "expires": token.expires}
    return {
        "id": token.id,
        "name": token.caller.name,
        "tenant": token.caller.tenant,
        "role": token.caller.role.value,
    } | {key: None if time is None else time_text(time) for key, time in times.items()}
