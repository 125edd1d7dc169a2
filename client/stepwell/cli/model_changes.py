"""`stepwell models load`, `unload`, `default` and `label`: change the versions of a running server's models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import click
from click.core import ParameterSource

from stepwell.cli.toolkit import complete, render
from stepwell.cli.toolkit.errors import SERVER_ERROR, Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.target import Target, json_option, server_options

if TYPE_CHECKING:
    from stepwell import LoadedModel

Policy = Literal["keep", "carry", "migrate", "reset"]
POLICIES = (
    ("keep", "they stay on their version until they end"),
    (
        "carry",
        "they continue with their states under the new weights; states and outputs must have the same specs",
    ),
    ("migrate", "a function of the server (serve --migration) converts their states"),
    ("reset", "they restart from the initial state of the new version"),
)
CHANGE_KEYS = (
    ("name, version", "the model and the version that the command named"),
    ("fingerprint", "hash of its architecture and weights"),
    ("is_default", "whether the name alone refers to it now"),
    ("labels", "its labels"),
    ("moved_sessions", "sessions in memory that moved to it, or will when they are next used"),
)


class Reference(NamedTuple):
    """NAME, or NAME@VERSION."""

    name: str
    version: int | None


def reference(text: str) -> Reference:
    """Read NAME or NAME@VERSION.

    Raises:
        click.UsageError: VERSION is not a number.
    """
    name, mark, version = text.partition("@")
    if not mark:
        return Reference(name, None)
    if not (version.isascii() and version.isdecimal() and int(version) > 0):
        raise click.UsageError(
            f"the version in NAME@VERSION must be a whole number of at least 1; got {text!r}"
        )
    return Reference(name, int(version))


def versioned(text: str) -> tuple[str, int]:
    """Read NAME@VERSION.

    Raises:
        click.UsageError: It has another form.
    """
    name, version = reference(text)
    if version is None:
        raise click.UsageError(f"the version must be given, as in {text}@2; got {text!r}")
    return name, version


def policy_option(function: click.decorators.FC) -> click.decorators.FC:
    """Add --sessions to a command."""
    return click.option(
        "--sessions",
        "policy",
        type=click.Choice([name for name, _ in POLICIES]),
        default="keep",
        show_default=True,
        help="What happens to the sessions that follow the default: see Values.",
    )(function)


def migration_option(function: click.decorators.FC) -> click.decorators.FC:
    """Add --migration to a command."""
    return click.option(
        "--migration",
        metavar="NAME",
        help="With --sessions migrate: name of the function. Default: the only one.",
    )(function)


@contextlib.contextmanager
def settled(hint: str) -> Iterator[None]:
    """Add to an error of unknown outcome where to look."""
    from stepwell.errors import StepwellError

    try:
        yield
    except StepwellError as error:
        if getattr(error, "outcome", None) != "unknown":
            raise
        raise Failure(f"{error}; {hint}; check with 'stepwell models --versions'", SERVER_ERROR) from None


@click.command(
    "load",
    cls=Command,
    short_help="Load a version of a model.",
    examples=(
        "stepwell models load forecast forecast.keras --sessions carry",
        "stepwell models load forecast next.keras --no-default --label canary",
        "stepwell models load forecast@7 /srv/models/7.keras --no-upload --unload-previous",
    ),
    values=tuple((f"--sessions {name}", meaning) for name, meaning in POLICIES),
    json_keys=CHANGE_KEYS,
)
@click.argument("name", metavar="NAME[@VERSION]", shell_complete=complete.models)
@click.argument("path", metavar="PATH", type=click.Path())
@click.option(
    "--version",
    metavar="N",
    type=click.IntRange(min=1),
    help="Number of the version. Default: one more than the highest so far.",
)
@policy_option
@click.option("--no-default", is_flag=True, help="Keep the default version.")
@click.option(
    "--label",
    "labels",
    metavar="LABEL",
    multiple=True,
    help="A label for the version. Repeat the option for several.",
)
@migration_option
@click.option("--unload-previous", is_flag=True, help="Unload the previous default once it has no sessions.")
@click.option(
    "--upload/--no-upload",
    default=None,
    help="Send the file to the server, which must allow that, or name a path on the server's disk. Default: send it if the "
    "server is on another machine.",
)
@json_option
@server_options
def load(
    target: Target,
    name: str,
    path: str,
    version: int | None,
    policy: Policy,
    no_default: bool,
    labels: tuple[str, ...],
    migration: str | None,
    unload_previous: bool,
    upload: bool | None,
    as_json: bool,
) -> None:
    """Load a version of a model while the server runs, and make it the default.

    PATH is a .keras, .onnx or .stepwell file. The server compiles it and warms it up while it keeps serving; a file that
    fails to load changes nothing. The command ends when the version is live, within ten minutes unless --timeout-s is
    given.

    --sessions decides what happens to the sessions that follow the default, which are those opened by the model's
    name alone. Sessions opened with a version or a label stay on their version.
    """
    found, number = reference(name)
    if number is not None and version is not None:
        raise click.UsageError(f"give the version once; got {name} and --version {version}")
    with (
        target.connect("Loading the model", prints=True) as client,
        render.stages(f"Loading {found} at {target.address}") as progress,
        settled("the version may have been loaded"),
    ):
        loaded = client.load_model(
            found,
            path,
            version=version or number,
            sessions=policy,
            default=not no_default,
            migration=migration,
            labels=labels,
            unload_previous=unload_previous,
            progress=progress,
            upload=upload,
            **time_limit(target),
        )
    say(loaded, f"loaded {loaded.name}@{loaded.version}", as_json, moves=policy != "keep")
    reason = next((one.reason for one in loaded.versions if one.version == loaded.version), "")
    if reason:
        click.echo(f"note: {reason}", err=True)


def time_limit(target: Target) -> dict[str, float]:
    """The time limit of a load, if one is given."""
    given = click.get_current_context().get_parameter_source("timeout_s")
    return {} if given is ParameterSource.DEFAULT else {"timeout_s": target.timeout_s}


@click.command(
    "unload",
    cls=Command,
    short_help="Unload a version of a model.",
    examples=("stepwell models unload forecast@1", "stepwell models unload forecast --force"),
    json_keys=(("name, version", "the unloaded version; null: all versions"),),
)
@click.argument("name", metavar="NAME[@VERSION]", shell_complete=complete.references)
@click.option("--force", is_flag=True, help="Unload it even if it is the default or has sessions.")
@json_option
@server_options
def unload(target: Target, name: str, force: bool, as_json: bool) -> None:
    """Stop serving a version once active calls on it have ended; without VERSION, all versions of the model.

    The default, and a version with sessions, are only unloaded with --force. The store keeps these sessions; calls on
    them fail until the version is loaded again.
    """
    found, version = reference(name)
    with target.connect("Unloading the model") as client, settled("the version may have been unloaded"):
        client.unload_model(found, version, force=force)
    if as_json:
        render.print_json({"name": found, "version": version})
    else:
        click.echo(f"unloaded {name}")


@click.command(
    "default",
    cls=Command,
    short_help="Make a loaded version the default.",
    examples=(
        "stepwell models default forecast@3 --sessions carry",
        "stepwell models default forecast@2 --sessions carry",
    ),
    values=tuple((f"--sessions {name}", meaning) for name, meaning in POLICIES),
    json_keys=(*CHANGE_KEYS, ("previous_version", "the previous default version")),
)
@click.argument("name", metavar="NAME@VERSION", shell_complete=complete.references)
@policy_option
@migration_option
@json_option
@server_options
def default(target: Target, name: str, policy: Policy, migration: str | None, as_json: bool) -> None:
    """Make a loaded version the default. Use it to roll forward or back.

    --sessions decides what happens to the sessions that were opened by the model's name alone.
    """
    found, version = versioned(name)
    with target.connect("Changing the default") as client, settled("the default may have changed"):
        changed = client.set_default(found, version, sessions=policy, migration=migration)
    what = f"{changed.name}@{changed.version} is now the default"
    say(changed, what, as_json, moves=policy != "keep", previous_version=changed.previous_version)


@click.command(
    "label",
    cls=Command,
    short_help="Give a label to a version, or remove it.",
    examples=(
        "stepwell models label forecast@3 canary",
        "stepwell models label forecast canary --remove",
    ),
    json_keys=(
        ("name, label", "the model and the label that the command named"),
        ("version", "the version that the label refers to now; null: none"),
    ),
)
@click.argument("name", metavar="NAME[@VERSION]", shell_complete=complete.references)
@click.argument("label", metavar="LABEL")
@click.option("--remove", is_flag=True, help="Remove the label; NAME needs no version.")
@json_option
@server_options
def label(target: Target, name: str, label: str, remove: bool, as_json: bool) -> None:
    """Give a label to a loaded version, so that NAME:LABEL refers to it, or remove the label.

    If another version has the label, it moves to this one. Sessions that were opened by the label stay on their
    version.
    """
    found, version = (reference(name).name, None) if remove else versioned(name)
    with target.connect("Changing a label") as client, settled("the label may have changed"):
        if version is None:
            client.remove_label(found, label)
        else:
            client.set_label(found, label, version)
    if as_json:
        render.print_json({"name": found, "label": label, "version": version})
    else:
        click.echo(f"removed {found}:{label}" if version is None else f"{found}:{label} is {found}@{version}")


def say(changed: LoadedModel, what: str, as_json: bool, *, moves: bool, **more: object) -> None:
    """Print the result of a change for one version, and for the sessions of the others.

    Args:
        changed: The version.
        what: The result, for people.
        as_json: Print JSON instead.
        moves: Whether sessions were to move, so that it matters if none did.
        more: Additional fields of the JSON.
    """
    document = change_json(changed)
    if as_json:
        render.print_json(document | more)
        return
    traits = ["the default"] if document["is_default"] and not what.endswith("default") else []
    traits += [f"label {one}" for one in own(changed)[1]]
    moved = changed.moved_sessions
    if moved or (moves and document["is_default"]):
        traits.append(f"{moved:,} {'session' if moved == 1 else 'sessions'} moved")
    traits += [
        f"{other.sessions:,} stay on {changed.name}@{other.version}"
        for other in changed.versions
        if other.version != changed.version and other.sessions
    ]
    click.echo(what + (f" ({', '.join(traits)})" if traits else ""))


def own(changed: LoadedModel) -> tuple[bool, tuple[str, ...]]:
    """Whether the version is the default, and its labels."""
    found = next((one for one in changed.versions if one.version == changed.version), None)
    return (False, ()) if found is None else (found.is_default, found.labels)


def change_json(changed: LoadedModel) -> dict[str, object]:
    """A changed version as JSON."""
    is_default, labels = own(changed)
    return {
        "name": changed.name,
        "version": changed.version,
        "fingerprint": changed.fingerprint,
        "is_default": is_default,
        "labels": list(labels),
        "moved_sessions": changed.moved_sessions,
    }
