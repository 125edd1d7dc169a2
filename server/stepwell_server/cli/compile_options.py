"""The options that `stepwell check` and `stepwell compile` share, and a clean end on SIGTERM."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import click

from stepwell_server.cli.options import Written, given, setting_options
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.program import Program, ProofOptions
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
        **others: Any,
    ) -> Any:
        found = {name: each.value for name, each in given(click.get_current_context(), _SETTINGS).items()}
        for setting in _SETTINGS:
            del others[setting.field]
        proof = ProofOptions(probe_steps, trust_causality)
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
        setting_options(_SETTINGS),
    ]
    for option in reversed(added):
        option(with_options)
    return with_options  # type: ignore[return-value]


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
