"""`stepwell doctor`: what a server would meet on this machine, and what is wrong."""

from __future__ import annotations

from typing import Any

import click

from stepwell import _install
from stepwell.cli import _of_server
from stepwell.cli.toolkit import render
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.listener import listening_pid
from stepwell.cli.toolkit.target import json_option
from stepwell_server import program_file
from stepwell_server.cli.options import config_option, given, setting_options
from stepwell_server.cli.serve import SETTINGS, settings_from
from stepwell_server.clock import SystemClock
from stepwell_server.doctor import Examination, Finding
from stepwell_server.errors import StartError
from stepwell_server.settings import Settings


@click.command(
    cls=Command,
    short_help="Look for what is wrong with this machine and a server's settings.",
    examples=(
        "stepwell doctor",
        "stepwell doctor --config stepwell.toml",
        "stepwell doctor forecast=model.keras --data-dir /var/lib/stepwell",
        "stepwell doctor --store valkey://db.example/0",
        "stepwell doctor --json | jq -r '.wrong[].what'",
    ),
    json_keys=(
        ("wrong", "list of what would stop a server or make it break its promises: what, way_on"),
        ("advice", "the same of what it could do better with"),
        ("versions", "of packages, null where not installed; native_front is stepwell-front"),
        ("limits", "open files, processors and memory, also of the cgroup; null: no limit"),
        (
            "data_dir, cache_dir",
            "path, exists, writable, used_bytes, free_bytes, total_bytes, file_system, used_by",
        ),
        (
            "disk",
            "flush_ms, slowest_flush_ms: writes of 4 KiB in the data folder, the median and the slowest",
        ),
        ("store", "kind; of one that servers share url, servers, exists, partitions, sessions"),
        ("ports", "what is said of each address"),
        (
            "front",
            "serves: native or python; reason: why it is python though --front does not ask for it, or null",
        ),
        (
            "compiling",
            "network, programs, files: by what the kernel keeps the compiling process from them; null: not",
        ),
        ("clock", "now, newest_file_of_the_store"),
    ),
    exit_codes=(("0", "nothing is wrong"), ("1", "something is"), ("2", "the command line is wrong")),
)
@setting_options(SETTINGS, hidden=True)
@config_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool, **_values: Any) -> None:
    """Look at this machine as a server would meet it: versions, limits, folders, disk, ports, clock; and its settings.

    It takes the arguments of 'stepwell serve' and all its options, which 'stepwell serve --help' lists, its variables and
    its config file.

    Says what is wrong and the way on, then what would be better. Nothing is changed, and a server that runs is not
    disturbed: its folder and ports are said to be in use, which is not wrong. Without the packages of a server only
    what concerns clients is looked at.
    """
    settings, problem = read_settings(ctx)
    missing = _of_server.missing_packages("serve")
    uncompiled = [] if missing else _of_server.missing_packages("server")
    found = Examination(settings, SystemClock(), serves=not missing, listening=listening_pid)
    found.examine()
    if problem:
        found.wrong(problem, "mend the setting; stepwell serve --show-config shows all")
    if missing:
        found.advise(
            f"no server can run here, {', '.join(missing)} are not installed",
            f"to serve: {_of_server.INSTALL['serve']}",
        )
    untraced = _of_server.missing_packages("otel") if settings.trace_endpoint else []
    if untraced and not missing:
        found.wrong(
            f"--trace-endpoint: traces need packages that are not installed ({', '.join(untraced)})",
            _install.advice(_install.OTEL),
        )
    if uncompiled:
        is_needed = not all(map(program_file.is_program, settings.models.values()))
        say = found.wrong if is_needed else found.advise
        say(
            f"no .keras file can be compiled here, {', '.join(uncompiled)} are not installed",
            f"serve compiled models (.stepwell), or: {_of_server.INSTALL['server']}",
        )
    wrong = [finding for finding in found.findings if finding.is_wrong]
    advice = [finding for finding in found.findings if not finding.is_wrong]
    if as_json:
        show_json(found, wrong, advice)
    else:
        show_text(found, wrong, advice)
    ctx.exit(1 if wrong else 0)


def read_settings(ctx: click.Context) -> tuple[Settings, str]:
    """Return the settings that are given, or the default ones and why those that are given cannot be used."""
    try:
        return settings_from(given(ctx, SETTINGS)), ""
    except (click.UsageError, StartError) as error:
        return default_settings(), str(error)


def default_settings() -> Settings:
    """The settings of a server that was given none."""
    try:
        return Settings()
    except StartError as error:
        raise Failure(str(error)) from None


def show_json(found: Examination, wrong: list[Finding], advice: list[Finding]) -> None:
    """Print everything for programs."""
    findings = {
        key: [{"what": finding.what, "way_on": finding.fix} for finding in some]
        for key, some in (("wrong", wrong), ("advice", advice))
    }
    render.print_json(findings | {key.replace("-", "_"): facts for key, facts in found.facts.items()})


def show_text(found: Examination, wrong: list[Finding], advice: list[Finding]) -> None:
    """Print everything for people, what matters at the end."""
    for section, facts in found.facts.items():
        click.echo(f"{section}:")
        render.print_facts(
            [(f"  {fact_name(name)}", fact_text(name, value)) for name, value in facts.items()]
        )
    click.echo()
    for finding in advice:
        click.echo(f"better: {finding}")
    for finding in wrong:
        click.echo(f"wrong: {finding}")
    if not wrong:
        click.echo("nothing is wrong")


def fact_name(key: str) -> str:
    """A fact's name for people: the unit stands with the value."""
    return key.removesuffix("_bytes").removesuffix("_ms").replace("_", " ")


def fact_text(key: str, value: object) -> str:
    """A fact's value for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, int):
        return render.rounded_size(value)
    return f"{value} ms" if key.endswith("_ms") else str(value)
