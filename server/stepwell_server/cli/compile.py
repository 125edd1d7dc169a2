"""`stepwell compile`: compiles a model into one file that a server without TensorFlow can serve."""

from __future__ import annotations

from pathlib import Path

import click

from stepwell.cli.toolkit import render
from stepwell.cli.toolkit.errors import Failure
from stepwell.cli.toolkit.help import Command
from stepwell.cli.toolkit.target import json_option
from stepwell_server import program_file
from stepwell_server.catalog.files.programs import load_program, require_frameworks
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
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.onnx import inspection
from stepwell_server.errors import StartError
from stepwell_server.program import Program
from stepwell_server.settings.formats import FILE


@click.command(
    cls=Command,
    short_help="Compile a Keras model or an ONNX step function into one file.",
    examples=(
        "stepwell compile model.keras -o forecast.stepwell",
        "stepwell compile model.keras --import my_layers",
        "stepwell compile vad.onnx --inspect",
        "stepwell compile vad.onnx --batch-axis state=1 --constant sr=16000 --shape input=512 --context input=64",
        "stepwell serve forecast=forecast.stepwell",
    ),
    json_keys=(
        ("file", "the file that was written"),
        ("bytes", "its size"),
        (
            "fingerprint",
            "hash of architecture and weights, the same as when the .keras file is served",
        ),
        ("proof", "rows, compared_steps, compared_share and unproven, as in stepwell models"),
        ("executor, executor_reason", "the executor that runs it, and why"),
        (
            "batch_sizes",
            "batch sizes to which batches are padded on a processor like this one; empty: no padding",
        ),
        ("compared_sizes", "batch sizes at which its bits were compared"),
        ("cached", "true: the program came from the cache"),
    ),
    exit_codes=(
        ("0", "written"),
        (
            "2",
            "refused, and nothing is written: a wrong model, option or file, or missing packages",
        ),
    ),
)
@click.argument("model", metavar="MODEL", type=Written(FILE))
@click.option(
    "-o",
    "--output",
    metavar="FILE.stepwell",
    type=Written(FILE),
    help="File to write or replace. Default: the model's name with .stepwell, in the current folder.",
)
@click.option(
    "--inspect",
    is_flag=True,
    help="Only print the inputs and outputs of the model, its recognized states, and the command that compiles it.",
)
@compile_options
@json_option
def compile(  # noqa: A001 - its name
    model: Path, output: Path | None, inspect: bool, options: CompileOptions, as_json: bool
) -> None:
    """Compile a Keras model into one file, which 'stepwell serve' can serve without TensorFlow and Keras.

    The model is proven and compared with Keras, as a server does before it serves a model. The file contains the program
    for LiteRT (program.tflite), its inputs, outputs and initial state, its proof and its origin; no code and no pickle.
    Sessions of the .keras file continue with the compiled file, and vice versa. A server checks the program on its own
    processor before it serves it.

    A Keras model may take states as inputs and return them, such as a decoder with initial_state and return_state=True. Sessions
    keep the pairs that --inspect recognizes. --state requires a pair, and --initial declares its first value.

    A step function (.onnx) takes inputs and states, and returns outputs and new states: one call is one time step. The
    options from --state to --name declare what its file does not say. They can also be tables of a file NAME.toml next to
    NAME.onnx or NAME.keras, which 'stepwell serve' reads too.

    The file is an uncompressed zip archive, so other tools can extract program.tflite. With SOURCE_DATE_EPOCH set, the
    same model gives the same bytes.
    """
    if program_file.is_program(model):
        raise Failure(
            f"{model}: is already compiled; serve it, or show it with: stepwell models show {model}"
        )
    require_step_function(model, options.proof)
    if inspect:
        _inspect(model, options, as_json)
        return
    target = output or Path(f"{model.stem}{program_file.SUFFIX}")
    if target.suffix != program_file.SUFFIX:
        raise Failure(f"'-o' must be a file that ends in {program_file.SUFFIX}; got {str(target)!r}")
    stages: list[str] = []

    def report(stage: str) -> None:
        stages.append(stage)
        progress(stage)

    with ended_by_signals():
        try:
            with options.compiler() as compiler:
                program = load_program(model, compiler, report, options.proof, keep=False)
        except (ModelError, StartError) as error:
            raise Failure(f"refused: {error}") from None
        except OSError as error:
            raise Failure(f"--cache-dir: {error}") from None
        _require_portable(model, program)
        try:
            program_file.save(program, target)
        except OSError as error:
            raise Failure(f"{target}: cannot be written: {error.strerror}") from None
    if as_json:
        render.print_json(_document(program, target, cached=not stages))
    else:
        click.echo("\n".join(_lines(program, target, cached=not stages)))


def _inspect(model: Path, options: CompileOptions, as_json: bool) -> None:
    """Print what is in the file of a model."""
    with ended_by_signals():
        try:
            require_frameworks(model)
            with options.compiler() as compiler:
                found = compiler.inspect(model, options.proof)
        except (ModelError, StartError) as error:
            raise Failure(f"refused: {error}") from None
    if as_json:
        render.print_json(found)
    else:
        click.echo("\n".join(inspection.lines(model, found)))


def _require_portable(model: Path, program: Program) -> None:
    if program.executor == "tensorflow":
        why = program.executor_reason.split("; ", maxsplit=1)[0]
        raise Failure(
            f"refused: {model}: {why}, only TensorFlow can; a {program_file.SUFFIX} file is for servers without TensorFlow. "
            "Serve the .keras file itself, on a machine with the extra server"
        )


def _document(program: Program, file: Path, *, cached: bool) -> dict[str, object]:
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "fingerprint": program.fingerprint,
        "proof": proof_json(program),
        "executor": program.executor,
        "executor_reason": program.executor_reason,
        "batch_sizes": list(program.batch_sizes),
        "compared_sizes": list(program.trial.sizes if program.trial is not None else ()),
        "cached": cached,
    }


def _lines(program: Program, file: Path, *, cached: bool) -> list[str]:
    sizes = program.trial.sizes if program.trial is not None else ()
    bits = "the same for a row at every batch size"
    if program.batch_sizes == (1,):
        bits = "each row is run alone"
    elif program.batch_sizes:
        bits = f"the same for a row at batch sizes {', '.join(map(str, program.batch_sizes))}, to which batches are padded"
    return [
        *proof_lines(program),
        f"bits: {bits} ({len(sizes)} sizes up to {max(sizes, default=0)} compared)",
        f"fingerprint: {program.fingerprint}",
        f"written: {file}, {file.stat().st_size} bytes" + (", from the cache" if cached else ""),
        f"serve it: stepwell serve {file.stem}={file}",
    ]
