"""The options of `stepwell bench`."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import click

from stepwell.cli.bench import plan as plans
from stepwell.cli.toolkit import complete, render
from stepwell.cli.toolkit.errors import INTERRUPTED, SERVER_ERROR, Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.target import Target, json_option, server_options
from stepwell.cli.toolkit.types import Duration

if TYPE_CHECKING:
    from stepwell.cli.bench.plan import Mode, Plan


@click.command(
    cls=Command,
    short_help="Load a server and measure steps/s and latencies.",
    examples=(
        "stepwell bench forecast",
        "stepwell bench forecast --mode stream --sessions 256 --duration-s 10",
        "stepwell bench forecast --mode group --sessions 100000 --processes 2 --json",
        "stepwell bench forecast --mode unary --sessions 4 --steps-per-call 1000",
        "stepwell bench forecast --server a:50051,b:50051,c:50051",
    ),
    values=(
        ("unary", "one call for each step"),
        ("stream", "one step in each message, on a stream for each session that is stepped at once"),
        ("frames", "the async SDK: steps awaited at the same time share messages"),
        ("group", "session groups of the async SDK: one message for a whole group"),
    ),
    json_keys=(
        ("server, model, mode", "what was measured"),
        ("sessions, concurrency", "sessions that were open; calls in flight at once"),
        ("group_size", "sessions of a group; null in other modes"),
        ("steps_per_call, batch_size", "time steps of a call, rows of a session"),
        ("processes", "processes that made the load"),
        ("seconds, interrupted", "how long was counted; whether Ctrl-C ended it early"),
        ("calls, steps", "calls answered; time steps of sessions that they made"),
        ("calls_per_s, steps_per_s", "the same per second"),
        ("row_steps_per_s", "steps per second times the batch size"),
        ("latency_ms", "of a call: mean, p50, p90, p99, p99.9, max; null if none was answered"),
        (
            "server_pid, server_cpu_s",
            "the server's process (of replicas null) and processor time (of replicas the sum)",
        ),
        ("server_cpu_ms_per_1000_steps", "processor time in ms for 1,000 steps; null where not known"),
        ("server_cpu_note", "why it is not known; else empty"),
        ("errors, first_error", "how often each class of error came; the first one's text"),
    ),
)
@click.argument("model", shell_complete=complete.models)
@click.option(
    "--mode",
    type=click.Choice(plans.MODES),
    default="frames",
    show_default=True,
    help="How steps travel; see Values.",
)
@click.option(
    "--sessions",
    metavar="N",
    type=click.IntRange(1, plans.MAX_SESSIONS),
    default=64,
    show_default=True,
    help="Sessions to open.",
)
@click.option(
    "--concurrency",
    metavar="N",
    type=click.IntRange(1, plans.MAX_CONCURRENCY),
    help="Calls in flight at once; fewer than sessions, or groups, take turns. Default: one for each session, "
    "1,024 at most; with groups, one for each process.",
)
@click.option(
    "--group-size",
    metavar="N",
    type=click.IntRange(1, plans.MAX_CONCURRENCY),
    help=f"Sessions of a group; with --mode group. Default: {plans.GROUP_SIZE:,}, or fewer so that each process "
    "has a group.",
)
@click.option(
    "--steps-per-call",
    metavar="T",
    type=click.IntRange(1, 1_000_000),
    default=1,
    show_default=True,
    help="Time steps of a call.",
)
@click.option(
    "--batch-size",
    metavar="B",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Rows of each session.",
)
@click.option(
    "--duration-s",
    metavar="TIME",
    type=Duration(0.1, plans.MAX_SECONDS),
    default=10.0,
    show_default=True,
    help="How long to measure.",
)
@click.option(
    "--warm-up-s",
    metavar="TIME",
    type=Duration(0.0, plans.MAX_SECONDS),
    default=2.0,
    show_default=True,
    help="How long to step before that.",
)
@click.option(
    "--processes",
    metavar="P",
    type=click.IntRange(1, plans.MAX_PROCESSES),
    help="Processes that make the load. Default: half the cores, at least 1.",
)
@json_option
@server_options
def bench(
    target: Target,
    model: str,
    mode: Mode,
    sessions: int,
    concurrency: int | None,
    group_size: int | None,
    steps_per_call: int,
    batch_size: int,
    duration_s: float,
    warm_up_s: float,
    processes: int | None,
    as_json: bool,
) -> None:
    """Load a server with steps of many sessions, and measure how many it does and how long each takes.

    It opens sessions of its own, steps them with random inputs made before the run, each call as soon as the
    last one is answered, and closes them at the end, also after Ctrl-C. A step is one time step of one
    session. Other users of the server will notice.

    Of several addresses, those of replicas, each session is stepped on the one that the SDK sends it to, and on
    another when that is gone.

    The generator needs processors too: measure from another machine, or with more processes, to see what the
    server can do at most.
    """
    if group_size is not None and mode != "group":
        raise click.UsageError("--group-size goes with --mode group")
    processes = processes or max(1, (os.cpu_count() or 2) // 2)
    if mode == "group":
        group_size = min(group_size or min(plans.GROUP_SIZE, -(-sessions // processes)), sessions)
    plan = plans.Plan(
        address=target.address,
        timeout_s=target.timeout_s,
        model=model,
        mode=mode,
        first_session=0,
        sessions=sessions,
        concurrency=1,
        group_size=group_size or 1,
        steps_per_call=steps_per_call,
        batch_size=batch_size,
        prefix=f"bench-{secrets.token_hex(8)}-",
        tls=None if target.tls is None else dict(target.tls),
        token_file=target.token_file,
        tenant=target.tenant,
        allow_insecure_token=target.allow_insecure_token,
    )
    run(target, plan.with_concurrency(concurrency, processes), processes, warm_up_s, duration_s, as_json)


def run(
    target: Target, plan: Plan, processes: int, warm_up_s: float, duration_s: float, as_json: bool
) -> None:
    """Make the run and print its result."""
    from stepwell.cli.bench import report
    from stepwell.cli.bench.cpu import find_listener
    from stepwell.cli.bench.fleet import Fleet

    with target.connect("Reading the model") as client:
        client.model(plan.model)
    listener = find_listener(target.address)
    with Fleet(plan, processes) as fleet:
        with render.working(f"Opening {plan.sessions:,} sessions at {target.address}"):
            fleet.wait_ready()
        with report.live(warm_up_s + duration_s, warm_up_s) as watch:
            measured = fleet.run(warm_up_s, duration_s, listener, watch)
        size = fleet.size
    if not measured.calls and not measured.interrupted:
        raise Failure(report.nothing_stepped(measured), SERVER_ERROR)
    if as_json:
        render.print_json(report.document(plan, size, measured, listener))
    else:
        report.show(plan, size, measured, listener)
    if measured.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)
