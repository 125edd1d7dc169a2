"""``stepwell check MODEL.keras``: may it be stepped, and how close is stepping to Keras?"""

from __future__ import annotations

import enum
import signal
from pathlib import Path
from typing import NoReturn

import click

from stepwell.cli import _render
from stepwell.cli._errors import Failure
from stepwell.cli._help import Command
from stepwell.cli._target import json_option
from stepwell_server.cli.setting import setting
from stepwell_server.cli.values import ModuleName, PathOf
from stepwell_server.compile.comparison import Comparison, Difference
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.compile.launch import compare_with_keras, compile_program
from stepwell_server.program import Program, ProofOptions
from stepwell_server.settings import SettingsError, default_cache_dir

#: Lines at most for the time steps of one output.
_RANGES = 16


class Verdict(enum.Enum):
    """What came of a comparison; the value is for people."""

    EQUAL = "stepping it is what Keras computes on these sequences"
    DIFFERS = "stepping it is NOT what Keras computes on these sequences; serve --check-with refuses it"
    INCONCLUSIVE = (
        "nothing can be said of an output, because rounding alone moves Keras's own values too far; give other "
        "sequences with --data"
    )

    @classmethod
    def of(cls, found: Comparison) -> Verdict:
        """Return the verdict on a comparison."""
        if found.worst is not None and not found.worst.is_allowed:
            return cls.DIFFERS
        return cls.EQUAL if found.is_conclusive else cls.INCONCLUSIVE

    def __str__(self) -> str:
        return f"verdict: {self.name.lower()}: {self.value}"


@click.command(
    cls=Command,
    short_help="Prove that a Keras model may be stepped.",
    examples=(
        "stepwell check model.keras",
        "stepwell check model.keras --data sequences.npy",
        "stepwell check model.keras --import my_layers --json | jq .outputs",
    ),
    json_keys=(
        ("verdict, reason", '"equal", "differs", "inconclusive", "refused" or "not checked", and why'),
        (
            "fingerprint",
            "hash of architecture and weights; absent, like all below, if it was refused or not checked",
        ),
        ("proof", "compared_steps, compared_share and unproven, as stepwell models has them"),
        ("executor, executor_reason", "what runs it, and why"),
        ("rows, steps", "of the sequences on which it was compared"),
        ("outputs", "list, by output: the largest difference, what rounding may make, and by_step"),
    ),
    exit_codes=(
        ("0", "equal: it may be stepped, and stepping it equals Keras on the sequences"),
        ("1", "differs: by more than rounding on the sequences; or inconclusive"),
        (
            "2",
            "refused: it may not be stepped; or not checked: the command line, the file, the data, missing packages",
        ),
    ),
)
@click.argument("model", metavar="MODEL.keras", type=PathOf("file"))
@click.option(
    "--data",
    metavar="FILE.npy",
    type=PathOf("file"),
    help="Your own sequences, (batch, T, features) or (T, features); an .npz with one array for each input of a model "
    "that has several. Default: the hard sequences of the proof.",
)
@click.option(
    "--import",
    "imports",
    metavar="MODULE",
    multiple=True,
    type=ModuleName(),
    help="Module to import first, for the model's own layers and functions. May be given again.",
)
@click.option(
    "--probe-steps",
    metavar="N",
    type=click.IntRange(1, 100_000),
    help="Time steps over which the proof compares, if more than 512 and twice what the layers reach.",
)
@click.option(
    "--trust-causality",
    is_flag=True,
    help="Go on where the graph does not prove that the model may be stepped.",
)
@setting("--cache-dir", metavar="DIR", type=PathOf("dir"), help="Folder for compiled models, as of serve.")
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    model: Path,
    data: Path | None,
    imports: tuple[str, ...],
    probe_steps: int | None,
    trust_causality: bool,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Prove that a Keras model may be stepped, and compare stepping it with Keras's own call of it over whole sequences.

    It is what a server does with a model before it serves it, and what it finds is kept in the same cache.
    """
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        options = ProofOptions(probe_steps, trust_causality)
        program = compile_program(
            model, cache_dir or default_cache_dir(), imports, _progress, options, data=data
        )
        _progress("compare")
        found = compare_with_keras(model, program, data, imports)
    except DataError as error:
        raise _not_done("not checked", f"--data: {error}", as_json) from None
    except ModelError as error:
        raise _not_done("refused", str(error), as_json) from None
    except OSError as error:
        raise _not_done("not checked", f"--cache-dir: {error}", as_json) from None
    except SettingsError as error:
        raise _not_done("not checked", str(error), as_json) from None
    finally:  # a compiling process is ended, and its folder removed, on the way here
        signal.signal(signal.SIGTERM, before)
    verdict = Verdict.of(found)
    if as_json:
        _render.print_json(_document(program, found, verdict))
    else:
        click.echo("\n".join([*_lines(program, found, data), "", str(verdict)]))
    ctx.exit(0 if verdict is Verdict.EQUAL else 1)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _not_done(verdict: str, reason: str, as_json: bool) -> Failure:
    """Why there is nothing to show: as an error, and in the document if one was asked for."""
    if as_json:
        _render.print_json({"verdict": verdict, "reason": reason})
    return Failure(f"{verdict}: {reason}")


def _progress(stage: str) -> None:
    click.echo(f"{stage}...", err=True)


def _document(program: Program, found: Comparison, verdict: Verdict) -> dict[str, object]:
    return {
        "verdict": verdict.name.lower(),
        "reason": verdict.value,
        "fingerprint": program.fingerprint,
        "proof": {
            "compared_steps": program.proof.steps,
            "compared_share": program.proof.compared,
            "unproven": program.proof.unproven,
        },
        "executor": program.executor,
        "executor_reason": program.executor_reason,
        **found.to_json(),
    }


def _lines(program: Program, found: Comparison, data: Path | None) -> list[str]:
    lines = [f"proof: {program.proof}"]
    if program.proof.unproven:
        lines.append(f"not proven: {program.proof.unproven}")
    lines.append(f"executor: {program.executor} ({program.executor_reason})")
    what = "the proof's sequences" if data is None else str(data)
    lines.append(f"compared with Keras on {what}: {found.rows} rows of {found.steps} time steps")
    for output in found.outputs:
        largest, step = output.largest
        lines += [
            "",
            f"output {output.output!r}: the largest difference is {largest:.2g}, at time step {step}",
            f"  {output.share:.2g} times what rounding may make, at most (time step {output.time} of row {output.row})"
            + ("" if output.is_allowed else ": STEPPING IT IS NOT WHAT KERAS COMPUTES"),
        ]
        if output.skipped:
            lines.append(
                f"  nothing can be said of {output.skipped:.1%} of its rows and time steps: there one rounding of the inputs "
                "moves Keras's own values by a tenth or more"
            )
        lines += [f"  {name:>16}  {value:.3g}" for name, value in _ranges(output)]
    return lines


def _ranges(output: Difference) -> list[tuple[str, float]]:
    """Return the largest difference of each time step, or of ranges of them where there are many."""
    count = len(output.by_step)
    if count == 1:
        return []
    width = -(-count // _RANGES)
    found = []
    for first in range(0, count, width):
        last = min(first + width, count) - 1
        name = f"step {first}" if first == last else f"steps {first}-{last}"
        found.append((name, max(output.by_step[first : last + 1])))
    return found
