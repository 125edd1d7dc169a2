"""The result of a run, for people and for programs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from stepwell.cli.toolkit import render

if TYPE_CHECKING:
    from stepwell.cli.bench.cpu import Listener
    from stepwell.cli.bench.fleet import Measured
    from stepwell.cli.bench.fleet import Progress as Far
    from stepwell.cli.bench.plan import Plan

QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999))


def document(plan: Plan, processes: int, measured: Measured, listener: Listener) -> dict[str, object]:
    """The result as programs read it."""
    steps = measured.session_steps * plan.steps_per_call
    cpu_s = measured.server_cpu_s
    return {
        "server": plan.address,
        "model": plan.model,
        "mode": plan.mode,
        "sessions": plan.sessions,
        "concurrency": plan.concurrency,
        "group_size": plan.group_size if plan.mode == "group" else None,
        "steps_per_call": plan.steps_per_call,
        "batch_size": plan.batch_size,
        "processes": processes,
        "seconds": round(measured.seconds, 4),
        "interrupted": measured.interrupted,
        "calls": measured.calls,
        "steps": steps,
        "calls_per_s": round(measured.calls_per_s, 2),
        "steps_per_s": round(measured.session_steps_per_s * plan.steps_per_call, 2),
        "row_steps_per_s": round(measured.session_steps_per_s * plan.steps_per_call * plan.batch_size, 2),
        "latency_ms": latency_ms(measured),
        "server_pid": listener.pid,
        "server_cpu_s": None if cpu_s is None else round(cpu_s, 3),
        "server_cpu_ms_per_1000_steps": None if cpu_s is None or not steps else round(cpu_s / steps * 1e6, 4),
        "server_cpu_note": listener.reason,
        "errors": dict(measured.errors),
        "first_error": measured.first_error,
    }


def latency_ms(measured: Measured) -> dict[str, float | None]:
    """The latencies of calls that were answered."""
    latencies = measured.latencies
    values = {"mean": latencies.mean_s} | {name: latencies.quantile_s(q) for name, q in QUANTILES}
    values["max"] = latencies.max_s if latencies.count else None
    return {name: None if value is None else round(value * 1e3, 4) for name, value in values.items()}


def show(plan: Plan, processes: int, measured: Measured, listener: Listener) -> None:
    """Print the result for people."""
    steps = measured.session_steps * plan.steps_per_call
    rate = measured.session_steps_per_s * plan.steps_per_call
    facts = [
        ("load", load_text(plan, processes)),
        ("measured", f"{measured.seconds:.1f} s, {measured.calls:,} calls, {steps:,} steps"),
        ("steps/s", f"{rate:,.0f}{rows_text(rate, plan.batch_size)}"),
        ("calls/s", f"{measured.calls_per_s:,.0f}"),
    ]
    for name, value in latency_ms(measured).items():
        facts.append((f"{name} ms", "" if value is None else f"{value:,.3f}"))
    facts.append(("server CPU", cpu_text(measured, steps, listener)))
    facts.append(("errors", errors_text(measured)))
    render.print_facts(facts)


def load_text(plan: Plan, processes: int) -> str:
    """What load it was."""
    if plan.mode == "group":
        what = f"{plan.concurrency:,} of {plan.units:,} groups of {plan.group_size:,} at once"
    else:
        what = f"{'all' if plan.concurrency == plan.sessions else f'{plan.concurrency:,}'} at once"
    sizes = f", batch size {plan.batch_size}" if plan.batch_size > 1 else ""
    times = f", {plan.steps_per_call} time steps a call" if plan.steps_per_call > 1 else ""
    by = f"{processes} process{'es' if processes > 1 else ''}"
    return f"{plan.mode}: {plan.sessions:,} sessions, {what}{sizes}{times}, by {by}"


def rows_text(rate: float, batch_size: int) -> str:
    """The same rate in rows, where a session has several."""
    return f" ({rate * batch_size:,.0f} rows/s)" if batch_size > 1 else ""


def cpu_text(measured: Measured, steps: int, listener: Listener) -> str:
    """The server's processor time, or why it is not known."""
    if measured.server_cpu_s is None:
        return f"cannot be read: {listener.reason or 'its process is gone'}"
    each = f", {measured.server_cpu_s / steps * 1e6:,.2f} ms for 1,000 steps" if steps else ""
    return f"{measured.server_cpu_s / measured.seconds:.2f} cores{each}"


def errors_text(measured: Measured) -> str:
    """Errors by kind, and the text of the first."""
    if not measured.errors:
        return "none"
    counted = ", ".join(f"{kind} {count:,}" for kind, count in measured.errors.items())
    return f"{counted}; the first: {measured.first_error}"


@contextlib.contextmanager
def live(total_s: float, warm_up_s: float) -> Iterator[Callable[[Far], None]]:
    """Show on stderr how far a run is, if a person is watching.

    Args:
        total_s: How long it takes, warming up included.
        warm_up_s: How long it warms up.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False), transient=True) as bar:
        task = bar.add_task("warming up", total=total_s, rate="")

        def update(progress: Far) -> None:
            before_s = 0.0 if progress.phase == "warming up" else warm_up_s
            failed = f", {progress.errors:,} errors" if progress.errors else ""
            rate = f"{progress.steps_per_s:,.0f} steps/s{failed}" if progress.calls or failed else ""
            bar.update(task, completed=before_s + progress.done_s, description=progress.phase, rate=rate)

        yield update


def nothing_stepped(measured: Measured) -> str:
    """The error of a run without a single step."""
    why = measured.first_error or "no call was answered in time; a longer --duration-s may help"
    return f"not one step was answered: {why}"
