"""`stepwell doctor`: shows the facts about this machine that matter to a server, and what is wrong."""

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
    short_help="Find problems of this machine and of a server's settings.",
    examples=(
        "stepwell doctor",
        "stepwell doctor --config stepwell.toml",
        "stepwell doctor forecast=model.keras --data-dir /var/lib/stepwell",
        "stepwell doctor --store valkey://db.example/0",
        "stepwell doctor --json | jq -r '.wrong[].what'",
    ),
    json_keys=(
        ("wrong", "list of problems that would stop a server or break its guarantees: what, fix"),
        ("advice", "list of possible improvements: what, fix"),
        ("versions", "versions of packages; null: not installed; native_front is stepwell-front"),
        ("limits", "open files, processors and memory, also those of the cgroup; null: no limit"),
        (
            "data_dir, cache_dir",
            "path, exists, writable, used_bytes, free_bytes, total_bytes, file_system, used_by",
        ),
        (
            "disk",
            "flush_ms, slowest_flush_ms: median and slowest flush of 4 KiB in the data folder",
        ),
        ("store", "kind; for a shared store also url, servers, exists, partitions, sessions"),
        ("ports", "a sentence about each address"),
        (
            "front",
            "serves: native or python; reason: why it is python although --front does not say so, or null",
        ),
        (
            "compiling",
            "network, programs, files: the kernel feature that denies them to the compile process; null: none",
        ),
        ("clock", "now, newest_file_of_the_store"),
    ),
    exit_codes=(("0", "nothing is wrong"), ("1", "something is wrong"), ("2", "the command line is wrong")),
)
@setting_options(SETTINGS, hidden=True)
@config_option
@json_option
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool, **_values: Any) -> None:
    """Examine this machine for a server: versions, limits, folders, disk, ports, clock, and the server's settings.

    It takes the arguments, options, variables and config file of 'stepwell serve'; see 'stepwell serve --help'.

    It reports facts, then possible improvements, then problems with their fixes. It changes nothing and does not disturb a
    running server, whose folder and ports it reports as in use. Without the packages of a server it examines only what
    concerns clients.
    """
    settings, problem = read_settings(ctx)
    missing = _of_server.missing_packages("serve")
    uncompiled = [] if missing else _of_server.missing_packages("server")
    found = Examination(settings, SystemClock(), serves=not missing, listening=listening_pid)
    found.examine()
    if problem:
        found.wrong(problem, "correct the setting; 'stepwell serve --show-config' shows all settings")
    if missing:
        found.advise(
            f"no server can run here because {', '.join(missing)} are not installed",
            f"to serve: {_of_server.INSTALL['serve']}",
        )
    untraced = _of_server.missing_packages("otel") if settings.trace_endpoint else []
    if untraced and not missing:
        found.wrong(
            f"--trace-endpoint: needs packages that are not installed ({', '.join(untraced)})",
            _install.advice(_install.OTEL),
        )
    if uncompiled:
        files = settings.models.values()
        is_needed = not all(program_file.is_program(file) or file.suffix == ".onnx" for file in files)
        report = found.wrong if is_needed else found.advise
        report(
            f"no .keras file can be compiled here because {', '.join(uncompiled)} are not installed",
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
    """Return the given settings, or the defaults and the reason why the given settings cannot be used."""
    try:
        return settings_from(given(ctx, SETTINGS)), ""
    except (click.UsageError, StartError) as error:
        return default_settings(), str(error)


def default_settings() -> Settings:
    """Return the settings of a server that was given none."""
    try:
        return Settings()
    except StartError as error:
        raise Failure(str(error)) from None


def show_json(found: Examination, wrong: list[Finding], advice: list[Finding]) -> None:
    """Print everything for programs."""
    findings = {
        key: [{"what": finding.what, "fix": finding.fix} for finding in some]
        for key, some in (("wrong", wrong), ("advice", advice))
    }
    render.print_json(findings | {key.replace("-", "_"): facts for key, facts in found.facts.items()})


def show_text(found: Examination, wrong: list[Finding], advice: list[Finding]) -> None:
    """Print everything for people, with the problems at the end."""
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
    """Return a fact's name for people, without the unit, which follows the value."""
    return key.removesuffix("_bytes").removesuffix("_ms").replace("_", " ")


def fact_text(key: str, value: object) -> str:
    """Return a fact's value for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes") and isinstance(value, int):
        return render.rounded_size(value)
    return f"{value} ms" if key.endswith("_ms") else str(value)
