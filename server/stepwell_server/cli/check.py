"""`stepwell check MODEL`: whether a model can be stepped, and how close stepping is to what it computes elsewhere."""

from __future__ import annotations

import enum
from pathlib import Path

import click

from stepwell.cli.toolkit import render
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.target import json_option
from stepwell_server import program_file
from stepwell_server.catalog.files.programs import load_program
from stepwell_server.cli.compile_options import (
    CompileOptions,
    compile_options,
    ended_by_signals,
    progress,
    proof_json,
    proof_lines,
    require_step_function,
)
from stepwell_server.cli.options import Written
from stepwell_server.compile.comparison import Comparison, Difference
from stepwell_server.compile.errors import DataError, ModelError
from stepwell_server.errors import StartError
from stepwell_server.program import Program
from stepwell_server.settings.formats import FILE

#: Maximum number of lines for the time steps of one output.
_RANGES = 16


class Verdict(enum.Enum):
    """Result of a comparison. The value is the explanation for people."""

    EQUAL = "stepping the model gives what Keras computes on these sequences"
    DIFFERS = "stepping the model does NOT give what Keras computes on these sequences; serve --check-with refuses it"
    SAME = (
        "the model computes the same here as where it was compiled and compared with Keras, and the bits of a row do not "
        "depend on its batch; to compare it with Keras again, give the .keras file"
    )
    SAME_STEP_FUNCTION = (
        "the model computes the same here as where it was compiled, and the bits of a row do not depend on its batch; to compare "
        "it with ONNX Runtime in a plain loop, give the .onnx file"
    )
    INCONCLUSIVE = (
        "no verdict on an output is possible, because rounding alone changes Keras's own values too much; give other "
        "sequences with --data"
    )

    @classmethod
    def of(cls, found: Comparison) -> Verdict:
        """Return the verdict on a comparison."""
        if found.worst is not None and not found.worst.is_allowed:
            return cls.DIFFERS
        return cls.EQUAL if found.is_conclusive else cls.INCONCLUSIVE

    def __str__(self) -> str:
        return f"verdict: {self.word}: {self.value}"

    @property
    def word(self) -> str:
        """The verdict in a word."""
        return "same" if self is Verdict.SAME_STEP_FUNCTION else self.name.lower()


@click.command(
    cls=Command,
    short_help="Prove that a model can be stepped.",
    examples=(
        "stepwell check model.keras",
        "stepwell check model.keras --data sequences.npy",
        "stepwell check vad.onnx --data audio.npz",
        "stepwell check model.keras --import my_layers --json | jq .outputs",
    ),
    json_keys=(
        (
            "verdict, reason",
            '"equal", "same", "differs", "inconclusive", "refused" or "not checked", and why',
        ),
        (
            "fingerprint",
            "hash of architecture and weights; absent, like all keys below, if it was refused or not checked",
        ),
        ("proof", "rows, compared_steps, compared_share and unproven, as in stepwell models"),
        ("executor, executor_reason", "the executor that runs it, and why"),
        (
            "rows, steps",
            "size of the compared sequences; absent, like outputs, for a compiled model",
        ),
        (
            "outputs",
            "list, by output: the largest difference, the largest that rounding explains, and by_step",
        ),
    ),
    exit_codes=(
        (
            "0",
            "equal: it can be stepped, and stepping equals Keras on the sequences; or same, for a compiled model",
        ),
        ("1", "differs: by more than rounding on the sequences; or inconclusive"),
        (
            "2",
            "refused: it cannot be stepped; or not checked: a wrong option, file or data, or missing packages",
        ),
    ),
)
@click.argument("model", metavar="MODEL", type=Written(FILE))
@click.option(
    "--data",
    metavar="FILE.npy",
    type=Written(FILE),
    help="Your own sequences, (batch, T, features) or (T, features). For a model with several inputs, an .npz with one "
    "array per input. Default: the difficult sequences of the proof.",
)
@compile_options
@json_option
@click.pass_context
def check(
    ctx: click.Context,
    model: Path,
    data: Path | None,
    options: CompileOptions,
    as_json: bool,
) -> None:
    """Prove that a Keras model can be stepped, and compare stepping with Keras's own call over whole sequences.

    A server does the same before it serves a model, and uses the same cache for the result.

    A step function (.onnx) is compared with ONNX Runtime in a plain loop, one row and one time step at a time.

    For a compiled model (.stepwell), which needs no Keras, the command shows its proof and checks that it computes the
    same on this processor.
    """
    try:
        require_step_function(model, options.proof)
        with ended_by_signals(), options.compiler() as compiler:
            program = load_program(model, compiler, progress, options.proof, data=data, keep=False)
            if program_file.is_program(model):
                _show_compiled(program, as_json)
                return
            progress("compare")
            found = compiler.compare(model, program, data, options=options.proof)
    except DataError as error:
        raise _not_done("not checked", f"--data: {error}", as_json) from None
    except ModelError as error:
        raise _not_done("refused", str(error), as_json) from None
    except OSError as error:
        raise _not_done("not checked", f"--cache-dir: {error}", as_json) from None
    except StartError as error:
        raise _not_done("not checked", str(error), as_json) from None
    verdict = Verdict.of(found)
    if as_json:
        render.print_json(_document(program, found, verdict))
    else:
        click.echo("\n".join([*_lines(program, found, data), "", _of(program, str(verdict))]))
    ctx.exit(0 if verdict is Verdict.EQUAL else 1)


def _not_done(verdict: str, reason: str, as_json: bool) -> Failure:
    """Return the error that ends the command. With --json, print it as a document too."""
    if as_json:
        render.print_json({"verdict": verdict, "reason": reason})
    return Failure(f"{verdict}: {reason}")


def _show_compiled(program: Program, as_json: bool) -> None:
    """Show the proof of a compiled model. Loading it has already checked that it computes the same here."""
    verdict = Verdict.SAME_STEP_FUNCTION if program.proof.rows else Verdict.SAME
    if as_json:
        render.print_json(_head(program, verdict))
    else:
        click.echo("\n".join([*proof_lines(program), "", str(verdict)]))


def _of(program: Program, text: str) -> str:
    """A text with what the program is compared with."""
    return text.replace("Keras", "ONNX Runtime") if program.proof.rows else text


def _head(program: Program, verdict: Verdict) -> dict[str, object]:
    return {
        "verdict": verdict.word,
        "reason": _of(program, verdict.value),
        "fingerprint": program.fingerprint,
        "proof": proof_json(program),
        "executor": program.executor,
        "executor_reason": program.executor_reason,
    }


def _document(program: Program, found: Comparison, verdict: Verdict) -> dict[str, object]:
    return _head(program, verdict) | found.to_json()


def _lines(program: Program, found: Comparison, data: Path | None) -> list[str]:
    lines = proof_lines(program)
    what = str(data or ("random sequences" if program.proof.rows else "the proof's sequences"))
    compared = _of(program, "compared with Keras on")
    lines.append(f"{compared} {what}: {found.rows} rows of {found.steps} time steps")
    for output in found.outputs:
        largest, step = output.largest
        lines += [
            "",
            f"output {output.output!r}: the largest difference is {largest:.2g}, at time step {step}",
            f"  at most {output.share:.2g} times what rounding explains (time step {output.time} of row {output.row})"
            + (
                ""
                if output.is_allowed
                else f": STEPPING DOES NOT GIVE WHAT {output.reference.upper()} COMPUTES"
            ),
        ]
        if output.skipped:
            lines.append(
                f"  {output.skipped:.1%} of its rows and time steps cannot be compared: there, rounding an input once changes "
                "Keras's own values by a tenth or more"
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
