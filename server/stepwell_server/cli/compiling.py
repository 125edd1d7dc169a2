"""What the commands that compile a model have in common: the options of it, and a signal that ends it cleanly."""

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
class Compiling:
    """How a model is to be compiled."""

    imports: tuple[str, ...]
    proof: ProofOptions
    given: Mapping[str, Any]
    """The settings that are given."""

    def compiler(self) -> WarmCompiler:
        """Return what compiles it, as a server does: a context manager, at whose end no process is left.

        Raises:
            StartError: no cache folder is given, and there is no home.
        """
        settings = Settings(imports=self.imports, store="memory", **self.given)
        return WarmCompiler(settings.cache_dir, settings.imports, settings.compile_limits)


def compile_options(function: Function) -> Function:
    """Add the options of compiling to a command; its function gets them as `compiling`."""

    @functools.wraps(function)
    def with_compiling(
        *args: Any,
        imports: tuple[str, ...],
        probe_steps: int | None,
        trust_causality: bool,
        **options: Any,
    ) -> Any:
        found = {name: each.value for name, each in given(click.get_current_context(), _SETTINGS).items()}
        for setting in _SETTINGS:
            del options[setting.field]
        proof = ProofOptions(probe_steps, trust_causality)
        return function(*args, compiling=Compiling(imports, proof, found), **options)

    added = [
        click.option(
            "--import",
            "imports",
            metavar="MODULE",
            multiple=True,
            type=Written(MODULE),
            help="Module to import first, for the model's own layers and functions. May be given again.",
        ),
        click.option(
            "--probe-steps",
            metavar="N",
            type=click.IntRange(1, 100_000),
            help="Time steps over which the proof compares, if more than 512 and twice what the layers reach.",
        ),
        click.option(
            "--trust-causality",
            is_flag=True,
            help="Go on where the graph does not prove that the model may be stepped.",
        ),
        setting_options(_SETTINGS),
    ]
    for option in reversed(added):
        option(with_compiling)
    return with_compiling  # type: ignore[return-value]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end the block like Ctrl-C: a compiling process is ended, and its file removed, on the way."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def progress(stage: str) -> None:
    """Say on stderr which stage begins."""
    click.echo(f"{stage}...", err=True)


def proof_json(program: Program) -> dict[str, object]:
    """How a program was proven, as programs read it."""
    return {
        "compared_steps": program.proof.steps,
        "compared_share": program.proof.compared,
        "unproven": program.proof.unproven,
    }


def proof_lines(program: Program) -> list[str]:
    """How a program was proven and what runs it, for people."""
    lines = [f"proof: {program.proof}"]
    if program.proof.unproven:
        lines.append(f"not proven: {program.proof.unproven}")
    lines.append(f"executor: {program.executor} ({program.executor_reason})")
    return lines
