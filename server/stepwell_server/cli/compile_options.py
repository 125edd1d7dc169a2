"""The options that `stepwell check` and `stepwell compile` share, and a clean end on SIGTERM."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from stepwell.cli.toolkit.errors import Failure
from stepwell_server.cli.options import Written, given, setting_options
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.onnx import declaration
from stepwell_server.program import Declaration, Program, ProofOptions
from stepwell_server.settings import Settings
from stepwell_server.settings.fields import settings_of
from stepwell_server.settings.formats import MODULE

Function = TypeVar("Function", bound=Callable[..., Any])

_SETTINGS = [
    each
    for each in settings_of(Settings)
    if each.field in {"cache_dir", "max_model_bytes", "max_compile_memory_bytes", "compile_timeout_s"}
]


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """Options for compiling a model."""

    imports: tuple[str, ...]
    proof: ProofOptions
    given: Mapping[str, Any]
    """Values of the settings that the user gave."""

    def compiler(self) -> WarmCompiler:
        """Return the compiler that a server would use. It is a context manager that ends its process.

        Raises:
            StartError: no cache folder is given, and the user has no home folder.
        """
        settings = Settings(imports=self.imports, store="memory", **self.given)
        return WarmCompiler(settings.cache_dir, settings.imports, settings.compile_limits)


def compile_options(function: Function) -> Function:
    """Add the options to a command. Its function receives them as the argument `options`."""

    @functools.wraps(function)
    def with_options(
        *args: Any,
        imports: tuple[str, ...],
        probe_steps: int | None,
        trust_causality: bool,
        trust_rows: bool,
        **others: Any,
    ) -> Any:
        found = {name: each.value for name, each in given(click.get_current_context(), _SETTINGS).items()}
        for setting in _SETTINGS:
            del others[setting.field]
        try:
            declared = Declaration(
                **{
                    field: declaration.parse(option, others.pop(f"declared_{field}"))
                    for option, field in declaration.FIELDS.items()
                }
            )
        except ModelError as error:
            raise Failure(str(error)) from None
        proof = ProofOptions(probe_steps, trust_causality, trust_rows, declared)
        return function(*args, options=CompileOptions(imports, proof, found), **others)

    added = [
        click.option(
            "--import",
            "imports",
            metavar="MODULE",
            multiple=True,
            type=Written(MODULE),
            help="Module to import first, for custom layers and functions of the model. May be given again.",
        ),
        click.option(
            "--probe-steps",
            metavar="N",
            type=click.IntRange(1, 100_000),
            help="Time steps over which the model is compared with Keras. It only raises the default, which is 512 or "
            "twice the reach of the layers, whichever is larger.",
        ),
        click.option(
            "--trust-causality",
            is_flag=True,
            help="Continue even if the graph does not prove that the model can be stepped.",
        ),
        click.option(
            "--trust-rows",
            is_flag=True,
            help="Batch the rows of a step function (.onnx) even if its graph does not prove that they stay apart. Without it, "
            "each row of such a model is run alone.",
        ),
        *(_declaring(option, field) for option, field in declaration.FIELDS.items()),
        setting_options(_SETTINGS),
    ]
    for option in reversed(added):
        option(with_options)
    return with_options  # type: ignore[return-value]


def _declaring(option: str, field: str) -> Callable[[Function], Function]:
    form, text = _DECLARED[option]
    return click.option(
        f"--{option}", f"declared_{field}", metavar=form, multiple=True, help=f"{text} May be given again."
    )


_DECLARED = {
    "state": (
        "INPUT:OUTPUT",
        (
            "An input that takes a state, and the output that holds it after the step. Default: the pairs that --inspect "
            "recognizes."
        ),
    ),
    "batch-axis": ("TENSOR=AXIS", "The axis of a tensor along which the rows are. Default: 0."),
    "constant": ("INPUT=VALUE", "An input that never changes, such as sr=16000."),
    "initial": (
        "STATE=VALUE",
        "The initial value of a state: a number, or FILE.npz with an array. Default: 0.",
    ),
    "context": (
        "INPUT=N",
        "Put the last N elements of an input, along its last axis, before the next one. They become a state.",
    ),
    "shape": (
        "INPUT=SIZES",
        "The shape of one row of an input, such as 512 or 3,32, where the file leaves it open; without a context.",
    ),
    "name": ("TENSOR=NAME", "The name of an input, output or state for users."),
}


def require_step_function(model: Path, options: ProofOptions) -> None:
    """Refuse options of step functions for other files, and those of Keras models for step functions.

    Raises:
        Failure: one is given.
    """
    if model.suffix == declaration.SUFFIX:
        if options.steps is not None or options.trust:
            raise Failure(
                f"{model}: --probe-steps and --trust-causality are for Keras models; one call of a step function is one time step"
            )
        return
    declared = [
        option
        for option, field in declaration.FIELDS.items()
        if option not in declaration.OF_KERAS and getattr(options.declaration, field)
    ]
    declared += ["trust-rows"] if options.trust_rows else []
    if declared:
        raise Failure(f"--{declared[0]}: is for a step function (.onnx); got {model}")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end the block like Ctrl-C, so that the compile process is stopped and its file removed."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def progress(stage: str) -> None:
    """Print the stage that begins, on stderr."""
    click.echo(f"{stage}...", err=True)


def proof_json(program: Program) -> dict[str, object]:
    """Return the proof of a program, as JSON."""
    return {
        "rows": program.proof.rows,
        "compared_steps": program.proof.steps,
        "compared_share": program.proof.compared,
        "unproven": program.proof.unproven,
    }


def proof_lines(program: Program) -> list[str]:
    """Return the proof and the executor of a program, as text."""
    lines = [f"proof: {program.proof}"]
    if program.proof.unproven:
        lines.append(f"not proven: {program.proof.unproven}")
    lines.append(f"executor: {program.executor} ({program.executor_reason})")
    return lines
